"""The CUDA-on-host emulator finds what it is there to find."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.testing.on_host import CXX, build, sanitizers

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faulty") / "faulty_kernels"
    build(Path(__file__).with_name("faulty_kernels.cpp"), out)
    return out


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("none", 0, ""),
        ("no_barrier", 1, ""),  # some neighbour has not written yet
        ("two_places", 3, "threads wait at different places"),
        ("lost_lane", 3, "waits forever: not all threads come here"),
        ("uninitialised", 1, ""),  # what nobody wrote is NaN
        ("unreached", 1, ""),  # as on a GPU, threads that returned do not hold up the barrier
        ("outside", None, "heap-buffer-overflow"),
    ],
)
def test_every_fault_is_found(program: Path, fault: str, code: int | None, words: str) -> None:
    if fault == "outside" and "address" not in sanitizers():
        pytest.skip("this compiler has no AddressSanitizer")
    done = subprocess.run([str(program), fault], capture_output=True, text=True)
    assert done.returncode == code if code is not None else done.returncode != 0, done.stderr
    assert words in done.stderr
