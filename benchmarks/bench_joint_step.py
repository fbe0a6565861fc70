"""One joint-training step against the plain recipe; what is measured: benchmarks/lib/joint_step.py."""

from __future__ import annotations

import pytest

from benchmarks.lib.joint_step import SHAPES, Shape, measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SHAPES[metafunc.config.rime_size], ids=str)


def test_joint_step(shape: Shape, run) -> None:
    if shape.liger:
        pytest.importorskip("liger_kernel")
    found = run(measure, shape, rounds=2)
    for name, row in found.items():
        assert row.error_fp64 is None or row.error_fp64 < (1e-3 if run.exact else 0.1), name
