"""Rewards and advantages beside their peers, and UME-R1's reward: the shapes, and the bounds of our errors."""

from __future__ import annotations

import pytest

from benchmarks.lib.ume_r1 import measure_ume_r1
from rime_fast.bench.reward import Shape, measure

SHAPES = {
    "tiny": [Shape(4, 8, 32, 16)],
    "cpu": [Shape(128, 8, 1024, 256), Shape(8, 8, 4096, 1536), Shape(32, 8, 16_384, 256), Shape(32, 8, 65_536, 256)],
    "cuda": [
        Shape(64, 8, 65_536, 1536),
        Shape(64, 8, 1024, 1536),
        Shape(8, 8, 256, 1536),
        Shape(128, 8, 1024, 256),
        Shape(1024, 8, 16_384, 2048),
        Shape(64, 8, 1_000_000, 1536),
        Shape(1024, 8, 1_000_000, 1536),
    ],
}
# UME-R1's bank is the other side's rollouts, as many as rows
UME_SHAPES = {size: [shape for shape in table if shape.anchors == shape.rows] for size, table in SHAPES.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    table = UME_SHAPES if metafunc.function.__name__ == "test_ume_r1" else SHAPES
    metafunc.parametrize("shape", table[metafunc.config.rime_size], ids=str)
    if "dtype" in metafunc.fixturenames:  # a bank on a GPU is often kept in 16 bits
        cuda = metafunc.config.rime_size == "cuda"
        metafunc.parametrize("dtype", ["bfloat16", "float32"] if cuda else ["float32"])


def test_reward(shape: Shape, dtype: str, run) -> None:
    check(run(measure, shape, rounds=9, dtype=dtype))


def test_ume_r1(shape: Shape, run) -> None:
    check(run(measure_ume_r1, shape, rounds=5, dtype="float32"))


def check(found) -> None:
    for name, row in found.items():
        assert row.error_fp64 is None or row.error_fp64 < (1e-6 if name.startswith("ours") else 1e-2), name
