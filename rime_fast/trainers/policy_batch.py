"""The batch in which a step's rollouts are scored: every prompt once with its rollouts, or each rollout on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rime_fast.data.collate import Collator
from rime_fast.engine.rollout import dual_mode_of
from rime_fast.model.packing import PACKED_SDPA
from rime_fast.model.shared_prefix import shared_prefix_batch
from rime_fast.trainers.anchors import to_device
from rime_fast.trainers.rollout_batch import token_rows


@dataclass
class PolicyBatch:
    """inputs: what the model's forward takes, targets included. pools: where d and g are read, by name.
    rows [T] int64: the rollout each row belongs to (any value where nothing is scored). repeats: rollouts that share
    one row of the "disc" pool."""

    inputs: dict[str, Any]
    pools: dict[str, Tensor]
    rows: Tensor
    repeats: int

    def per_rollout(self, disc: Tensor) -> Tensor:
        """The discriminative embeddings [rollouts, D], those of a prompt repeated for its rollouts."""
        return disc[:, None].expand(-1, self.repeats, -1).flatten(0, 1)


def shared_policy_batch(prompts: dict[str, Any], responses: Sequence[Sequence[int]]) -> PolicyBatch:
    """P + G R rows a prompt. prompts: the packed prompt batch, on the device already."""
    batch = shared_prefix_batch(prompts, responses)
    pools = {name: batch.pop(f"{name}_index") for name in ("disc", "gen")}
    layout = batch["layout"]
    return PolicyBatch(batch, pools, layout.rows, layout.group_size)


def separate_policy_batch(
    collator: Collator, sides: Sequence[Any], responses: Sequence[Sequence[int]], device: torch.device
) -> PolicyBatch:
    """G (P + R) rows a prompt: every rollout a sequence of its own (for comparison, and for flash-attention)."""
    batch = to_device(collator.collate_responses(sides, responses), device)
    pools = {name: batch.pop(f"{name}_index") for name in ("disc", "gen")}
    return PolicyBatch(batch, pools, token_rows(batch), 1)


def use_packed_attention(model: nn.Module) -> None:
    """Let the text model take an attention layout: packed SDPA, whose CUDA kernel is flash-attention too."""
    dual_mode_of(model).model.language_model.config._attn_implementation = PACKED_SDPA
