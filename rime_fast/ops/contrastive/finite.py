"""Rows that are not finite, and the error that names one.

On the CPU the largest norms are known before any product, so a NaN or Inf costs no extra pass to notice and is an
error. On an accelerator looking would make the host wait: there it becomes a NaN loss (which a loss scaler can skip);
a grouped call, whose handshake reads a few numbers on the host anyway, is told on every device (agreement.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rime_fast.ops.contrastive.positives import first_row


class NonFiniteRow(ValueError):
    """side: "queries" or "keys"; mode: position in the list of that side's modes; row: the first bad one."""

    def __init__(self, side: str, mode: int, row: int) -> None:
        super().__init__(f"{side} (mode {mode} in the order of terms) {reason(row)}")
        self.side, self.mode, self.row = side, mode, row


def reason(row: int) -> str:
    return f"holds NaN or Inf in row {row}; expected finite embeddings"


def require_finite(side: str, tensors: list[Tensor], largest_norm: float) -> None:
    """Raise NonFiniteRow if ``largest_norm`` (of these CPU tensors) betrays a bad row.

    A finite row may have an infinite norm in fp32; it passes.
    """
    if math.isfinite(largest_norm):
        return
    for mode, rows in enumerate(tensors):
        bad = ~torch.isfinite(rows).all(1)
        if bool(bad.any()):
            raise NonFiniteRow(side, mode, first_row(bad))


def require_temperature(temperature: Tensor) -> None:
    """On the CPU: a finite temperature other than 0 (one made by arithmetic may be anything)."""
    value = float(temperature)
    if not math.isfinite(value) or value == 0:
        raise ValueError(f"temperature is {value}; expected a finite number other than 0")
