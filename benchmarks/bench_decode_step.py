"""One decode step beside its bare products; what is measured: benchmarks/lib/decode_step.py."""

from __future__ import annotations

import pytest

from benchmarks.lib.decode_step import SHAPES, Shape, measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SHAPES[metafunc.config.rime_size], ids=str)


def test_decode_step(shape: Shape, run) -> None:
    assert "ours" in run(measure, shape, rounds=7)
