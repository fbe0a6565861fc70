"""Triton kernels between rows and places (places.py): the scored rows one after the other, and the way back.

places_kernel   which row and target every place has
gather_kernel   the rows of a matrix at their places, 0 past the scored ones
scatter_kernel  the way back
pick_kernel     statistics and upstream gradients of the rows at their places
spread_kernel   the way back
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "capacity", "places", "ignore_index", "vocab_start", "stride"])
def places_kernel(
    targets,
    weight,
    order,
    local,
    slope,
    number,
    length,
    capacity,
    places,
    ignore_index,
    vocab_start,
    stride,
    BLOCK: tl.constexpr,
):
    """One program: order [places] = the scored rows, ascending, then ``length``; local = their targets - vocab_start,
    then -1; slope (or None) = -weight there (None: -1), then 0; number = how many there are. Scored rows past
    ``capacity`` are left out."""
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros((), dtype=tl.int32)
    for first in range(0, length, BLOCK):
        row = first + lanes
        target = tl.load(targets + row, mask=row < length, other=ignore_index)
        scored = (row < length) & (target != ignore_index)
        place = found + tl.cumsum(scored.to(tl.int32), axis=0) - 1
        found += tl.sum(scored.to(tl.int32), axis=0)
        kept = scored & (place < capacity)
        tl.store(order + place, row.to(tl.int64), mask=kept)
        tl.store(local + place, target - vocab_start, mask=kept)
        if slope is not None:
            value = tl.full((BLOCK,), 1.0, dtype=tl.float32)
            if weight is not None:
                value = tl.load(weight + row.to(tl.int64) * stride, mask=kept, other=0.0).to(tl.float32)
            tl.store(slope + place, -value, mask=kept)
    found = tl.minimum(found, capacity)
    tl.store(number, found)
    for first in range(0, places, BLOCK):
        place = first + lanes
        past = (place >= found) & (place < places)
        tl.store(order + place, tl.full((BLOCK,), 0, dtype=tl.int64) + length, mask=past)
        tl.store(local + place, tl.full((BLOCK,), -1, dtype=tl.int64), mask=past)
        if slope is not None:
            tl.store(slope + place, tl.zeros((BLOCK,), dtype=tl.float32), mask=past)


@triton.jit(do_not_specialize=["places", "length"])
def gather_kernel(rows_of, order, out, places, length, width, stride, stride_out, BR: tl.constexpr, BC: tl.constexpr):
    """Gather rows: out [places, width] = rows_of[order] in out's dtype, 0 where ``order`` is ``length`` or more."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = columns < width
    at = tl.load(order + rows, mask=rows < places, other=length)
    live = at < length
    found = tl.load(rows_of + at[:, None] * stride + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0)
    place = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=(rows < places)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["places", "length"])
def scatter_kernel(rows_of, order, out, places, length, width, stride, stride_out, BR: tl.constexpr, BC: tl.constexpr):
    """The way back: out[order] = rows_of [places, width] where ``order`` is below ``length``."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    at = tl.load(order + rows, mask=rows < places, other=length)
    keep = (at < length)[:, None] & (columns < width)[None, :]
    found = tl.load(rows_of + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=keep, other=0.0)
    tl.store(out + at[:, None] * stride_out + columns[None, :], found.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["places", "length", "stride", "entropy_stride"])
def pick_kernel(
    order,
    lse,
    target_logit,
    entropy,
    grad_logp,
    grad_entropy,
    lse_out,
    target_logit_out,
    entropy_out,
    grad_logp_out,
    grad_entropy_out,
    places,
    length,
    stride,
    entropy_stride,
    BLOCK: tl.constexpr,
):
    """Statistics and upstream gradients of rows at their places; from ``length`` on lse = inf, the rest 0."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < places
    at = tl.load(order + place, mask=inside, other=length)
    live = at < length
    tl.store(lse_out + place, tl.load(lse + at, mask=live, other=float("inf")), mask=inside)
    tl.store(lse_out + places + place, tl.load(lse + length + at, mask=live, other=0.0), mask=inside)
    tl.store(target_logit_out + place, tl.load(target_logit + at, mask=live, other=0.0), mask=inside)
    g = tl.load(grad_logp + at * stride, mask=live, other=0.0)
    tl.store(grad_logp_out + place, g.to(tl.float32), mask=inside)
    if grad_entropy is not None:
        tl.store(entropy_out + place, tl.load(entropy + at, mask=live, other=0.0), mask=inside)
        h = tl.load(grad_entropy + at * entropy_stride, mask=live, other=0.0)
        tl.store(grad_entropy_out + place, h.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["places", "length"])
def spread_kernel(
    order,
    lse,
    target_logit,
    entropy,
    lse_out,
    target_logit_out,
    entropy_out,
    places,
    length,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The way back of what a forward finds: statistics of places at their rows."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(order + place, mask=place < places, other=length)
    live = at < length
    tl.store(lse_out + at, tl.load(lse + place, mask=live, other=0.0), mask=live)
    tl.store(lse_out + length + at, tl.load(lse + places + place, mask=live, other=0.0), mask=live)
    tl.store(target_logit_out + at, tl.load(target_logit + place, mask=live, other=0.0), mask=live)
    if ENTROPY:
        tl.store(entropy_out + at, tl.load(entropy + place, mask=live, other=0.0), mask=live)
