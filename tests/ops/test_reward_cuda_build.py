"""csrc/cuda/reward.cu goes through nvcc for every target, without spilled registers. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
KERNELS = ("small_kernel", "own_kernel", "tile_kernel", "merge_kernel", "finish_kernel")


@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
@pytest.mark.parametrize("arch", ["90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("80", "100"))])
def test_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    assert NVCC is not None
    headers = Path(torch.__file__).parent / "include"
    command = [
        NVCC,
        "-std=c++20",
        "-O3",
        f"-arch=sm_{arch}",
        "--resource-usage",
        "-Xcompiler",
        "-fPIC",
        "-DRIME_WITH_CUDA",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{ROOT / 'csrc'}",
        "-isystem",
        str(headers),
        "-c",
        str(ROOT / "csrc/cuda/reward.cu"),
        "-o",
        str(tmp_path / "reward.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    for kernel in KERNELS:
        assert kernel in report
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    assert len(spills) >= 2 * len(KERNELS)
    assert sum(spills) == 0, report
