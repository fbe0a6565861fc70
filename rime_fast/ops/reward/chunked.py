"""The streaming computation: similarities of all rollouts to one tile of the bank at a time, and a kernel over each.

    own        = gen . own anchors                                  fp64, one dot product per rollout
    for tile in bank:
        sims   = gen @ tile^T                                       fp32 [R, n], a buffer of at most BUFFER_BYTES
        state += ranks, count and sum | softmax | maximum           one kernel over sims
    rewards, advantages, terms = finish(state, own)

On the CPU product and statistics are one kernel (csrc/cpu/rank_reward_scan.cpp) that keeps no similarities, and a bank
in fp32 is one tile. The kernels come from an engine: ``compiled`` (csrc, CPU or CUDA) or ``triton_backend``. The
products stay fp32 whatever the input dtype and torch's matmul precision setting. A bank of up to EXACT_ANCHORS is
multiplied in fp64: with so few negatives the product's rounding would not average out of their mean.
Memory: the buffer, one fp32 tile, and the state, 8 (4 + P) bytes a rollout. Work: 2 R A D FLOP and R A elements read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from rime_fast.ops.reward import compiled
from rime_fast.ops.reward.weights import NEGATIVES, RewardWeights

BUFFER_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}  # a CPU's stays in its caches until the kernel has read it
CAST_BYTES = 8 << 20  # of fp32 at a time, where the CPU's bank has another dtype or is strided
EXACT_ANCHORS = 256
MIN_COLUMNS, MAX_COLUMNS = 256, 16_384
STATE = 4  # csrc rank_reward.h: what a state holds before its ranks


class Engine(Protocol):
    """What a set of kernels provides; shapes and meaning in compiled.py."""

    def own_similarities(self, rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]: ...

    def scans(self, rows: Tensor) -> bool: ...

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
        state: Tensor,
    ) -> None: ...

    def merge(self, parts: Tensor, state: Tensor, weights: RewardWeights) -> None: ...

    def finish(
        self,
        state: Tensor,
        own: Tensor,
        format_ok: Tensor,
        lengths: Tensor | None,
        disc_similarity: Tensor | None,
        weights: RewardWeights,
    ) -> Tensor: ...


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 or bf16 inside fp32 products, whatever the user allows elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def own_similarities(
    engine: Engine, rows: Tensor, anchors: Tensor, positive: Tensor, weights: RewardWeights
) -> tuple[Tensor, Tensor]:
    """[R, P] fp64 similarities to each item's own anchors, NaN where one lies outside the bank; norms [R] of rows."""
    columns = positive[:, None] + torch.arange(weights.positives, device=positive.device)
    inside = (columns >= 0) & (columns < anchors.shape[0])
    index = columns.clamp(0, anchors.shape[0] - 1).to(anchors.device)
    found, norms = engine.own_similarities(rows, anchors[index].to(rows.device, torch.float32))
    grouped = found.view(len(positive), -1, weights.positives)
    grouped.masked_fill_(~inside[:, None, :], torch.nan)
    return found, norms


def score(
    engine: Engine,
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
    own, norms = own_similarities(engine, rows, anchors, positive, weights)
    exact = anchors.shape[0] <= EXACT_ANCHORS
    state = scan(engine, rows, norms, own, anchors, positive, negatives_mask, weights, exact=exact)
    return engine.finish(state, own, format_ok, lengths, disc_similarity, weights)


def scan(
    engine: Engine,
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
    if not exact and engine.scans(rows):
        whole = anchors.dtype == torch.float32 and anchors.is_contiguous()
        columns = anchors.shape[0] if whole else max(1, CAST_BYTES // (4 * anchors.shape[1]))
        for first, tile in tiles(anchors, columns, rows.device):
            mask = None if negatives_mask is None else negatives_mask[:, first : first + tile.shape[0]]
            compiled.add_anchors(rows, tile, norms, own, positive, mask, first, weights, state)
        return state
    dtype = torch.float64 if exact else torch.float32
    columns = BUFFER_BYTES[rows.device.type] // (dtype.itemsize * rows.shape[0])
    columns = min(max(MIN_COLUMNS, min(MAX_COLUMNS, columns)), anchors.shape[0])
    buffer = rows.new_empty(rows.shape[0] * columns, dtype=dtype)
    factor = rows.to(dtype)
    with full_precision():
        for first, tile in tiles(anchors, columns, rows.device):
            sims = buffer[: rows.shape[0] * tile.shape[0]].view(rows.shape[0], tile.shape[0])
            torch.mm(factor, tile.to(dtype).T, out=sims)
            mask = None if negatives_mask is None else negatives_mask[:, first : first + tile.shape[0]]
            norm = torch.linalg.vector_norm(tile, dim=1).nan_to_num_(0.0, 0.0).amax(0, keepdim=True)
            engine.add_tile(sims, rows, tile, norm, norms, own, positive, mask, first, weights, state)
    return state


def initial_state(rows: Tensor, weights: RewardWeights) -> Tensor:
    """The state [R, 4 + P] of rows that have met no anchor."""
    state = rows.new_zeros(rows.shape[0], STATE + weights.positives, dtype=torch.float64)
    if NEGATIVES[weights.negative_code] != "mean":
        state[:, 1] = -torch.inf
    return state


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
