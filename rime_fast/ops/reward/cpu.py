"""The reward's steps as csrc's kernels; those of the CPU, and what the CUDA ones share with them (cuda.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.reward.weights import PLANES, RANK_REWARDS, RewardWeights


def why_not(gen: Tensor) -> str | None:
    """The reason the compiled CPU kernels cannot serve a call, or None."""
    if gen.device.type != "cpu":
        return f"it needs CPU tensors, got {gen.device.type}"
    return compiled_why_not(gen)


def compiled_why_not(gen: Tensor) -> str | None:
    """The reason the compiled kernels cannot serve a call on its device, or None."""
    if gen.dtype == torch.float64:
        return "it works on fp32 products; float64 embeddings need backend='reference'"
    return native.why_not(cuda=gen.device.type == "cuda")


def score_code(weights: RewardWeights) -> int:
    """Number the score's shape as the kernels take it."""
    return len(RANK_REWARDS) if weights.mode == "ume_r1" else RANK_REWARDS.index(weights.rank_reward)


class Compiled:
    """Runs csrc's kernels on the device of their tensors."""

    ALIGN = 1  # rows of similarities begin at multiples of so many

    def reads(self, rows: Tensor, anchors: Tensor) -> bool:
        """Whether ``begin`` (cuda.py) serves these tensors as they are; else rows are fp32."""
        return False

    def own_similarities(self, rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Compute fp64 similarities [R, P] of rows [R, D] to their items' anchors own [B, P, D], and the rows' norms
        [R]."""
        found = rows.new_empty(rows.shape[0], own.shape[1], dtype=torch.float64)
        norms = rows.new_empty(rows.shape[0])
        torch.ops.rime_fast_C.rank_own(rows, own.contiguous(), found, norms)
        return found, norms

    def scans(self, rows: Tensor) -> bool:
        """Whether ``add_anchors`` serves rows on this device: product and statistics in one kernel."""
        return rows.device.type == "cpu"

    def add_anchors(
        self,
        rows: Tensor,
        anchors: Tensor,
        norms: Tensor,
        own: Tensor,
        positive: Tensor,
        mask: Tensor | None,
        largest_norm: Tensor | None,
        first: int,
        weights: RewardWeights,
        state: Tensor,
    ) -> None:
        """Add the negatives among contiguous fp32 anchors [n, D] to ``state``; see ``add_tile``."""
        kind = weights.negative_code, weights.tau
        torch.ops.rime_fast_C.rank_scan(rows, anchors, norms, own, positive, mask, largest_norm, first, *kind, state)

    def add_tile(
        self,
        sims: Tensor,
        rows: Tensor,
        tile: Tensor,
        tile_norm: Tensor,
        norms: Tensor,
        own: Tensor,
        positive: Tensor,
        mask: Tensor | None,
        first: int,
        weights: RewardWeights,
        slack: float,
        state: Tensor,
    ) -> None:
        """Add the negatives of tile [n, D] to ``state``, by their similarities sims [R, n] (on the CPU: fp64).

        tile_norm [1]: the largest norm in the tile. mask [B, n] with unit column stride. first: the tile's place in the
        bank, of which ``positive`` speaks. slack: how many times an fp32 product's roundings sims may have.
        """
        code, tau = weights.negative_code, weights.tau
        torch.ops.rime_fast_C.rank_tile(
            sims, rows, tile, tile_norm, norms, own, positive, mask, first, code, tau, slack, state
        )

    def merge(self, parts: Tensor, state: Tensor, weights: RewardWeights) -> None:
        """Merge states [W, R, 4 + P] of disjoint parts of a bank into ``state``, in order."""
        torch.ops.rime_fast_C.rank_merge(parts.contiguous(), weights.negative_code, weights.tau, state)

    def finish(
        self,
        state: Tensor,
        own: Tensor,
        format_ok: Tensor,
        lengths: Tensor | None,
        disc_similarity: Tensor | None,
        weights: RewardWeights,
        rewards: Tensor,
        advantages: Tensor,
    ) -> Tensor:
        """Fill rewards and advantages [B, G], and give them with all terms, [12, B, G] fp32, from the states and the
        own similarities of all rollouts."""
        out = own.new_empty(len(PLANES), *format_ok.shape, dtype=torch.float32)
        torch.ops.rime_fast_C.rank_finish(
            *(state, own, format_ok.contiguous()),
            *(self.values(lengths, format_ok), self.values(disc_similarity, format_ok)),
            *(score_code(weights), weights.hit_k, weights.negative_code, weights.normalize_std),
            *(weights.w_fmt, weights.w_rank, weights.w_refine, weights.w_len, weights.length_limit, weights.eps),
            *(out, rewards, advantages),
        )
        return out

    def values(self, x: Tensor | None, format_ok: Tensor) -> Tensor | None:
        """Values [B, G] as the kernels read them: contiguous fp64."""
        return None if x is None else x.double().expand_as(format_ok).contiguous()
