"""Triton kernels that meet no product: merged statistics, read-outs, what the gradient of the hidden states starts as.

row_statistics_kernel  a row of logits -> lse, target logit, entropy; reads it once
row_gradient_kernel    a row of logits -> its gradient in the row's own memory; reads and writes it once
merge_kernel           a row's splits in ascending order -> lse, target logit, entropy
read_out               a span's rows summed in order, then the norm; a part of forward_kernel (triton_kernels.py)
read_outs_kernel       the same in a launch of its own, for library products
start_gradient_kernel  a tile of the gradient, walking all read-outs in order: spans that share rows add up in one fixed
                       order without atomics. Bytes: the gradient once (twice with a factor that is not 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON: tl.constexpr = tl.constexpr(1e-12)  # reference.EPSILON
BLOCK: tl.constexpr = tl.constexpr(1024)


@triton.jit
def tanh(x):
    """Compute tanh by exp; the Taylor series near 0 keeps the relative accuracy (csrc/rime/math.h has the same)."""
    s = x * x
    series = x + x * s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def _scores(row, columns, inside, bias, softcap, inv_temperature):
    """z of some columns of a row; -inf outside."""
    z = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0)
    if softcap is not None:
        cap = tl.load(softcap)
        z = cap * tanh(z / cap)
    return tl.where(inside, z * inv_temperature, float("-inf"))


@triton.jit
def _store_lse(lse, row, length, top, log_total, mask):
    """lse = top + log_total, and what its rounding loses (rows.py)."""
    high = top + log_total
    part = high - top
    tl.store(lse + row, high, mask=mask)
    tl.store(lse + length + row, (top - (high - part)) + (log_total - part), mask=mask)


@triton.jit(do_not_specialize=["length"])
def row_statistics_kernel(
    logits,
    bias,
    temperature,
    softcap,
    targets,
    lse,
    target_logit,
    entropy,
    length,
    stride,
    vocabulary,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of rows of logits [length, V], a program a row; every lane has a running sum of its own."""
    r = tl.program_id(0)
    row = logits + tl.cast(r, tl.int64) * stride
    inv_temperature = 1.0 / tl.load(temperature)
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        columns = first + lanes
        z = _scores(row, columns, columns < vocabulary, bias, softcap, inv_temperature)
        new_top = tl.maximum(top, z)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        old, new = tl.exp(top - base), tl.exp(z - base)
        if ENTROPY:
            weighted = tl.where(old == 0.0, 0.0, old * (weighted + (top - base) * total))
            weighted += tl.where(new == 0.0, 0.0, new * (z - base))
        total = old * total + new
        top = new_top
    highest = tl.max(top, axis=0)
    share = tl.exp(top - highest)
    if ENTROPY:
        weighted = tl.where(share == 0.0, 0.0, share * (weighted + (top - highest) * total))
    whole = tl.sum(share * total, axis=0)
    log_total = tl.log(whole)
    _store_lse(lse, r, length, highest, log_total, True)
    target = tl.load(targets + r)
    there = (target >= 0) & (target < vocabulary)
    found = tl.where(there, _scores(row, target, there, bias, softcap, inv_temperature), 0.0)
    tl.store(target_logit + r, found)
    if ENTROPY:
        tl.store(entropy + r, log_total - tl.sum(weighted, axis=0) / whole)


@triton.jit(do_not_specialize=["length"])
def row_gradient_kernel(
    logits,
    bias,
    temperature,
    softcap,
    targets,
    lse,
    target_logit,
    entropy,
    grad_logp,
    grad_entropy,
    out,
    products,
    length,
    stride,
    out_stride,
    vocabulary,
    BLOCK: tl.constexpr,
):
    """The gradient of rows of logits, written to ``out``, the same memory as ``logits`` in their dtype or a narrower
    one; products [length]: sum_v dz_v (z_v - z[target])."""
    r = tl.program_id(0)
    row, results = logits + tl.cast(r, tl.int64) * stride, out + tl.cast(r, tl.int64) * out_stride
    target, g, centre = tl.load(targets + r), tl.load(grad_logp + r), tl.load(target_logit + r)
    high, low = tl.load(lse + r), tl.load(lse + length + r)
    mean, h = None, None
    if grad_entropy is not None:
        mean, h = tl.load(entropy + r), tl.load(grad_entropy + r)
    inv_temperature = 1.0 / tl.load(temperature)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        columns = first + lanes
        inside = columns < vocabulary
        z = _scores(row, columns, inside, bias, softcap, inv_temperature)
        shifted = (z - high) - low
        p = tl.exp(shifted)
        dz = tl.where(columns == target, g, 0.0) - g * p
        if h is not None:
            slope = tl.where(p == 0.0, p, p * (shifted + mean))
            dz -= h * slope
        total += tl.where(dz == 0.0, dz, dz * (z - centre))
        dlogits = dz * inv_temperature
        if softcap is not None:
            t = z / (inv_temperature * tl.load(softcap))
            dlogits *= 1.0 - t * t
        # Narrow results lie over columns that other threads read in this step or in the one before.
        tl.debug_barrier()
        tl.store(results + columns, dlogits.to(results.dtype.element_ty), mask=inside)
    tl.store(products + r, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["capacity", "length"])
def merge_kernel(
    partial, order, count, lse, target_logit, entropy, capacity, length, splits, BM: tl.constexpr, ENTROPY: tl.constexpr
):
    """Statistics at the rows' own places in lse [2, T], target_logit [T], entropy [T]; ``length`` is T."""
    rows_live = tl.load(count)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rows < rows_live
    plane = splits * capacity
    top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    weighted = tl.zeros((BM,), dtype=tl.float32)
    found = tl.zeros((BM,), dtype=tl.float32)
    for split in range(splits):
        at = partial + split * capacity + rows
        here = tl.load(at, mask=live, other=0.0)
        new_top = tl.maximum(top, here)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        old, new = tl.exp(top - base), tl.exp(here - base)
        part = tl.load(at + plane, mask=live, other=1.0)
        if ENTROPY:
            own = tl.load(at + 2 * plane, mask=live, other=0.0)
            kept = tl.where(old == 0.0, 0.0, old * (weighted + (top - base) * total))
            weighted = kept + tl.where(new == 0.0, 0.0, new * (own + (here - base) * part))
        total = old * total + new * part
        top = new_top
        found += tl.load(at + 3 * plane, mask=live, other=0.0)
    row = tl.load(order + rows, mask=live, other=0)
    log_total = tl.log(total)
    _store_lse(lse, row, length, top, log_total, live)
    tl.store(target_logit + row, found, mask=live)
    if ENTROPY:
        tl.store(entropy + row, log_total - weighted / total, mask=live)


@triton.jit
def read_out(k, hidden, starts, ends, embeddings, inv_norm, width, stride, NORMALIZE: tl.constexpr):
    """Embedding k: the mean of its rows, and with NORMALIZE its direction."""
    first, last = tl.load(starts + k), tl.load(ends + k)
    out = embeddings + tl.cast(k, tl.int64) * width
    share = 1.0 / (last - first).to(tl.float32)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for c in range(0, width, BLOCK):
        columns = c + tl.arange(0, BLOCK)
        inside = columns < width
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        row = first
        while row < last:
            total += tl.load(hidden + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
            row += 1
        total *= share
        squares += total * total
        tl.store(out + columns, total, mask=inside)
    scale = 1.0
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(squares, axis=0))
        scale = 1.0 / tl.where(norm < EPSILON, EPSILON, norm)  # a NaN stays one
        for c in range(0, width, BLOCK):
            columns = c + tl.arange(0, BLOCK)
            mean = tl.load(out + columns, mask=columns < width, other=0.0)
            tl.store(out + columns, mean * scale, mask=columns < width)
    tl.store(inv_norm + k, scale)


@triton.jit
def read_outs_kernel(hidden, starts, ends, embeddings, inv_norm, width, stride, NORMALIZE: tl.constexpr):
    read_out(tl.program_id(0), hidden, starts, ends, embeddings, inv_norm, width, stride, NORMALIZE)


@triton.jit(do_not_specialize=["read_outs", "length"])
def start_gradient_kernel(
    out, factor, rows, starts, ends, read_outs, length, width, stride, BT: tl.constexpr, BC: tl.constexpr
):
    """Start the gradient of hidden: out [T, H] <- factor out (0 without one) + the rows [K, H] of the spans; nothing is
    touched where that is out."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    at = out + t.to(tl.int64)[:, None] * stride + columns[None, :]
    scale = 1.0
    if factor is not None:
        scale = tl.load(factor).to(tl.float32)
        if rows is None:
            length = tl.where(scale == 1.0, 0, length)
    keep = (t < length)[:, None] & (columns < width)[None, :]
    acc = tl.zeros((BT, BC), dtype=tl.float32)
    if factor is not None:
        acc = tl.load(at, mask=keep, other=0.0).to(tl.float32) * scale
    if rows is not None:
        for k in range(read_outs):
            first, last = tl.load(starts + k), tl.load(ends + k)
            inside = (t >= first) & (t < last)
            row = tl.load(rows + k * width + columns, mask=columns < width, other=0.0)
            acc += tl.where(inside[:, None], row[None, :], 0.0)
    tl.store(at, acc.to(out.dtype.element_ty), mask=keep)
