"""Where the time of a step goes: one clock that is always in exactly one part."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

OTHER = "other"
PARTS = (
    "decode",
    "reference",
    "scoring",
    "vision",
    "LLM forward",
    "head",
    "contrast",
    "reward",
    "backward",
    "optimiser",
    OTHER,
)


class PartClock:
    """``mark(name)`` ends the part before and begins ``name``; CUDA events on a GPU, so that nothing waits.

    Marks count between ``start`` and ``totals`` only, so that a step may keep its marks where it is timed as a whole.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []
        self.running = False

    def start(self) -> None:
        """Begin to count, in the part "other"."""
        self.running, self.marks = True, []
        self.mark(OTHER)

    def mark(self, name: str) -> None:
        """From here on time counts as ``name``."""
        if not self.running:
            return
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """``name`` inside, "other" after it."""
        self.mark(name)
        yield
        self.mark(OTHER)

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The forwards of these modules count as the parts they are named by."""
        handles: list[Any] = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.mark(name)))
            handles.append(module.register_forward_hook(lambda *_: self.mark(OTHER)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def totals(self) -> dict[str, float]:
        """Milliseconds by part since ``start``."""
        self.mark(OTHER)
        self.running = False
        if self.device == "cuda":
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            found[name] += begin.elapsed_time(end) if self.device == "cuda" else (end - begin) * 1e3
        return dict(found)


def breakdown(
    clock: PartClock, modules: Mapping[str, nn.Module], step: Callable[[], Any], rounds: int
) -> dict[str, float]:
    """Median milliseconds of each part over ``rounds`` steps, in the order of PARTS; ``step`` marks what it knows."""
    taken = []
    for _ in range(rounds):
        with clock.watching(modules):
            clock.start()
            step()
        taken.append(clock.totals())
    names = [name for name in PARTS if any(name in one for one in taken)]
    return {name: statistics.median([one.get(name, 0.0) for one in taken]) for name in names}
