"""Operator C beside its peers, and UME-R1's reward; what is measured: rime_fast/bench/reward.py."""

from __future__ import annotations

import pytest

from rime_fast.bench.reward import SHAPES, UME_SHAPES, Shape, measure, measure_ume_r1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    table = UME_SHAPES if metafunc.function.__name__ == "test_ume_r1" else SHAPES
    metafunc.parametrize("shape", table[metafunc.config.rime_size], ids=str)


def test_reward(shape: Shape, run) -> None:
    check(run(measure, shape, rounds=9, dtype="float32"))


def test_ume_r1(shape: Shape, run) -> None:
    check(run(measure_ume_r1, shape, rounds=5, dtype="float32"))


def check(found) -> None:
    for name, row in found.items():
        assert row.error_fp64 is None or row.error_fp64 < (1e-6 if name.startswith("ours") else 1e-2), name
