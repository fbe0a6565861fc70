"""The cases share one Results object; ``--rime-json PATH`` writes it, and a table ends the run.

    pytest benchmarks --rime-json out.json            CPU sizes, all peers that are installed
    pytest benchmarks --rime-device cuda ...          GPU sizes
    pytest benchmarks --rime-tiny                     a few seconds: proves that every case runs (CI)
    pytest benchmarks --rime-deadline 160             cases that would begin later are left out, by name
    pytest benchmarks --rime-first 1                  the first case of every file

The JSON is written after every case, so a run that is cut off leaves what it had.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rime_fast.bench.harness import Results, Row, Skipped
from rime_fast.bench.table import print_rows


def pytest_addoption(parser):
    group = parser.getgroup("rime-fast")
    group.addoption("--rime-json", default=None, help="write all rows to this JSON")
    group.addoption("--rime-device", default="cpu", choices=["cpu", "cuda"])
    group.addoption("--rime-seconds", type=float, default=math.inf, help="time limit of one comparison")
    group.addoption("--rime-deadline", type=float, default=math.inf, help="seconds after which no case begins")
    group.addoption("--rime-tiny", action="store_true", help="tiny sizes, one round: a smoke run")
    group.addoption("--rime-first", type=int, default=None, help="only so many cases of every file")


def pytest_configure(config):
    device = config.getoption("--rime-device")
    config.rime_results = Results(device=device, seconds=config.getoption("--rime-seconds"))
    config.rime_began = time.monotonic()
    config.rime_size = "tiny" if config.getoption("--rime-tiny") else device


class Run:
    """Calls a ``measure`` with this run's device, its dtype and results; one round when tiny."""

    def __init__(self, config) -> None:
        self.results, self.device = config.rime_results, config.getoption("--rime-device")
        self.tiny = config.rime_size == "tiny"
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def exact(self) -> bool:
        """Whether the inputs are fp32."""
        return self.dtype == torch.float32

    def __call__(self, measure, shape: Any, *, rounds: int, dtype: str = "", **options: Any) -> dict[str, Row]:
        kind = getattr(torch, dtype) if dtype else self.dtype
        return measure(shape, self.device, kind, self.results, 1 if self.tiny else rounds, **options)


@pytest.fixture
def run(request) -> Run:
    return Run(request.config)


@pytest.fixture
def results(request) -> Results:
    return request.config.rime_results


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--rime-device")


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--rime-tiny")


def pytest_collection_modifyitems(config, items):
    """Every file's first case, then every file's second: what a deadline leaves out is spread over all."""
    seen, most = Counter(), config.getoption("--rime-first")
    order = {}
    for item in items:
        order[item] = seen[item.path]
        seen[item.path] += 1
    items.sort(key=order.__getitem__)
    if most is not None:
        items[:] = [item for item in items if order[item] < most]


def pytest_runtest_setup(item):
    """Leaves out what would begin after the deadline; the JSON says so."""
    limit = item.config.getoption("--rime-deadline")
    if time.monotonic() - item.config.rime_began > limit:
        reason = f"no time left of {limit:.0f} s"
        bench = item.path.stem.removeprefix("bench_")
        item.config.rime_results.skipped.append(Skipped(bench, item.name, "all", reason))
        pytest.skip(reason)


def pytest_runtest_teardown(item):
    _write(item.config)


def pytest_sessionfinish(session):
    _write(session.config)
    results = session.config.rime_results
    if results.rows:
        print()
        print_rows(results.rows, results.skipped)


def _write(config):
    results, path = config.rime_results, config.getoption("--rime-json")
    if path and (results.rows or results.skipped):
        results.write(Path(path))
