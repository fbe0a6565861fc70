"""Library GEMMs with fp32 accumulation and result, whatever the operands' dtype.

Gradients of similarities reach these products relative to the largest factor of the call (``unit``), so that G stays
within +-2 and neither bf16 nor fp16 can underflow, whatever the batch size and the loss scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops import cpu_products


def similarities(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b^T."""
    if a.dtype == out.dtype:
        return torch.mm(a, b.T, out=out)
    if not a.is_cuda:
        return torch.mm(a.to(out.dtype), b.T.to(out.dtype), out=out)
    return torch.mm(a, b.T, out_dtype=out.dtype, out=out)


def add_product(into: Tensor | None, rows: slice, a: Tensor, b: Tensor) -> None:
    """into[rows] += a b; nothing where ``into`` is not wanted."""
    if into is None:
        return
    target = into[rows]
    if a.dtype == target.dtype:
        cpu_products.add_product(target, a, b)
    elif not a.is_cuda:
        target.addmm_(a.to(target.dtype), b.to(target.dtype))
    else:
        torch.addmm(target, a, b, out_dtype=target.dtype, out=target)


def unit_of(factors: Tensor, dtype: torch.dtype) -> Tensor | None:
    """0-d: the largest factor in magnitude, for operands of a 16-bit dtype; None (no unit is needed) for others."""
    if dtype in (torch.float32, torch.float64):
        return None
    largest = factors.abs().amax()
    return torch.where(largest > 0, largest, 1.0)


def scale_by(unit: Tensor | None, tensors: list[Tensor | None]) -> None:
    """Give gradients that were made relative to ``unit`` their size, in place."""
    if unit is None:
        return
    for tensor in tensors:
        if tensor is not None:
            tensor.mul_(unit)
