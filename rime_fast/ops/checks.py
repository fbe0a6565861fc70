"""Argument checks shared by the operators: one error style.

Every message names the argument, says what came and what is expected. Shapes, dtypes and devices are host facts and
raise at once. Values held in a tensor (targets, indices, temperature) raise ``ValueError`` on the CPU; on an
accelerator, and inside ``torch.compile``, reading them would stop the host, so they become an asynchronous assertion.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDICES = (torch.int64, torch.int32)


def describe(value: object) -> str:
    """How a message shows what came: shape, dtype and device of a tensor, type and value of anything else."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(
    name: str,
    value: object,
    *,
    shape: tuple[int | str, ...] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check that ``value`` is a tensor of this shape, one of these dtypes, on this device.

    shape: a number must match, a string stands for any size and only names it in the message, e.g. ("T", 64).
    Raises TypeError for something else than a tensor or a wrong dtype, ValueError for a wrong shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            isinstance(want, str) or have == want for want, have in zip(shape, value.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {describe(value)}")
    if dtypes is not None:
        allowed = tuple(dtypes)
        if value.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{name}: expected dtype {names}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {describe(value)}")


def check_positive(name: str, value: object) -> None:
    """Check that ``value`` is a finite number above zero, or a 0-d floating tensor (whose value ``require`` has to
    check)."""
    if isinstance(value, Tensor):
        check_tensor(name, value, shape=(), dtypes=FLOATS)
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {describe(value)}")
    if not 0 < value < math.inf:  # also what torch.compile can trace of a number that changes between calls
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Check that ``value`` is a finite int or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_int(name: str, value: object) -> None:
    """Check that ``value`` is an int (and no bool)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")


def check_flag(name: str, value: object) -> None:
    """Check that ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")


def refuse_forward_ad(name: str, tensors: Iterable[object]) -> None:
    """Refuse tensors that carry a tangent, which a fused kernel would silently drop (its derivative would be 0)."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name}: forward-mode AD (jvp) of a fused backend; expected backend='reference' there")


def require(good: Tensor, message: str) -> None:
    """Require all of ``good`` (bool) to be true: ValueError with ``message`` on the CPU, an asynchronous assertion
    elsewhere."""
    if good.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(good.all()):
            raise ValueError(message)
        return
    torch._assert_async(good if good.dim() == 0 else good.all(), message)


def require_range(name: str, index: Tensor, low: int, high: int) -> None:
    """Require every element of ``index`` to lie in [low, high); see ``require`` for where and how it fails."""
    good = (index >= low) & (index < high)
    message = f"{name}: expected values in [{low}, {high})"
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~good
        if bool(bad.any()):
            at = int(bad.flatten().to(torch.int8).argmax())
            raise ValueError(f"{message}, got {int(index.flatten()[at])} at position {at}")
        return
    torch._assert_async(good.all(), message)
