"""csrc/cuda compiles for every target without spilling registers (nvcc, no GPU needed)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", ["row_softmax.cu"])
def test_compiles_without_spills(source: str, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100")]
    done = subprocess.run(
        [
            NVCC,
            "-std=c++20",
            "-O3",
            "-Xptxas",
            "-v",
            "-I",
            ROOT / "csrc",
            "-I",
            ROOT / "csrc" / "include",
            "-isystem",
            Path(torch.__file__).parent / "include",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-DUSE_CUDA",
            *targets,
            "-c",
            ROOT / "csrc" / "cuda" / source,
            "-o",
            tmp_path / "out.o",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= 3 * len(targets)
    assert set(spills) == {("0", "0")}, done.stderr
