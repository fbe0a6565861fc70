"""A pytest plugin (-p benchmarks.lib.failures): a test that fails is printed at once; no time limit loses it."""

from __future__ import annotations

import os
import sys
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Under xdist the process that started the others gets every report."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(
            f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{report.longrepr}",
            file=sys.stderr,
            flush=True,
        )
