"""Registers, memory and occupancy of every GPU kernel, as compiled for an H100 without one: docs/kernels.md.

    python -m tests.gpu.kernels [--write]

Triton's are those that the dry run's real call sites make at sizes of a 2B model; csrc's come from nvcc. Occupancy is
the arithmetic of an SM: 65,536 registers in units of 256 a warp, 228 KiB of shared memory of which a block costs 1 KiB
more than it asks for, 64 warps, 32 blocks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.ops.compile_logprob_triton import resources
from tests.ops.test_cuda_build import KERNELS, NVCC, ROOT, compile_for

PAGE = ROOT / "docs/kernels.md"
RUNS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("head", ["chunked", 8192, 1536, 151_936], {}),
    ("head", ["chunked", 8192, 1536, 151_936], {"entropy": True}),
    ("head", ["triton", 8192, 1536, 151_936], {}),
    ("head", ["triton", 8192, 1536, 151_936], {"entropy": True}),
    ("contrast", ["triton", 16_384, 1536], {}),
    ("contrast", ["triton", 16_384, 1536], {"margin": True}),
    ("contrast", ["triton", 16_384, 1536], {"widths": True}),
    ("reward", [512, 65_536, 1536], {}),
    ("decode", [4, 8, 12, 2, 128, 1024], {}),
    ("decode", [16, 8, 28, 4, 128, 1024], {"normed": True}),
    ("nucleus", [64, 151_936, "float32"], {}),
    ("merge", [8192, 12, 128], {}),
]
# of csrc/cuda/*_kernels.cuh
THREADS = {"logprob": 512, "contrastive": 256, "reward": 256, "contrastive/merge_kernel": 64}


class Kernel(NamedTuple):
    """One compiled kernel. local: bytes of spills and stack a thread; shared: bytes a block, known when compiling."""

    operator: str
    name: str
    threads: int
    registers: int
    shared: int
    local: int
    code: Path


def occupancy(threads: int, registers: int, shared: int) -> tuple[int, int]:
    """Blocks an SM holds, and their warps."""
    warps = threads // 32
    of_a_warp = -(-registers * 32 // 256) * 256
    blocks = min(32, 64 // warps, 65_536 // (of_a_warp * warps), (228 << 10) // (shared + 1024))
    return blocks, blocks * warps


def triton_kernels(folder: Path, runs: Sequence[Any] = RUNS) -> list[Kernel]:
    """Compile what the runs launch; the machine code goes to ``folder``."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment |= {"PYTHONPATH": path, "RIME_DRY_CODE": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.gpu.dry_run", json.dumps(runs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for line in filter(lambda text: text.startswith("{"), done.stdout.splitlines()):
        for one in json.loads(line).get("made", ()):
            used = resources(Path(one["code"]).read_bytes())
            memory = one["shared"], used["local"] + used["stack"], Path(one["code"])
            found.append(Kernel(one["operator"], one["name"], 32 * one["warps"], used["registers"], *memory))
    return found


def csrc_kernels(folder: Path) -> list[Kernel]:
    """Compile csrc/cuda for an H100 (sm_90a), into ``folder``."""
    import torch

    found = []
    for source, names in KERNELS.items():
        out = folder / f"{source}.cubin"
        report = compile_for(source, "90a", out, Path(torch.__file__).parent / "include")
        for entry in report.split("Compiling entry function '")[1:]:
            name = next(name for name in names if name in entry.partition("'")[0])
            registers, shared = re.search(r"Used (\d+) registers", entry), re.search(r"(\d+) bytes smem", entry)
            local = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", entry)))
            assert registers is not None
            memory = int(shared[1]) if shared else 0, local, out
            threads = THREADS.get(f"{source}/{name}", THREADS[source])
            found.append(Kernel(f"{source}, csrc", name, threads, int(registers[1]), *memory))
    return found


def table(kernels: Sequence[Kernel]) -> str:
    """The page's table: one line a kernel and number of threads, of several variants the most of each."""
    groups: dict[tuple[str, str, int], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.operator, kernel.name, kernel.threads), []).append(kernel)
    lines = [
        "| operator | kernel | variants | threads | registers | shared, KiB | local | blocks an SM | warps of 64 |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for (operator, name, threads), found in sorted(groups.items()):
        fits = [occupancy(threads, one.registers, one.shared) for one in found]
        cells = [operator, f"`{name}`", len(found), threads, _range([one.registers for one in found])]
        cells += [_range([-(-one.shared // 1024) for one in found]), max(one.local for one in found)]
        cells += [_range([blocks for blocks, _ in fits]), _range([warps for _, warps in fits])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def made_with() -> str:
    """Which compilers these are."""
    import triton

    text = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release [\d.]+, V([\d.]+)", text)
    return f"Triton {triton.__version__}, nvcc {version[1] if version else '?'}"


def page(folder: Path) -> str:
    """The whole of docs/kernels.md."""
    rows = table([*triton_kernels(folder), *csrc_kernels(folder)])
    return f"""# The GPU kernels as compiled

Made by `python -m tests.gpu.kernels --write` with {made_with()} for sm_90 (csrc: sm_90a),
without a card; `make gates` compares. Triton's kernels are compiled at their real call sites, at sizes of a 2B model in
bf16 (rewards, sampling: fp32). Of several variants (types, masks, options) the range is given. Shared memory is what is
known when compiling (`small_kernel` asks for more when it is launched); local memory is spills and
stack, in bytes a thread. An SM holds 65,536 registers, 228 KiB of shared memory, 64 warps and 32 blocks.

{rows}
"""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        text = page(Path(made))
    if "--write" in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
