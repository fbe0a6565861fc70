"""rime-fast: kernel-optimised training of rewrite-driven generative multimodal embeddings.

The public names below are imported on first use, so that ``import rime_fast`` stays quick and the operators can be
used without loading transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "fused_logprob_pool": "rime_fast.ops.logprob_pool",
    "fused_linear_ce": "rime_fast.ops.logprob_pool",
    "LogprobPool": "rime_fast.ops.logprob_pool",
    "contrastive_loss": "rime_fast.ops.contrastive",
    "ContrastiveOutput": "rime_fast.ops.contrastive",
    "score_rewrites_": "rime_fast.ops.reward",
    "RewardWeights": "rime_fast.ops.reward",
    "DualModeModel": "rime_fast.model.dual_mode",
    "MixtureSampler": "rime_fast.data.mixture",
    "rewrite_rows": "rime_fast.prepare.rewrite",
    "mine_negatives": "rime_fast.prepare.mine",
    "RimeEmbedder": "rime_fast.eval.embedder",
    "RimeConfig": "rime_fast.trainers.config",
    "RefineConfig": "rime_fast.trainers.config",
    "RimeTrainer": "rime_fast.trainers.joint",
    "RefineRLTrainer": "rime_fast.trainers.refine",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'rime_fast' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from rime_fast.data.mixture import MixtureSampler
    from rime_fast.eval.embedder import RimeEmbedder
    from rime_fast.model.dual_mode import DualModeModel
    from rime_fast.ops.contrastive import ContrastiveOutput, contrastive_loss
    from rime_fast.ops.logprob_pool import LogprobPool, fused_linear_ce, fused_logprob_pool
    from rime_fast.ops.reward import RewardWeights, score_rewrites_
    from rime_fast.prepare.mine import mine_negatives
    from rime_fast.prepare.rewrite import rewrite_rows
    from rime_fast.trainers.config import RefineConfig, RimeConfig
    from rime_fast.trainers.joint import RimeTrainer
    from rime_fast.trainers.refine import RefineRLTrainer
