"""Metrics without host synchronisation: summed on the device in the step, read once per logging step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class MetricSums:
    """Running means of 0-d tensors, and running totals of host numbers.

    ``add`` costs two small kernels, ``drain`` one transfer (and one all-reduce between ranks). Ranks must add the
    same names; a name's mean is over every value added on any rank, by weight.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._adds: dict[tuple[str, ...], float] = {}
        self._totals: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add one observation of each name; tensors 0-d, on one device. Gradients are not followed.

        weight: of what each value is a mean over (tokens), where observations differ in it.
        """
        if not values:
            return
        names = tuple(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if weight != 1.0:
            stacked = stacked * weight
        if names in self._sums:
            self._sums[names] += stacked
            self._adds[names] += weight
        else:
            self._sums[names], self._adds[names] = stacked, weight

    def count(self, **amounts: float) -> None:
        """Add host numbers to totals (tokens, samples)."""
        for name, amount in amounts.items():
            self._totals[name] = self._totals.get(name, 0.0) + amount

    def drain(self, device: torch.device, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Mean of every name and total of every count since the last call, over the ranks of ``group``; then empty."""
        layout = sorted(self._sums)
        parts = []
        for names in layout:
            parts += [self._sums[names].to(torch.float64), torch.tensor([self._adds[names]], dtype=torch.float64)]
        totals = sorted(self._totals)
        parts.append(torch.tensor([self._totals[name] for name in totals], dtype=torch.float64))
        packed = torch.cat([part.to(device, torch.float64) for part in parts])
        if group is not None:
            dist.all_reduce(packed, group=group)
        numbers = packed.tolist()
        values: dict[str, list[float]] = {}
        at = 0
        for names in layout:
            adds = numbers[at + len(names)]
            for i, name in enumerate(names):
                pair = values.setdefault(name, [0.0, 0.0])
                pair[0] += numbers[at + i]
                pair[1] += adds
            at += len(names) + 1
        result = {name: total / adds for name, (total, adds) in values.items()}
        result |= dict(zip(totals, numbers[at:], strict=True))
        self._sums, self._adds, self._totals = {}, {}, {}
        return result


class StepClock:
    """Seconds of training between two readings; evaluation and saving are left out (``paused``)."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def restart(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, pauses not counted; at least 1e-9."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return max(seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begin
