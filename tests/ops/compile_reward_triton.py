"""Cross-compiles the reward's Triton kernel for one GPU generation, one JSON line a variant; needs no GPU.

Run by test_reward_triton.py in a process of its own, without TRITON_INTERPRET:
    python tests/ops/compile_reward_triton.py 90
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rime_fast.ops.reward.triton import BLOCK, DEPTH
from rime_fast.ops.reward.triton_kernels import rank_tile_kernel

POINTERS = {
    "gen": "*fp32",
    "tile": "*fp32",
    "tile_norm": "*fp32",
    "norms": "*fp32",
    "own": "*fp64",
    "positive": "*i64",
    "mask": "*u8",
    "state": "*fp64",
    "slack": "fp32",
    "inverse_tau": "fp32",
}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory (spills) of a cubin, by Triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|LOCAL):(\d+)", text)}


def main(capability: int) -> None:
    for negative, (masked, exact) in itertools.product(range(3), ((True, False), (False, False), (True, True))):
        constants = {"NEGATIVE": negative, "MASKED": masked, "EXACT": exact, "BLOCK": BLOCK, "DEPTH": DEPTH}
        names = rank_tile_kernel.arg_names
        signature = {
            name: "constexpr"
            if name in constants
            else ("*fp64" if exact else "*fp32")
            if name == "sims"
            else POINTERS.get(name, "i32")
            for name in names
        }
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(rank_tile_kernel, signature, places)
        options = {"num_warps": 4, "enable_fp_fusion": True}
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        line = {**constants, "shared": built.metadata.shared, **resources(built.asm["cubin"])}
        print(json.dumps(line))


if __name__ == "__main__":
    main(int(sys.argv[1]))
