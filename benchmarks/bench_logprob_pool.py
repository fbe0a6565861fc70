"""The head's log-probabilities and gradients beside their peers: the shapes, and the bounds of our errors."""

from __future__ import annotations

import pytest

from benchmarks.lib import peers
from rime_fast.bench.logprob import Shape, measure

SHAPES = {
    "tiny": [Shape(32, 16, 200, 0.5), Shape(32, 16, 200, 0.5, entropy=True)],
    "cpu": [
        Shape(1024, 256, 32_000, 0.9),
        Shape(1024, 256, 32_000, 0.0),
        Shape(256, 256, 32_000, 0.5, peaked=True),
        Shape(256, 256, 32_000, 0.9, frozen=True),
        Shape(256, 256, 32_000, 0.9, entropy=True),
        Shape(64, 256, 151_936, 0.5),
    ],
    # The shapes that targets are set for come first; a run with a deadline leaves out the last.
    "cuda": [
        *(Shape(8192, H, 151_936, ignored) for ignored in (0.0, 0.9) for H in (4096, 1536)),
        *(Shape(8192, 4096, 248_320, ignored) for ignored in (0.0, 0.9)),
        *(Shape(8192, H, 151_936, ignored) for H in (2048, 2560, 3584) for ignored in (0.0, 0.9)),
        Shape(16_384, 4096, 151_936, 0.0),
        Shape(8192, 4096, 151_936, 0.5),
        Shape(8192, 4096, 151_936, 0.97),
        Shape(8192, 4096, 151_936, 0.0, peaked=True),
        Shape(8192, 4096, 151_936, 0.0, frozen=True),
        Shape(8192, 4096, 151_936, 0.9, frozen=True),
        Shape(8192, 4096, 151_936, 0.0, entropy=True),
        *(Shape(T, 2048, 151_936, 0.9) for T in (2048, 16_384, 32_768, 65_536)),
    ],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SHAPES[metafunc.config.rime_size], ids=str)


def test_head(shape: Shape, run) -> None:
    found = run(measure, shape, rounds=5 if shape.ignored else 3, peers=peers.logprob(shape))
    ours = [name for name in found if name.startswith("ours")]
    assert ours
    for name in ours:
        assert found[name].ratio_to_floor is not None
        error = found[name].error_fp64
        assert error is None or error < (1e-4 if run.exact else 2e-2), name
