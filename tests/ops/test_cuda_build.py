"""csrc/cuda without a GPU: nvcc compiles it without spills, the machine code has what the kernels are built for, and
the kernels run on the CPU, thread by thread, against fp64."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from tests.testing.on_host import CXX, run_on_host

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHS = ["90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("80", "100"))]
Built = Callable[[str, str], tuple[Path, str]]
# Kernels of each file, with how often each is compiled: forward and backward of rows by types (of logits, of results),
# entropy, plain and aligned; statistics, merge, and gradient into three types, by ids and margin, and what is O(N);
# the reward's.
KERNELS = {
    "logprob": {"forward_kernel": 24, "backward_kernel": 20},
    "contrastive": {
        "statistics_kernel": 4,
        "merge_kernel": 1,
        "gradient_kernel": 12,
        "norm_kernel": 3,
        "sized_kernel": 3,
    }
    | dict.fromkeys(("merge_kernel", "begin_kernel", "solve_kernel", "total_kernel", "slopes_kernel"), 1),
    "reward": {"small_kernel": 1, "begin_kernel": 1, "tile_kernel": 6, "merge_kernel": 1, "finish_kernel": 1},
}


def compile_for(source: str, arch: str, out: Path, headers: Path) -> str:
    """The machine code of csrc/cuda/``source`` for ``arch`` in ``out``; returns ptxas's report."""
    command = [str(NVCC), "-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-DRIME_WITH_CUDA", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(headers)]
    done = subprocess.run(
        [*command, str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """(source, arch) -> its machine code and ptxas's report, compiled once."""
    folder = tmp_path_factory.mktemp("cubins")

    @lru_cache
    def build(source: str, arch: str) -> tuple[Path, str]:
        out = folder / f"{source}_{arch}.cubin"
        return out, compile_for(source, arch, out, Path(torch.__file__).parent / "include")

    return build


def disassembler() -> str | None:
    """nvdisasm of the CUDA toolkit, or the one that Triton brings."""
    import triton

    own = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return shutil.which("nvdisasm") or (str(own) if own.exists() else None)


def machine_code(cubin: Path) -> dict[str, list[tuple[str, str]]]:
    """Kernel -> its instructions in order: (operation, operands); labels are ("label", name)."""
    tool = disassembler()
    if tool is None:
        pytest.skip("nvdisasm not found")
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    code: dict[str, list[tuple[str, str]]] = defaultdict(list)
    kernel = ""
    for line in text.splitlines():
        if found := re.match(r"\.text\.(\S+):", line):
            kernel = found[1]
        elif kernel and (found := re.match(r"(\.L_x_\d+):", line)):
            code[kernel].append(("label", found[1]))
        elif kernel and (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)):
            code[kernel].append((found[1], found[2]))
    return code


def loops(code: list[tuple[str, str]]) -> list[list[str]]:
    """The operations of every loop: from a label to a branch back to it."""
    return [[name for name, _ in code[first:last]] for first, last in _loops(code)]


def product_loops(code: list[tuple[str, str]]) -> list[list[str]]:
    """The innermost loops with matrix products: by tensor cores, or of many multiply-adds in fp32."""
    found = []
    for first, last in _loops(code):
        names = [name for name, _ in code[first:last]]
        if any(re.match(r"HG?MMA|UTC\w*MMA", name) for name in names) or sum(n == "FFMA" for n in names) >= 64:
            found.append((first, last))
    inner = [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [[name for name, _ in code[first:last]] for first, last in inner]


def _loops(code: list[tuple[str, str]]) -> list[tuple[int, int]]:
    at = {name: i for i, (operation, name) in enumerate(code) if operation == "label"}
    found = []
    for i, (operation, operands) in enumerate(code):
        target = re.search(r"\((\.L_x_\d+)\)", operands)
        if operation.startswith("BRA") and target and at.get(target[1], i) < i:
            found.append((at[target[1]], i))
    return [(first, last) for first, last in found if last - first > 1]


@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", KERNELS)
def test_compiles_without_spills_to_wide_stores(source: str, arch: str, built: Built) -> None:
    cubin, report = built(source, arch)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    # With 64 registers, for four blocks a multiprocessor, the rewards' sweep for a maximum puts two numbers aside.
    assert max(int(count) for pair in spills for count in pair) <= (24 if source == "reward" else 0), report
    for kernel, count in KERNELS[source].items():
        assert len(set(re.findall(rf"Compiling entry function '(\w*{kernel}\w*)'", report))) == count, kernel
    assert len(spills) >= sum(KERNELS[source].values())
    if source == "contrastive":
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
        assert max(registers) <= 128  # two blocks of 256 threads a multiprocessor at least
    stores = {
        kernel: [name for name, _ in code if name.startswith("STG")] for kernel, code in machine_code(cubin).items()
    }
    assert len(stores) == sum(KERNELS[source].values())
    for kernel, names in stores.items():
        one_by_one = source == "logprob" and kernel.split("kernelI")[1].split("EEE")[0].endswith("Lb0")  # not aligned
        narrow = [name for name in names if re.search(r"\.[US](8|16)\b", name)]
        fp32 = ("kernelIff" if source == "logprob" else "kernelIf") in kernel
        one_by_one = one_by_one or "sized_kernel" in kernel  # rows of an odd width
        assert bool(narrow) == (one_by_one and "forward" not in kernel and not fp32), kernel
        writes_rows = (source == "logprob" and "forward" not in kernel) or "gradient_kernel" in kernel
        if writes_rows and not one_by_one:
            # A thread of the log-prob's takes 8 columns: 16-bit logits in one vector, fp32 ones in two.
            whole = source == "logprob" and not fp32 and "kernelIf" not in kernel
            wide = ".128" if fp32 or whole else ".64"
            assert sum(wide in name for name in names) >= 2 - (whole or (source == "contrastive" and len(names) < 2))


@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
def test_running_statistics_stay_in_registers(built: Built) -> None:
    """No loop over the parts of a tile, or over a row in the forward, writes to global memory."""
    for source in ("contrastive", "logprob"):
        for kernel, code in machine_code(built(source, "90a")[0]).items():
            if "merge_kernel" in kernel or "forward_kernel" in kernel:
                found = loops(code)
                assert found, kernel
                assert not [name for loop in found for name in loop if name.startswith(("STG", "STL", "LDL"))], kernel


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or "RIME_TEST_TORCH_HEADERS" not in os.environ, reason="needs nvcc and the headers")
@pytest.mark.parametrize("source", KERNELS)
def test_compiles_against_other_headers(source: str, tmp_path: Path) -> None:
    """RIME_TEST_TORCH_HEADERS: torch/include of an unpacked wheel, such as the oldest torch that is supported."""
    compile_for(source, "90a", tmp_path / "out.cubin", Path(os.environ["RIME_TEST_TORCH_HEADERS"]))


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
@pytest.mark.parametrize("cases", ["quick", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("operator", ["logprob", "contrastive"])
def test_kernels_run_on_the_cpu(operator: str, cases: str, tmp_path: Path) -> None:
    """The kernels themselves, their threads as fibers, against loops in double (the reward's: test_reward_on_host)."""
    run_on_host(ROOT / f"tests/ops/{operator}_on_host.cpp", tmp_path, cases)
