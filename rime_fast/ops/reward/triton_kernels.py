"""Triton kernel of score_rewrites_: one program a rollout walks its row of a tile of similarities.

Sweeps over the n columns in blocks of BLOCK, from L2 after the first: one a threshold for the ranks, one for the mean,
two for the softmax and the maximum. A block that holds similarities within the product's error of a threshold forms
those again as fp64 dot products (loads are masked to them). State and rules: csrc/rime/reward.h.
Bytes: (P + 1) 4 n a row; everything that is summed is fp64; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

MEAN, SOFTMAX, MAX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _block(sims, mask, j, columns, own, positives, MASKED: tl.constexpr):
    """Similarities of columns j and which of them are negatives: finite, allowed by the mask, not the item's own."""
    inside = j < columns
    value = tl.load(sims + j, mask=inside, other=float("nan"))
    finite = tl.abs(value.to(tl.float32)) <= 3.4028234e38
    negative = inside & finite & ((j < own) | (j >= own + positives))
    if MASKED:
        negative &= tl.load(mask + j, mask=inside, other=0) != 0
    return value, negative


@triton.jit
def _exact(gen, tile, j, wanted, width, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """fp64 dot products of the row with the wanted columns' anchors, 0 elsewhere."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, DEPTH):
        d = start + tl.arange(0, DEPTH)
        g = tl.load(gen + d, mask=d < width, other=0.0).to(tl.float64)
        a = tl.load(tile + j[:, None] * width + d[None, :], mask=wanted[:, None] & (d < width)[None, :], other=0.0)
        total += tl.sum(a.to(tl.float64) * g[None, :], axis=1)
    return total


@triton.jit
def _step(value, threshold):
    """What a similarity adds to a rank: 1 above the threshold, 1/2 at it, both as fp32 numbers."""
    rounded = value.to(tl.float32)
    return tl.where(rounded > threshold, 1.0, tl.where(rounded == threshold, 0.5, 0.0)).to(tl.float64)


@triton.jit
def rank_tile_kernel(
    sims,
    gen,
    tile,
    tile_norm,
    norms,
    own,
    positive,
    mask,
    state,
    columns,
    width,
    group_size,
    positives,
    first,
    mask_stride,
    slack,
    inverse_tau,
    NEGATIVE: tl.constexpr,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    item = row // group_size
    sims += row * columns
    gen += row * width
    mask += item * mask_stride
    own += row * positives
    state += row * (4 + positives)
    own_begin = tl.load(positive + item) - first
    band = slack * tl.load(norms + row) * tl.load(tile_norm) + 1e-37

    for p in range(0, positives):
        threshold = tl.load(own + p).to(tl.float32)
        rank = tl.zeros([BLOCK], tl.float64)
        for start in range(0, columns, BLOCK):
            j = start + tl.arange(0, BLOCK).to(tl.int64)
            value, negative = _block(sims, mask, j, columns, own_begin, positives, MASKED)
            if EXACT:
                rank += tl.where(negative, _step(value, threshold), 0.0)
            else:
                rank += tl.where(negative & (value > threshold + band), 1.0, 0.0).to(tl.float64)
                close = negative & (value >= threshold - band) & (value <= threshold + band)
                if tl.max(close.to(tl.int32), axis=0) > 0:
                    exact = _exact(gen, tile, j, close, width, BLOCK, DEPTH)
                    rank += tl.where(close, _step(exact, threshold), 0.0)
        tl.store(state + 4 + p, tl.load(state + 4 + p) + tl.sum(rank, axis=0))

    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    peaks = tl.full([BLOCK], float("-inf"), tl.float64)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        value, negative = _block(sims, mask, j, columns, own_begin, positives, MASKED)
        count += negative.to(tl.int32)
        if NEGATIVE == MEAN:
            total += tl.where(negative, value, 0.0).to(tl.float64)
        else:
            peaks = tl.where(negative & (value.to(tl.float64) > peaks), value.to(tl.float64), peaks)
    seen = tl.sum(count, axis=0)
    if seen > 0:
        tl.store(state, tl.load(state) + seen.to(tl.float64))
        before = tl.load(state + 1)
        if NEGATIVE == MEAN:
            tl.store(state + 1, before + tl.sum(total, axis=0))
        else:
            peak = tl.max(peaks, axis=0)
            weight = tl.zeros([BLOCK], tl.float64)
            best = tl.full([BLOCK], float("-inf"), tl.float64)
            for start in range(0, columns, BLOCK):
                j = start + tl.arange(0, BLOCK).to(tl.int64)
                value, negative = _block(sims, mask, j, columns, own_begin, positives, MASKED)
                if NEGATIVE == SOFTMAX:
                    wide = tl.where(negative, value, 0.0).to(tl.float64)
                    w = tl.exp(((wide - peak) * inverse_tau).to(tl.float32)).to(tl.float64)
                    w = tl.where(negative, w, 0.0)
                    weight += w
                    total += w * wide
                else:
                    top = negative & (value.to(tl.float64) >= peak - 2.0 * band)
                    if tl.max(top.to(tl.int32), axis=0) > 0:
                        if EXACT:
                            exact = value.to(tl.float64)
                        else:
                            exact = _exact(gen, tile, j, top, width, BLOCK, DEPTH)
                        best = tl.where(top & (exact > best), exact, best)
            if NEGATIVE == MAX:
                tl.store(state + 1, tl.maximum(before, tl.max(best, axis=0)))
            else:
                peak_now = tl.maximum(before, peak)
                old = tl.exp((before - peak_now) * inverse_tau)
                new = tl.exp((peak - peak_now) * inverse_tau)
                tl.store(state + 1, peak_now)
                tl.store(state + 2, tl.load(state + 2) * old + tl.sum(weight, axis=0) * new)
                tl.store(state + 3, tl.load(state + 3) * old + tl.sum(total, axis=0) * new)
