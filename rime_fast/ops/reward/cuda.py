"""The reward on CUDA: csrc's streaming kernels, and one launch for a small bank."""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops.reward.cpu import Compiled, compiled_why_not, score_code
from rime_fast.ops.reward.weights import STATE, RewardWeights

# A call is one launch where a block's work, G A D products in fp64, is at most SMALL (on an H100 2.1 million take 0.57
# ms, the launches of a larger bank 0.04 ms and twice the host's time), and what it keeps fits its shared memory.
SMALL, SHARED_BYTES, WARPS = 1 << 18, 160 << 10, 8


def why_not(gen: Tensor) -> str | None:
    """The reason csrc's CUDA kernels cannot serve a call, or None."""
    if gen.device.type != "cuda":
        return f"it needs CUDA tensors, got {gen.device.type}"
    return compiled_why_not(gen)


class CudaKernels(Compiled):
    """Runs the kernels as its base does, and a small bank's whole call by ``score_small``.

    A larger bank on the rows' device takes a launch to begin, two a tile and one to end, whatever the dtypes are.
    """

    ALIGN = 4

    def reads(self, rows: Tensor, anchors: Tensor) -> bool:
        return rows.is_cuda and anchors.device == rows.device

    def begin(
        self, rows: Tensor, anchors: Tensor, positive: Tensor, weights: RewardWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute fp64 similarities [R, P] to each item's own anchors, NaN where one lies outside the bank, norms [R]
        of rows, and states that have met no anchor."""
        own = rows.new_empty(rows.shape[0], weights.positives, dtype=torch.float64)
        norms = rows.new_empty(rows.shape[0], dtype=torch.float32)
        state = own.new_empty(rows.shape[0], STATE + weights.positives)
        bank = anchors.contiguous()
        torch.ops.rime_fast_C.rank_begin(rows, bank, positive, weights.negative_code, own, norms, state)
        return own, norms, state

    def own_similarities(self, rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        found = rows.new_empty(rows.shape[0], own.shape[1], dtype=torch.float64)
        norms = rows.new_empty(rows.shape[0], dtype=torch.float32)
        first = torch.arange(0, own.shape[0] * own.shape[1], own.shape[1], device=rows.device)
        torch.ops.rime_fast_C.rank_begin(rows, own.flatten(0, 1).contiguous(), first, 0, found, norms, None)
        return found, norms

    def values(self, x: Tensor | None, format_ok: Tensor) -> Tensor | None:
        """Values [B, G] as the kernels read them: contiguous, of any usual dtype."""
        usual = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)
        if x is None or x.dtype not in usual:
            return super().values(x, format_ok)
        return x.expand_as(format_ok).contiguous()

    def small(self, gen: Tensor, anchors: Tensor, weights: RewardWeights) -> bool:
        """Whether ``score_small`` serves this call."""
        states = WARPS * (4 + weights.positives)
        room = 8 * (gen.shape[1] * (gen.shape[2] + weights.positives + states + 1) + 2)  # small_room of the kernels
        on_gpu = gen.is_cuda and anchors.is_cuda
        return on_gpu and gen.shape[1] * anchors.numel() <= SMALL and room <= SHARED_BYTES

    def score_small(
        self,
        rewards: Tensor,
        advantages: Tensor,
        terms: Tensor | None,
        gen: Tensor,
        anchors: Tensor,
        positive: Tensor,
        format_ok: Tensor,
        lengths: Tensor | None,
        disc_similarity: Tensor | None,
        negatives_mask: Tensor | None,
        weights: RewardWeights,
    ) -> None:
        """Compute all of score_rewrites_ in one CUDA launch; terms: None or [12, B, G], every plane of ``PLANES``."""
        mask = negatives_mask
        if mask is not None and mask.stride(1) != 1:
            mask = mask.contiguous()
        torch.ops.rime_fast_C.rank_small(
            gen.contiguous(),
            anchors.contiguous(),
            positive.contiguous(),
            mask,
            format_ok.contiguous(),
            self.values(lengths, format_ok),
            self.values(disc_similarity, format_ok),
            weights.positives,
            score_code(weights),
            weights.hit_k,
            weights.negative_code,
            weights.tau,
            weights.normalize_std,
            weights.w_fmt,
            weights.w_rank,
            weights.w_refine,
            weights.w_len,
            weights.length_limit,
            weights.eps,
            rewards,
            advantages,
            terms,
        )
