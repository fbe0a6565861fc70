"""A step through the gradient cache beside the plain step; what is measured: benchmarks/lib/grad_cache.py.

Gradients are asserted; time is reported beside its bound (the row's note), not asserted.
"""

from __future__ import annotations

import pytest

from benchmarks.lib.grad_cache import SHAPES, Shape, measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SHAPES[metafunc.config.rime_size], ids=str)


def test_grad_cache(shape: Shape, run) -> None:
    found = run(measure, shape, rounds=5)
    for name, row in found.items():
        if name.startswith("ours"):
            assert row.error_fp64 is not None
            assert row.error_fp64 < (1e-4 if run.exact else 0.1), name
