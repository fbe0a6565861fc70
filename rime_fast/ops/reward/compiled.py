"""The steps of score_rewrites_ as calls of csrc's kernels (csrc/cpu and csrc/cuda rank_reward)."""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.reward.weights import RANK_REWARDS, TERM_NAMES, RewardWeights

PLANES = ("reward", "advantage", *TERM_NAMES)
# Banks up to this size are scored in one launch on a GPU, if what a block keeps fits its shared memory.
SMALL_ANCHORS, SHARED_BYTES, WARPS = 1024, 160 << 10, 8


def why_not(gen: Tensor) -> str | None:
    """The reason the compiled kernels cannot serve a call on their device, or None."""
    if gen.dtype == torch.float64:
        return "it works on fp32 products; float64 embeddings need backend='reference'"
    return native.why_not(cuda=gen.device.type == "cuda")


def why_not_cpu(gen: Tensor) -> str | None:
    """``why_not`` of the backend "chunked"."""
    return why_not(gen) if gen.device.type == "cpu" else f"it needs CPU tensors, got {gen.device.type}"


def why_not_cuda(gen: Tensor) -> str | None:
    """``why_not`` of the backend "cuda"."""
    return why_not(gen) if gen.device.type == "cuda" else f"it needs CUDA tensors, got {gen.device.type}"


def own_similarities(rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 similarities [R, P] of rows [R, D] to their items' anchors own [B, P, D], and the rows' norms [R]."""
    found = rows.new_empty(rows.shape[0], own.shape[1], dtype=torch.float64)
    norms = rows.new_empty(rows.shape[0])
    torch.ops.rime_fast_C.rank_own(rows, own.contiguous(), found, norms)
    return found, norms


def small(gen: Tensor, anchors: Tensor, weights: RewardWeights) -> bool:
    """Whether ``score_small`` serves this call."""
    states = WARPS * (4 + weights.positives)
    room = 8 * (gen.shape[1] * (gen.shape[2] + weights.positives + states + 1) + 2)  # small_room of the kernels
    on_gpu = gen.is_cuda and anchors.is_cuda
    return on_gpu and anchors.shape[0] <= SMALL_ANCHORS and room <= SHARED_BYTES


def score_small(
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
    """All of score_rewrites_ in one CUDA launch; terms: None or [12, B, G], every plane of ``PLANES``."""
    readable = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)

    def values(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return (x if x.dtype in readable else x.double()).expand_as(format_ok).contiguous()

    mask = negatives_mask
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    torch.ops.rime_fast_C.rank_small(
        gen.contiguous(),
        anchors.contiguous(),
        positive.contiguous(),
        mask,
        format_ok.contiguous(),
        values(lengths),
        values(disc_similarity),
        weights.positives,
        _score_code(weights),
        weights.hit_k,
        weights.negative_code,
        weights.softmax_temperature,
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


def _score_code(weights: RewardWeights) -> int:
    return len(RANK_REWARDS) if weights.mode == "ume_r1" else RANK_REWARDS.index(weights.rank_reward)


def scans(rows: Tensor) -> bool:
    """Whether ``add_anchors`` serves rows on this device: product and statistics in one kernel."""
    return rows.device.type == "cpu"


def add_anchors(
    rows: Tensor,
    anchors: Tensor,
    norms: Tensor,
    own: Tensor,
    positive: Tensor,
    mask: Tensor | None,
    first: int,
    weights: RewardWeights,
    state: Tensor,
) -> None:
    """Add the negatives among contiguous fp32 anchors [n, D] to ``state``; see ``add_tile``."""
    code, tau = weights.negative_code, weights.softmax_temperature
    torch.ops.rime_fast_C.rank_scan(rows, anchors, norms, own, positive, mask, first, code, tau, state)


def add_tile(
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
    state: Tensor,
) -> None:
    """Add the negatives of tile [n, D] to ``state``, by their similarities sims [R, n] (on the CPU: fp64).

    tile_norm [1]: the largest norm in the tile. mask [B, n] with unit column stride. first: the tile's place in the
    bank, of which ``positive`` speaks.
    """
    code, tau = weights.negative_code, weights.softmax_temperature
    torch.ops.rime_fast_C.rank_tile(sims, rows, tile, tile_norm, norms, own, positive, mask, first, code, tau, state)


def merge(parts: Tensor, state: Tensor, weights: RewardWeights) -> None:
    """Merge states [W, R, 4 + P] of disjoint parts of a bank into ``state``, in order."""
    torch.ops.rime_fast_C.rank_merge(parts.contiguous(), weights.negative_code, weights.softmax_temperature, state)


def finish(
    state: Tensor,
    own: Tensor,
    format_ok: Tensor,
    lengths: Tensor | None,
    disc_similarity: Tensor | None,
    weights: RewardWeights,
) -> Tensor:
    """Rewards, advantages and terms [12, B, G] fp32 from the states and the own similarities of all rollouts."""
    out = own.new_empty(len(PLANES), *format_ok.shape, dtype=torch.float32)
    torch.ops.rime_fast_C.rank_finish(
        state,
        own,
        format_ok.contiguous(),
        None if lengths is None else lengths.double().contiguous(),
        None if disc_similarity is None else disc_similarity.double().expand_as(format_ok).contiguous(),
        _score_code(weights),
        weights.hit_k,
        weights.negative_code,
        weights.normalize_std,
        weights.w_fmt,
        weights.w_rank,
        weights.w_refine,
        weights.w_len,
        weights.length_limit,
        weights.eps,
        out,
    )
    return out
