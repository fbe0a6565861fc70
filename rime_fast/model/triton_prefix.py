"""The kernel that merges the two passes of ``prefix_attention``: one read of both outputs, one write."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rime_fast.ops.dispatch import on_device_of


@triton.jit(do_not_specialize=["rows"])
def merge_passes_kernel(
    out_1, lse_1, out_2, lse_2, out, lse, rows, heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    """Merge one row: out [rows, heads, width] of both passes by their lse [heads, rows]."""
    row = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    live = h < heads
    at, keep = h * rows + row, live[:, None] & (d < width)[None, :]
    a, b = tl.load(lse_1 + at, mask=live, other=0.0), tl.load(lse_2 + at, mask=live, other=0.0)
    top = tl.maximum(a, b)
    total = top + tl.log(tl.exp(a - top) + tl.exp(b - top))
    place = (row * heads + h)[:, None] * width + d[None, :]
    merged = tl.load(out_1 + place, mask=keep, other=0.0).to(tl.float32) * tl.exp(a - total)[:, None]
    merged += tl.load(out_2 + place, mask=keep, other=0.0).to(tl.float32) * tl.exp(b - total)[:, None]
    tl.store(out + place, merged.to(out.dtype.element_ty), mask=keep)
    tl.store(lse + at, total, mask=live)


def merge_passes(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two softmaxes over disjoint keys: out [rows, heads, D] and lse [rows, heads] fp32 of each -> of both."""
    rows, heads, width = out_1.shape
    # contiguous, as the kernel writes it: flash keeps the order of its queries' strides, and so would empty_like
    out, lse = out_1.new_empty(out_1.shape), lse_1.new_empty(heads, rows)
    sides = (x.contiguous() for x in (out_1, lse_1.T, out_2, lse_2.T))
    with on_device_of(out):
        merge_passes_kernel[(rows,)](
            *sides,
            *(out, lse, rows, heads, width),
            HEADS=1 << (heads - 1).bit_length(),
            WIDTH=1 << (width - 1).bit_length(),
        )
    return out, lse.T
