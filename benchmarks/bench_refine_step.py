"""One Refine-RL step against the plain recipe; what is measured: benchmarks/lib/refine_step.py."""

from __future__ import annotations

import pytest

from benchmarks.lib.refine_step import SHAPES, Shape, measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SHAPES[metafunc.config.rime_size], ids=str)


def test_refine_step(shape: Shape, run) -> None:
    found = run(measure, shape, rounds=2)
    # advantages divide reward gaps of 1e-3 by their spread
    error = found["ours"].error_fp64
    assert error is None or error < (1e-3 if run.exact else 0.1)  # None: the plain recipe did not fit
