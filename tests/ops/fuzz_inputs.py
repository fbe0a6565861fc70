"""What the fuzz of every operator shares: layouts of memory, refused input, values that are not finite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.error_rule import FLOOR, assert_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "every second row", "inside a wider row", "offset")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values of a [.., D] tensor in another place of memory."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "every second row":
        return torch.stack([tensor, torch.full_like(tensor, 7.0)], dim=1).flatten(0, 1)[::2]
    if layout == "inside a wider row":
        return torch.cat([torch.full_like(tensor, 7.0), tensor], dim=-1)[..., tensor.shape[-1] :]
    if layout == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor


def assert_rule_by_row(
    name: str, found: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, absolute: float = 0.0
) -> None:
    """The rule over the rows whose truth is finite; the others must not be finite either.

    A gradient in a coarser dtype than the call's (of an fp32 bias beside fp64 rows) is held to its own.
    """
    assert found.shape == truth.shape, f"{name}: shape {list(found.shape)}, expected {list(truth.shape)}"
    if truth.dim() == 0:
        found, eager, truth = found[None], eager[None], truth[None]
    fits = ~(
        truth.abs().nan_to_num(0, 0) > 0.99 * torch.finfo(found.dtype).max
    )  # in fp16 many a large gradient does not
    fits = fits.flatten(1).all(1) if truth.dim() > 1 else fits
    found, eager, truth = found[fits], eager[fits], truth[fits]
    finite = truth.isfinite().flatten(1).all(1) if truth.dim() > 1 else truth.isfinite()
    there = found.isfinite().flatten(1).all(1) if found.dim() > 1 else found.isfinite()
    assert torch.equal(there, finite), f"{name}: finite {there.tolist()[:9]}, expected {finite.tolist()[:9]}"
    # eager torch may overflow where the truth does not: nothing of its error is lent then
    lent = eager if eager[finite].isfinite().all() else truth
    coarser = max(dtype, found.dtype, key=lambda one: FLOOR[one])
    assert_rule(name, found[finite], lent[finite], truth[finite], coarser, absolute)


def assert_refused(call: Callable[[], object]) -> None:
    """Bad input is a ValueError or TypeError, never a number."""
    with pytest.raises((ValueError, TypeError)):
        call()
