"""The compiled backend: library products of all rollouts with one tile of the bank, and row kernels over each tile.

    own        = gen . own anchors                                  fp64, one dot product per rollout
    for tile in bank:
        sims   = gen @ tile^T                                       fp32 [R, n], a buffer of at most BUFFER_BYTES
        state += ranks, count and sum | softmax | maximum           csrc rank_tile, one pass over sims
    rewards, advantages, terms = finish(state, own)                 csrc rank_finish

The products stay fp32 whatever the input dtype and torch's matmul precision setting. A bank of up to EXACT_ANCHORS is
multiplied in fp64: with so few negatives the product's rounding would not average out of their mean.
Memory: the buffer, one fp32 tile, and the state, 8 (4 + P) bytes a rollout. Work: 2 R A D FLOP and R A elements read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.reward.weights import NEGATIVES, RANK_REWARDS, TERM_NAMES, RewardWeights

BUFFER_BYTES = 2 << 20  # stays in the caches between the product and the pass over it
EXACT_ANCHORS = 256
MIN_COLUMNS, MAX_COLUMNS = 256, 16_384
STATE = 4  # csrc rank_reward.h: what a state holds before its ranks
PLANES = ("reward", "advantage", *TERM_NAMES)


def why_not(gen: Tensor) -> str | None:
    """The reason this backend cannot serve a call, or None."""
    if gen.dtype == torch.float64:
        return "it works on fp32 products; float64 embeddings need backend='reference'"
    if gen.device.type not in ("cpu", "cuda"):
        return f"no compiled kernels for {gen.device.type}"
    return native.why_not(cuda=gen.device.type == "cuda")


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 or bf16 inside fp32 products, whatever the user allows elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def negative_code(weights: RewardWeights) -> int:
    return 0 if weights.mode == "ume_r1" else NEGATIVES.index(weights.negative)


def own_anchors(anchors: Tensor, positive: Tensor, weights: RewardWeights, device: torch.device) -> Tensor:
    """[B, P, D] fp32 anchors of each item's own group, NaN where one lies outside the bank."""
    columns = positive[:, None] + torch.arange(weights.positives, device=positive.device)
    inside = (columns >= 0) & (columns < anchors.shape[0])
    index = columns.clamp(0, anchors.shape[0] - 1).to(anchors.device)
    found = anchors[index].to(device, torch.float32)
    return found.masked_fill(~inside[:, :, None].to(device), torch.nan)


def score(
    gen: Tensor,
    anchors: Tensor,
    positive: Tensor,
    format_ok: Tensor,
    lengths: Tensor | None,
    disc_similarity: Tensor | None,
    negatives_mask: Tensor | None,
    weights: RewardWeights,
) -> Tensor:
    """[12, B, G] fp32: reward, advantage and the terms in the order of ``PLANES``; arguments as in score_rewrites_."""
    rows = gen.flatten(0, 1).float().contiguous()
    own, norms = own_similarities(rows, own_anchors(anchors, positive, weights, gen.device))
    exact = anchors.shape[0] <= EXACT_ANCHORS
    state = scan(rows, norms, own, anchors, positive, negatives_mask, weights, exact=exact)
    return finish(state, own, format_ok, lengths, disc_similarity, weights)


def own_similarities(rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 similarities [R, P] of rows [R, D] to their items' anchors own [B, P, D], and the rows' norms [R]."""
    found = rows.new_empty(rows.shape[0], own.shape[1], dtype=torch.float64)
    norms = rows.new_empty(rows.shape[0])
    torch.ops.rime_fast_C.rank_own(rows, own.contiguous(), found, norms)
    return found, norms


def scan(
    rows: Tensor,
    norms: Tensor,
    own: Tensor,
    anchors: Tensor,
    positive: Tensor,
    negatives_mask: Tensor | None,
    weights: RewardWeights,
    *,
    exact: bool,
) -> Tensor:
    """State [R, 4 + P] fp64 of rows [R, D] over anchors [A, D], tile by tile; ``positive`` counts from their first."""
    state = initial_state(rows, weights)
    if negatives_mask is not None and negatives_mask.stride(1) != 1:
        negatives_mask = negatives_mask.contiguous()
    dtype = torch.float64 if exact else torch.float32
    columns = max(MIN_COLUMNS, min(MAX_COLUMNS, BUFFER_BYTES // (dtype.itemsize * rows.shape[0])))
    columns = min(columns, anchors.shape[0])
    buffer = rows.new_empty(rows.shape[0] * columns, dtype=dtype)
    factor = rows.to(dtype)
    with full_precision():
        for first, tile in tiles(anchors, columns, rows.device):
            sims = buffer[: rows.shape[0] * tile.shape[0]].view(rows.shape[0], tile.shape[0])
            torch.mm(factor, tile.to(dtype).T, out=sims)
            mask = None if negatives_mask is None else negatives_mask[:, first : first + tile.shape[0]]
            torch.ops.rime_fast_C.rank_tile(
                sims, rows, tile, torch.linalg.vector_norm(tile, dim=1), norms, own, positive, mask,
                first, negative_code(weights), weights.softmax_temperature, state,
            )  # fmt: skip
    return state


def initial_state(rows: Tensor, weights: RewardWeights) -> Tensor:
    state = rows.new_zeros(rows.shape[0], STATE + weights.positives, dtype=torch.float64)
    if NEGATIVES[negative_code(weights)] != "mean":
        state[:, 1] = -torch.inf
    return state


def merge(parts: Tensor, state: Tensor, weights: RewardWeights) -> None:
    """Merge states [W, R, 4 + P] of disjoint parts of a bank into ``state``, in order."""
    code, tau = negative_code(weights), weights.softmax_temperature
    torch.ops.rime_fast_C.rank_merge(parts.contiguous(), code, tau, state)


def tiles(anchors: Tensor, columns: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, fp32 tile on ``device``) over the bank.

    A bank in host memory is copied one tile ahead of its use: with pinned memory the copies run beside the products.
    """
    starts = range(0, anchors.shape[0], columns)
    if anchors.device == device:
        for first in starts:
            yield first, anchors[first : first + columns].float().contiguous()
        return
    ahead = torch.cuda.Stream(device)
    current = torch.cuda.current_stream(device)

    def fetch(first: int) -> Tensor:
        with torch.cuda.stream(ahead):
            return anchors[first : first + columns].to(device, non_blocking=True)

    following = fetch(0)
    for first in starts:
        current.wait_stream(ahead)
        tile = following
        tile.record_stream(current)
        if first + columns < anchors.shape[0]:
            following = fetch(first + columns)
        yield first, tile.float()


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
        state, own, format_ok.contiguous(),
        None if lengths is None else lengths.double().contiguous(),
        None if disc_similarity is None else disc_similarity.double().expand_as(format_ok).contiguous(),
        len(RANK_REWARDS) if weights.mode == "ume_r1" else RANK_REWARDS.index(weights.rank_reward),
        weights.hit_k, negative_code(weights), weights.normalize_std,
        weights.w_fmt, weights.w_rank, weights.w_refine, weights.w_len, weights.length_limit, weights.eps, out,
    )  # fmt: skip
    return out
