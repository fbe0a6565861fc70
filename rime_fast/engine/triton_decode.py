"""Kernels of a decode step: one new token a row against the keys of its prompt and its own; norms; the gated product.

attention_kernel   its first programs take a prompt's keys: a block of the rows that share them (G rollouts x the heads
                   of one key head) and a stretch of the keys. Its last take a row's own tokens: they turn the new key
                   by its position, write it and the new value to the cache, and attend to what is there.
merge_kernel       the softmaxes of all stretches, merged
add_norm_kernel    residual + x, and its RMS norm
gated_kernel       silu(gate) * up

Arithmetic is fp32; each result is rounded once, to its dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turned(rows, half, live, cos, sin, weight, eps, HALF: tl.constexpr):
    """Load heads at ``rows`` [R], normalise them where there is a weight, and turn them by cos and sin [R, 2 HALF]:
    both halves, fp32."""
    mask = live[:, None]
    low = tl.load(rows[:, None] + half[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(rows[:, None] + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
    if weight is not None:
        mean = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        low *= scale * tl.load(weight + half).to(tl.float32)[None, :]
        high *= scale * tl.load(weight + HALF + half).to(tl.float32)[None, :]
    cos_low = tl.load(cos[:, None] + half[None, :], mask=mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin[:, None] + half[None, :], mask=mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos[:, None] + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin[:, None] + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
    return low * cos_low - high * sin_low, high * cos_high + low * sin_high


@triton.jit
def _attend(
    low, high, keys, values, begin, end, scale, peak, total, acc, half, wide, HALF: tl.constexpr, BN: tl.constexpr
):
    """Go on with an online softmax over keys begin .. end - 1 (rows of 2 HALF)."""
    for first in range(begin, end, BN):
        at = first + tl.arange(0, BN)
        inside = at < end
        place = at.to(tl.int64)[:, None] * (2 * HALF)
        k_low = tl.load(keys + place + half[None, :], mask=inside[:, None], other=0.0)
        k_high = tl.load(keys + place + HALF + half[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(low, tl.trans(k_low), input_precision="ieee")
        scores = tl.dot(high, tl.trans(k_high), scores, input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        new = tl.maximum(peak, tl.max(scores, axis=1))
        share = tl.exp(scores - new[:, None])
        less = tl.exp(peak - new)
        v = tl.load(values + place + wide[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(share.to(v.dtype), v, acc * less[:, None], input_precision="ieee")
        total = total * less + tl.sum(share, axis=1)
        peak = new
    return peak, total, acc


@triton.jit
def _to_prompt(
    program, q, cos, sin, weight, eps, prompt_keys, prompt_values, lengths, partial, peaks, totals, scale, longest,
    stretch, GROUP: tl.constexpr, SHARED: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A block of the rows of one prompt and key head against one stretch of its keys."""
    D: tl.constexpr = 2 * HALF
    half, wide = tl.arange(0, HALF), tl.arange(0, D)
    split = program % SPLITS
    rows = program // SPLITS % ROW_BLOCKS * BM + tl.arange(0, BM)
    kv = program // (SPLITS * ROW_BLOCKS) % KV
    prompt = program // (SPLITS * ROW_BLOCKS * KV)
    live = rows < GROUP * SHARED
    n = (prompt * GROUP + rows // SHARED).to(tl.int64)
    head = n * (KV * SHARED) + kv * SHARED + rows % SHARED
    low, high = _turned(q + head * D, half, live, cos + n * D, sin + n * D, weight, eps, HALF)
    offset = (prompt * KV + kv).to(tl.int64) * longest * D
    begin = split * stretch
    end = tl.minimum(begin + stretch, tl.load(lengths + prompt))
    peak = tl.full((BM,), -1e30, tl.float32)  # finite: a stretch past the prompt's end has no key
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    low, high = low.to(prompt_keys.dtype.element_ty), high.to(prompt_keys.dtype.element_ty)
    keys, values = prompt_keys + offset, prompt_values + offset
    peak, total, acc = _attend(low, high, keys, values, begin, end, scale, peak, total, acc, half, wide, HALF, BN)
    slot = head * (1 + SPLITS) + 1 + split
    tl.store(partial + slot[:, None] * D + wide[None, :], acc, mask=live[:, None])
    tl.store(peaks + slot, peak, mask=live)
    tl.store(totals + slot, total, mask=live)


@triton.jit
def _to_own(
    program, q, k, v, cos, sin, q_weight, k_weight, eps, own_keys, own_values, at, partial, peaks, totals, scale,
    capacity, SHARED: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr, BO: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One row and key head against the row's own tokens; puts the new one into the cache."""
    D: tl.constexpr = 2 * HALF
    half, wide, one = tl.arange(0, HALF), tl.arange(0, D), tl.arange(0, 1)
    row, kv = (program // KV).to(tl.int64), program % KV
    shared = tl.arange(0, BO)
    live = shared < SHARED
    n = row + tl.zeros((BO,), tl.int64)
    head = n * (KV * SHARED) + kv * SHARED + shared
    low, high = _turned(q + head * D, half, live, cos + n * D, sin + n * D, q_weight, eps, HALF)
    own = row * KV + kv
    place = (row + one) * D
    new_low, new_high = _turned(k + (own + one) * D, half, one < 1, cos + place, sin + place, k_weight, eps, HALF)
    dtype = own_keys.dtype.element_ty
    low, high, new_low, new_high = low.to(dtype), high.to(dtype), new_low.to(dtype), new_high.to(dtype)
    step = tl.load(at).to(tl.int32)
    keys, values = own_keys + own * capacity * D, own_values + own * capacity * D
    new_key = keys + (step + one)[:, None] * D + half[None, :]
    tl.store(new_key, new_low)
    tl.store(new_key + HALF, new_high)
    value = tl.load(v + own * D + wide).to(own_values.dtype.element_ty)
    tl.store(values + step * D + wide, value)
    peak = tl.sum(low.to(tl.float32) * new_low.to(tl.float32), axis=1)
    peak = (peak + tl.sum(high.to(tl.float32) * new_high.to(tl.float32), axis=1)) * scale
    total = tl.full((BO,), 1.0, tl.float32)
    acc = tl.zeros((BO, D), tl.float32) + value.to(tl.float32)[None, :]
    peak, total, acc = _attend(low, high, keys, values, 0, step, scale, peak, total, acc, half, wide, HALF, BN)
    slot = head * (1 + SPLITS)
    tl.store(partial + slot[:, None] * D + wide[None, :], acc, mask=live[:, None])
    tl.store(peaks + slot, peak, mask=live)
    tl.store(totals + slot, total, mask=live)


@triton.jit(do_not_specialize=["prompt_programs", "longest", "capacity", "stretch"])
def attention_kernel(
    q, k, v, cos, sin, q_weight, k_weight, eps, prompt_keys, prompt_values, lengths, own_keys, own_values, at, partial,
    peaks, totals, scale, prompt_programs, longest, capacity, stretch, GROUP: tl.constexpr, SHARED: tl.constexpr,
    KV: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr, ROW_BLOCKS: tl.constexpr, BM: tl.constexpr,
    BO: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attend with one new token a row: q [N, KV SHARED, D], k and v [N, KV, D] as projected, cos and sin [N, D].

    prompt_keys [B, KV, longest, D], own_keys [N, KV, capacity, D], values alike; at: the new token's slot. Writes
    partial [N, heads, 1 + SPLITS, D] and peaks, totals [N, heads, 1 + SPLITS], fp32.
    """
    program = tl.program_id(0)
    if program < prompt_programs:
        _to_prompt(
            program, q, cos, sin, q_weight, eps, prompt_keys, prompt_values, lengths, partial, peaks, totals, scale,
            longest, stretch, GROUP, SHARED, KV, HALF, SPLITS, ROW_BLOCKS, BM, BN,
        )  # fmt: skip
    else:
        _to_own(
            program - prompt_programs, q, k, v, cos, sin, q_weight, k_weight, eps, own_keys, own_values, at, partial,
            peaks, totals, scale, capacity, SHARED, KV, HALF, SPLITS, BO, BN,
        )  # fmt: skip


@triton.jit
def merge_kernel(partial, peaks, totals, out, SLOTS: tl.constexpr, D: tl.constexpr):
    """Merge partial [.., SLOTS, D] into out [.., D], one program a row and head."""
    head = tl.program_id(0).to(tl.int64)
    slot, wide = tl.arange(0, SLOTS), tl.arange(0, D)
    peak = tl.load(peaks + head * SLOTS + slot)
    share = tl.exp(peak - tl.max(peak, axis=0))
    total = tl.sum(share * tl.load(totals + head * SLOTS + slot), axis=0)
    place = partial + (head * SLOTS + slot)[:, None] * D + wide[None, :]
    acc = tl.sum(share[:, None] * tl.load(place), axis=0)
    tl.store(out + head * D + wide, (acc / total).to(out.dtype.element_ty))


@triton.jit
def add_norm_kernel(x, more, weight, total, out, eps, width, BLOCK: tl.constexpr):
    """Write, one program a row, total <- x + more (where there is more), out <- total / rms(total) * weight."""
    row = tl.program_id(0).to(tl.int64) * width
    c = tl.arange(0, BLOCK)
    inside = c < width
    value = tl.load(x + row + c, mask=inside, other=0.0).to(tl.float32)
    if more is not None:
        value += tl.load(more + row + c, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row + c, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    value *= scale * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + c, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    """Write out <- silu(gate) * up."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, (g * u / (1.0 + tl.exp(-g))).to(out.dtype.element_ty), mask=inside)
