"""The contrastive loss beside its peers and alone against N: the shapes, and the bounds of our errors and memory."""

from __future__ import annotations

import pytest

from benchmarks.lib import peers
from benchmarks.lib.growth import measure_growth
from benchmarks.lib.widths import measure_widths
from rime_fast.bench.contrastive import Shape, measure

_SIZES = {
    "tiny": [(64, 16, 1), (64, 16, 4)],
    "cpu": [(1024, 256, 1), (4096, 256, 1), (4096, 256, 4)],
    "cuda": [
        (16_384, 1536, 1),
        (4096, 1536, 4),
        (16_384, 1536, 4),
        (16_384, 3584, 1),
        (65_536, 1536, 1),
        (4096, 1536, 1),
        (4096, 3584, 4),
        (16_384, 3584, 4),
        (65_536, 3584, 1),
        (65_536, 1536, 4),
        (65_536, 3584, 4),
        (4096, 3584, 1),
    ],
}
SHAPES = {size: [Shape(*one, peaked=p) for p in (False, True) for one in table] for size, table in _SIZES.items()}
SHAPES["cpu"] = [shape for shape in SHAPES["cpu"] if shape.pairs == 1024 or shape.peaked == (shape.terms == 4)]
# measured alone, against N
GROWTH = {
    "tiny": [Shape(128, 16)],
    "cpu": [Shape(1024, 64), Shape(4096, 64), Shape(16_384, 64), Shape(65_536, 64)],
    "cuda": [Shape(n, 1536) for n in (4096, 16_384, 65_536, 262_144, 1_048_576)] + [Shape(1_048_576, 3584)],
}
# six Matryoshka widths, the widest of them the shape's
WIDTHS = {
    "tiny": [Shape(64, 32)],
    "cpu": [Shape(4096, 1024, peaked=True)],
    "cuda": [Shape(16_384, 1536, peaked=True), Shape(65_536, 3584, peaked=True)],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, table in {"shape": SHAPES, "grown": GROWTH, "nested": WIDTHS}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, table[metafunc.config.rime_size], ids=str)


def test_contrastive(shape: Shape, run) -> None:
    found = run(measure, shape, rounds=5, peers=peers.contrastive(shape))
    for name in ("ours", "ours_masked"):  # what eager fp32 loses on peaked data is in its rows
        row = found[name]
        assert row.error_fp64 is None or row.error_fp64 < (1e-4 if run.exact else 5e-2), name


def test_growth(grown: Shape, run) -> None:
    found = run(measure_growth, grown, rounds=1 if grown.pairs > 10_000 else 3)
    memory = found["ours"].peak_mib
    assert run.device == "cuda" or memory is None or memory < 300


def test_widths(nested: Shape, run) -> None:
    found = run(measure_widths, nested, rounds=5)
    assert found["ours"].error_fp64 is None or found["ours"].error_fp64 < (1e-4 if run.exact else 5e-2)
