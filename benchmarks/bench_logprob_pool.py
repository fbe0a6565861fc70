"""Operator A beside its peers; what is measured: rime_fast/bench/logprob.py."""

from __future__ import annotations

import pytest

from rime_fast.bench.logprob import SHAPES, Shape, measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SHAPES[metafunc.config.rime_size], ids=str)


def test_head(shape: Shape, run) -> None:
    found = run(measure, shape, rounds=5 if shape.ignored else 3)
    ours = [name for name in found if name.startswith("ours")]
    assert ours
    for name in ours:
        assert found[name].ratio_to_floor is not None
        error = found[name].error_fp64
        assert error is None or error < (1e-4 if run.exact else 2e-2), name
