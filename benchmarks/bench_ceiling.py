"""The machine's own ceilings, which the roofline is drawn under; what is measured: rime_fast/bench/ceiling.py."""

from __future__ import annotations

import pytest

from rime_fast.bench.ceiling import SHAPES, Shape, measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SHAPES[metafunc.config.rime_size], ids=str)


def test_ceiling(shape: Shape, run) -> None:
    found = run(measure, shape, rounds=5)
    assert found["copy"].gbytes_s > 0
    assert found["gemm"].tflops > 0
