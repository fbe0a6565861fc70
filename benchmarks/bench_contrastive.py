"""Operator B beside its peers and alone against N; what is measured: rime_fast/bench/contrastive.py."""

from __future__ import annotations

import pytest

from rime_fast.bench.contrastive import GROWTH, SHAPES, Shape, measure, measure_growth


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, table in {"shape": SHAPES, "grown": GROWTH}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, table[metafunc.config.rime_size], ids=str)


def test_contrastive(shape: Shape, run) -> None:
    found = run(measure, shape, rounds=5)
    for name in ("ours", "ours_masked"):  # what eager fp32 loses on peaked data is in its rows
        row = found[name]
        assert row.error_fp64 is None or row.error_fp64 < (1e-4 if run.exact else 5e-2), name


def test_growth(grown: Shape, run) -> None:
    found = run(measure_growth, grown, rounds=1 if grown.pairs > 10_000 else 3)
    memory = found["ours"].peak_mib
    assert run.device == "cuda" or memory is None or memory < 300
