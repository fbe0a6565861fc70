"""The output head that can score rows without making logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScoringHead(nn.Linear):
    """A language-model head, ``lm_head``, with a second way to be called.

    ``head(hidden)`` gives logits as before. ``head(hidden, scoring={...})`` runs the fused operator with the head's
    own weight, or with ``weight()``, a table made from it. The operator runs inside this module's forward, so that
    FSDP's and ZeRO-3's hooks have the weight whole at that moment, and again in the backward; hence also a plain dict
    of tensors for a result.
    """

    def forward(
        self, hidden: Tensor, scoring: dict[str, Any] | None = None, weight: Callable[[], Tensor] | None = None
    ) -> Any:
        if scoring is None:
            return F.linear(hidden, self.weight, self.bias)
        return score_rows(hidden, self.weight if weight is None else weight(), self.bias, **scoring)


def make_scoring(head: nn.Module) -> None:
    """Turn a plain ``nn.Linear`` head into a ``ScoringHead`` in place; any other kind is left as it is."""
    if type(head) is nn.Linear:
        head.__class__ = ScoringHead


def score_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    targets: Tensor | None,
    token_weight: Tensor | None,
    pools: dict[str, Tensor],
    entropy: bool,
    temperature: float,
    normalize: bool,
    backend: str,
    max_scored: int | None,
) -> dict[str, Tensor]:
    """Compute log-probabilities, loss and pooled embeddings of packed rows ``hidden`` [T, H] by ``rime_fast.ops``.

    A pool [N] is the row of each embedding, [N, K] the K rows beside each other whose mean it is. An index of -1 stands
    for a sequence without that token: its embedding is a zero row, without gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    present = {name: (index if index.dim() == 1 else index[:, 0]) >= 0 for name, index in pools.items()}
    rows = {name: _rows(index, present[name]) for name, index in pools.items()}
    found: dict[str, Tensor | None] = {}
    if targets is None:
        wide = torch.promote_types(hidden.dtype, torch.float32)  # fp64 stays, as in the operator
        taken = {name: hidden.index_select(0, index.flatten()).to(wide) for name, index in rows.items()}
        embeddings = {name: x.unflatten(0, rows[name].shape).sum(1) / rows[name].shape[1] for name, x in taken.items()}
        if normalize:
            embeddings = {name: F.normalize(x, dim=-1) for name, x in embeddings.items()}
    else:
        from rime_fast.ops.logprob_pool import fused_linear_ce, fused_logprob_pool

        options: dict[str, Any] = {
            "pools": {name: (index[:, 0], index[:, -1] + 1) for name, index in rows.items()} or None,
            "bias": bias,
            "temperature": temperature,
            "entropy": entropy,
            "normalize": normalize,
            "backend": backend,
            "max_scored": max_scored,
        }
        weight = weight.to(hidden.dtype)
        # Disabled: the operator chooses its own precision, autocast would only cut its fp32 accumulation short.
        with torch.autocast(hidden.device.type, enabled=False):
            if token_weight is None:
                scores = fused_logprob_pool(hidden, weight, targets, **options)
            else:
                found["loss"], scores = fused_linear_ce(hidden, weight, targets, token_weight=token_weight, **options)
        found |= {"logp": scores.logp, "entropy": scores.entropy}
        embeddings = dict(scores.embeddings or {})
    for name, x in embeddings.items():
        found[f"pool:{name}"] = torch.where(present[name][:, None], x, 0.0)
    return {name: x for name, x in found.items() if x is not None}


def _rows(index: Tensor, present: Tensor) -> Tensor:
    """A pool as [N, K]; where a sequence has no such token, rows that exist."""
    index = index[:, None] if index.dim() == 1 else index
    return torch.where(present[:, None], index, torch.arange(index.shape[1], device=index.device))
