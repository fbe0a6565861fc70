"""Operator A beside its peers; what is measured: rime_fast/bench/logprob.py."""

from __future__ import annotations

import pytest

from rime_fast.bench.logprob import SHAPES, Shape, measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SHAPES[metafunc.config.rime_size], ids=str)


def test_head(shape: Shape, run) -> None:
    found = run(measure, shape, rounds=5)
    assert found["ours_forward"].ratio_to_floor is not None
    for name in ("ours_forward", "ours_recompute"):
        error = found[name].error_fp64
        assert error is None or error < (1e-4 if run.exact else 2e-2), name
