"""The test rule of the operators (operators.md): how far from the fp64 truth a kernel may be.

    error <= 2 x the error of same-dtype eager torch + FLOOR[dtype]            errors relative to the truth's norm

The gradient to a temperature is one sum over all logits, of terms of both signs. It can cancel to a small part of their
absolute sum A, and the rounding of fp32 logits alone (everything after them in fp64) then shows in its leading digits,
in eager torch by luck more or less. Its floor is FLOOR[dtype] (|truth| + A / 10).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; absolute where the truth is zero up to fp64 rounding."""
    scale = truth.double().norm().item()
    return (found.double() - truth.double()).norm().item() / (scale if scale > 1e-12 else 1.0)


def cancellation(truth: Tensor, absolute: float) -> float:
    """1 + A / (10 |truth|): what the floor of a sum that can cancel is multiplied by; 1 for A = 0 (other values)."""
    scale = truth.double().norm().item()
    return 1 + 0.1 * absolute / (scale if scale > 1e-12 else 1.0)


def assert_rule(
    name: str, found: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, absolute: float = 0.0
) -> None:
    """The rule for one value. absolute: A of a sum that can cancel."""
    allowed = 2 * relative(eager, truth) + FLOOR[dtype] * cancellation(truth, absolute)
    error = relative(found, truth)
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
