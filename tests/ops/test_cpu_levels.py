"""Every instruction set of csrc's CPU kernels on one machine: forced by RIME_FAST_CPU, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rime_fast.ops import native

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
LEVELS = native.CPU_LEVELS[: native.CPU_LEVELS.index(native.cpu_level()) + 1] if native.available() else ()


def python(*arguments: str, level: str, threads: int = 1) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"RIME_FAST_CPU": level, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_obeys_the_rule(level: str) -> None:
    """With 1, 2 and 4 threads, which give the same bits."""
    done = python("-m", "tests.ops.cpu_levels_worker", level=level)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["level"] == level


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("level", LEVELS)
def test_all_operator_tests_at_every_level(level: str, threads: int) -> None:
    chosen = ["tests/ops", "-m", "not slow and not gpu", "--deselect", "tests/ops/test_cpu_levels.py", "-x"]
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, level=level, threads=threads)
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_level_is_an_error() -> None:
    call = "from rime_fast.ops import native; native.available(); native.cpu_level()"
    done = python("-c", call, level="sse9")
    assert done.returncode == 1
    assert "RIME_FAST_CPU is sse9, expected default, avx2 or avx512" in done.stderr


def test_more_than_the_processor_has_is_what_it_has() -> None:
    call = "from rime_fast.ops import native; native.available(); print(native.cpu_level())"
    done = python("-c", call, level="avx512")
    assert done.stdout.split() == [LEVELS[-1]]
