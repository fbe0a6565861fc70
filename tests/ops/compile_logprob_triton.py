"""Cross-compiles operator A's Triton kernels and prints one JSON line a kernel; needs no GPU.

Run by test_logprob_pool_triton.py in a process of its own, without TRITON_INTERPRET:
    python tests/ops/compile_logprob_triton.py 90 bf16
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rime_fast.ops.logprob_pool import triton_kernels as kernels
from rime_fast.ops.logprob_pool.triton_backend import SPLIT, heavy_forward, tiles_for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTS = {
    "capacity", "width", "vocabulary", "stride_x", "stride_w", "stride_panel", "stride_head", "splits", "first",
    "columns_in_panel",
}  # fmt: skip
OPERANDS = {"x", "w", "panel", "dhead", "grad_hidden"}


def pointer(name: str, operand: str) -> str:
    """Type of an argument in Triton's notation."""
    if name in INTS:
        return "i32"
    if name == "softcap":
        return "fp32"
    if name in OPERANDS:
        return f"*{operand}"
    return {"targets": "*i64", "order": "*i64", "count": "*i32"}.get(name, "*fp32")


def compile_kernel(name: str, constants: dict, capability: int, operand: str, warps: int, stages: int) -> dict:
    """Compile one kernel; what the gate looks at."""
    kernel = getattr(kernels, name)
    signature = {a: "constexpr" if a in constants else pointer(a, operand) for a in kernel.arg_names}
    # The pointers and sizes of real models are multiples of 16; knowing it, loads are 16 bytes wide and asynchronous.
    sized = ("stride", "width", "vocabulary", "first", "columns")
    aligned = [i for i, a in enumerate(kernel.arg_names) if signature[a].startswith("*") or a.startswith(sized)]
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(a),): v for a, v in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )  # fmt: skip
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": name, "operand": operand, "shared": built.metadata.shared, **resources(built.asm["cubin"]),
        "wgmma": "wgmma.mma_async" in built.asm["ptx"], "mma": "mma.sync" in built.asm["ptx"],
        "tcgen05": "tcgen05.mma" in built.asm["ptx"],
    }  # fmt: skip


def resources(cubin: bytes) -> dict:
    """Registers and bytes of local memory (spills and stack) of a cubin, by Triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "local": found["LOCAL"], "stack": found["STACK"]}


def main(capability: int, operand: str) -> None:
    full = {"HAS_BIAS": True, "HAS_CAP": True, "ENTROPY": True, "WIDEN": False}
    plain = {"HAS_BIAS": False, "HAS_CAP": False, "ENTROPY": False, "WIDEN": False}
    todo = []
    chip = (capability // 10, capability % 10)
    light = {**full, "HAS_CAP": False}  # the forward of a model without a soft cap, entropy on
    for heavy, options in ((True, full), (False, light), (False, plain)):
        BM, BN, BK, warps, stages = tiles_for(DTYPES[operand], chip, heavy_forward(chip, float(heavy)))
        todo.append(("forward_kernel", {"BM": BM, "BN": BN, "BK": BK, "SPLIT": SPLIT, **options}))
        if options is not light:
            BM, BN, BK, warps, stages = tiles_for(DTYPES[operand], chip, heavy)
            todo.append(("dlogits_kernel", {"BM": BM, "BN": BN, "BK": BK, "PRODUCTS": heavy, **options}))
    todo += [
        ("dhead_kernel", {"BV": BM, "BH": BN, "BR": BK, "BIAS": True, "WIDEN": False}),
        ("dhidden_kernel", {"ADD": True, "BM": BM, "BH": BN, "BV": BK // 2, "WIDEN": False}),
    ]
    for name, constants in todo:
        print(json.dumps(compile_kernel(name, constants, capability, operand, warps, stages)), flush=True)
    for name, constants in (
        ("merge_kernel", {"BM": 128, "ENTROPY": True}), ("scatter_kernel", {"BM": 32, "BH": 128}),
    ):  # fmt: skip
        print(json.dumps(compile_kernel(name, constants, capability, operand, 4, 3)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
