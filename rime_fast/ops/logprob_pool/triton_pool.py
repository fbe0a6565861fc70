"""Read-outs on Triton, for CUDA installations without csrc: the algorithm of csrc/cuda/pool.cu, no synchronisation.

pool_forward_kernel   one program a read-out: the span's rows summed in order, then the norm.
pool_along_kernel     one program a read-out: e . g of the backward and the factor inv_norm / (end - start).
pool_add_kernel       one program per band of columns walks all read-outs in order: spans that share rows add up in one
                      fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 128


@triton.jit
def pool_forward_kernel(
    hidden,
    starts,
    ends,
    pooled,
    inv_norm,
    width,
    stride,
    FLOOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + k), tl.load(ends + k)
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
        tl.store(pooled + k * width + columns, total, mask=inside)
    scale = 1.0
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(squares, axis=0))
        scale = 1.0 / tl.where(norm < FLOOR, FLOOR, norm)  # a NaN stays one
        for c in range(0, width, BLOCK):
            columns = c + tl.arange(0, BLOCK)
            at = pooled + k * width + columns
            tl.store(at, tl.load(at, mask=columns < width, other=0.0) * scale, mask=columns < width)
    tl.store(inv_norm + k, scale)


@triton.jit
def pool_along_kernel(
    grad,
    pooled,
    inv_norm,
    starts,
    ends,
    along,
    factor,
    width,
    FLOOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    scale = tl.load(inv_norm + k)
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    for c in range(0, width, BLOCK):
        columns = c + tl.arange(0, BLOCK)
        g = tl.load(grad + k * width + columns, mask=columns < width, other=0.0)
        dot += g * tl.load(pooled + k * width + columns, mask=columns < width, other=0.0)
    total = tl.sum(dot, axis=0)
    if NORMALIZE:
        total = tl.where(scale >= 1.0 / FLOOR, 0.0, total)
    else:
        total = 0.0
    tl.store(along + k, total)
    tl.store(factor + k, scale / (tl.load(ends + k) - tl.load(starts + k)).to(tl.float32))


@triton.jit
def pool_add_kernel(grad_hidden, grad, pooled, along, factor, starts, ends, count, width, stride, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    for k in range(count):
        place = k * width
        g = tl.load(grad + place + columns, mask=inside, other=0.0)
        e = tl.load(pooled + place + columns, mask=inside, other=0.0)
        dm = (g - e * tl.load(along + k)) * tl.load(factor + k)
        row = tl.load(starts + k)
        last = tl.load(ends + k)
        while row < last:
            at = grad_hidden + row * stride + columns
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32) + dm
            tl.store(at, value.to(grad_hidden.dtype.element_ty), mask=inside)
            row += 1


def pool_forward(
    hidden: Tensor, starts: Tensor, ends: Tensor, normalize: bool, pooled: Tensor, inv_norm: Tensor, floor: float
) -> None:
    """Fill pooled [K, H] and inv_norm [K]; hidden has unit column stride."""
    if starts.shape[0]:
        pool_forward_kernel[(starts.shape[0],)](
            hidden,
            starts,
            ends,
            pooled,
            inv_norm,
            hidden.shape[1],
            hidden.stride(0),
            FLOOR=floor,
            NORMALIZE=normalize,
            BLOCK=COLUMNS * 8,
        )


def pool_backward(
    grad_hidden: Tensor,
    grad: Tensor,
    pooled: Tensor,
    inv_norm: Tensor,
    starts: Tensor,
    ends: Tensor,
    normalize: bool,
    floor: float,
) -> None:
    """Add the read-outs' gradients into grad_hidden [T, H]."""
    count, width = grad.shape
    if count == 0:
        return
    along, factor = torch.empty_like(inv_norm), torch.empty_like(inv_norm)
    pool_along_kernel[(count,)](
        grad,
        pooled,
        inv_norm,
        starts,
        ends,
        along,
        factor,
        width,
        FLOOR=floor,
        NORMALIZE=normalize,
        BLOCK=COLUMNS * 8,
    )
    pool_add_kernel[(triton.cdiv(width, COLUMNS),)](
        grad_hidden,
        grad,
        pooled,
        along,
        factor,
        starts,
        ends,
        count,
        width,
        grad_hidden.stride(0),
        BLOCK=COLUMNS,
        num_warps=4,
    )
