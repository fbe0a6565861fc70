"""pytest-benchmark cases share one Results object; ``--rime-json PATH`` writes it, and a table ends the run.

    pytest benchmarks --rime-json out.json            CPU sizes, all peers that are installed
    pytest benchmarks --rime-device cuda ...          GPU sizes
    pytest benchmarks --rime-tiny                     a few seconds: proves that every case runs (CI)
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Results, print_table


def pytest_addoption(parser):
    group = parser.getgroup("rime-fast")
    group.addoption("--rime-json", default=None, help="write all rows to this JSON")
    group.addoption("--rime-device", default="cpu", choices=["cpu", "cuda"])
    group.addoption("--rime-tiny", action="store_true", help="tiny sizes, one round: a smoke run")


def pytest_configure(config):
    config.rime_results = Results(device=config.getoption("--rime-device"))


@pytest.fixture
def results(request) -> Results:
    return request.config.rime_results


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--rime-device")


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--rime-tiny")


def pytest_sessionfinish(session):
    results = session.config.rime_results
    path = session.config.getoption("--rime-json")
    if path and (results.rows or results.skipped):
        results.write(Path(path))
    if results.rows:
        print()
        print_table(results.rows)
