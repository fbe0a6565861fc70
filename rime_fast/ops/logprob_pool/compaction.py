"""The scored rows found on the device, and the memory a call may use there: nothing here waits for the device."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_ENVIRONMENT = "RIME_FAST_WORKSPACE_MIB"


class Scored(NamedTuple):
    """order [C] int64: the scored rows' numbers, ascending, then T in every further place. number: how many, 0-d int32.

    C, the capacity, is what the host knows to be enough: the caller's max_scored, or T.
    """

    order: Tensor
    number: Tensor

    def part(self, first: int, rows: int) -> Scored:
        """The scored rows in places [first, first + rows)."""
        return Scored(self.order[first : first + rows], (self.number - first).clamp(0, rows))


def scored_rows(targets: Tensor, ignore_index: int, max_scored: int = -1) -> Scored:
    """Compaction by a prefix sum: every scored row is written to its rank's place."""
    rows = targets.shape[0]
    capacity = rows if max_scored < 0 else min(max_scored, rows)
    scored = targets != ignore_index
    place = scored.cumsum(0) - 1
    # Ignored rows (and rows past a capacity that was wrong, which arguments.py reports) all write to a spare place.
    place = torch.where(scored, place, capacity).clamp_(max=capacity)
    order = torch.full((capacity + 1,), rows, dtype=torch.int64, device=targets.device)
    order.scatter_(0, place, torch.arange(rows, device=targets.device))
    return Scored(order[:capacity], scored.sum().clamp(max=capacity).to(torch.int32))


def workspace_limit() -> int:
    """Bytes one call may use beside its results and gradients: 256 MiB, or RIME_FAST_WORKSPACE_MIB."""
    value = os.environ.get(WORKSPACE_ENVIRONMENT, "256")
    if not value.isdecimal() or int(value) < 16:
        raise ValueError(f"{WORKSPACE_ENVIRONMENT}: expected a whole number of MiB, 16 or more, got {value!r}")
    return int(value) << 20
