"""Cross-compiles the log-prob operator's Triton kernels and prints one JSON line a kernel; needs no GPU.

Run by test_logprob_pool_triton.py in a process of its own, without TRITON_INTERPRET:
    python tests/ops/compile_logprob_triton.py bf16 all 90
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rime_fast.ops.logprob_pool import triton_kernels, triton_places, triton_rows
from rime_fast.ops.logprob_pool.triton_tiles import (
    DLOGITS_WIDE,
    FORWARD_WIDE,
    GROUP,
    SPLIT_COLUMNS,
    Tiles,
    head_tiles,
    hidden_tiles,
    score_tiles,
)
from tests.ops.test_cuda_build import machine_code, product_loops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTS = {
    "capacity",
    "length",
    "width",
    "vocabulary",
    "stride_x",
    "stride_w",
    "stride_panel",
    "stride_head",
    "splits",
    "first",
    "columns_in_panel",
    "read_outs",
    "stride",
    "out_stride",
    "stride_out",
    "stride_hidden",
    "places",
    "ignore_index",
    "vocab_start",
    "entropy_stride",
}
LONGS = {"targets", "order", "local", "starts", "ends"}
OPERANDS = {"hidden", "logits", "out", "rows_of", "x", "w", "panel", "dhead", "dhidden", "low"}


UNFUSED = {"forward_kernel", "dlogits_kernel"}  # as triton.py launches them
ROW_KERNELS = (  # name, constants, warps
    ("merge_kernel", {"BM": 128, "ENTROPY": True}, 4),
    ("places_kernel", {"BLOCK": 2048}, 8),
    ("gather_kernel", {"BR": 32, "BC": 256}, 4),
    ("scatter_kernel", {"BR": 32, "BC": 256}, 4),
    ("pick_kernel", {"BLOCK": 256}, 4),
    ("spread_kernel", {"ENTROPY": True, "BLOCK": 256}, 4),
    ("read_outs_kernel", {"NORMALIZE": True}, 4),
    ("start_gradient_kernel", {"BT": 32, "BC": 256}, 4),
    ("row_statistics_kernel", {"ENTROPY": True, "BLOCK": 4096}, 8),
    ("row_gradient_kernel", {"BLOCK": 4096}, 8),
    ("row_gradient_kernel", {"BLOCK": 4096, "bias": None, "softcap": None, "entropy": None, "grad_entropy": None}, 8),
)


def pointer(name: str, operand: str, blocks: dict[str, tuple[int, int]]) -> str:
    """Type of an argument in Triton's notation."""
    if name in blocks:
        return f"tensordesc<{operand}[{blocks[name][0]},{blocks[name][1]}]>"
    if name in INTS:
        return "i32"
    if name in OPERANDS:
        return f"*{operand}"
    return {"count": "*i32"}.get(name, "*i64" if name in LONGS else "*fp32")


def descriptors(name: str, t: Tiles) -> dict[str, tuple[int, int]]:
    """Which operands a kernel takes as descriptors, and their blocks (triton_backend.py)."""
    return {
        "forward_kernel": {"x": (t.BM, t.BK), "w": (t.BN, t.BK)},
        "dlogits_kernel": {"x": (t.BM, t.BK), "w": (t.BN, t.BK), "panel": (t.BM, t.BN)},
        "dhead_kernel": {"panel": (t.BK, t.BM), "x": (t.BK, t.BN)},
        "dhidden_kernel": {"panel": (t.BM, t.BK), "w": (t.BK, t.BN)},
    }[name]


def compile_kernel(name: str, constants: dict, capability: int, operand: str, warps: int, stages: int) -> dict:
    """Compile one kernel; what the gate looks at."""
    kernel = next(
        found for home in (triton_kernels, triton_rows, triton_places) if (found := getattr(home, name, None))
    )
    blocks = {}
    if constants.get("TMA"):
        blocks = descriptors(name, Tiles(constants["BM"], constants["BN"], constants["BK"], warps, stages))
    signature = {a: "constexpr" if a in constants else pointer(a, operand, blocks) for a in kernel.arg_names}
    # The pointers and sizes of real models are multiples of 16; knowing it, loads are 16 bytes wide and asynchronous.
    sized = ("stride", "out_stride", "width", "vocabulary", "first", "columns")
    aligned = [
        i
        for i, a in enumerate(kernel.arg_names)
        if signature[a].startswith("*") or (signature[a] == "i32" and a.startswith(sized))
    ]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(a),): v for a, v in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": name not in UNFUSED}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": name,
        "operand": operand,
        "capability": capability,
        "descriptors": sorted(blocks),
        "shared": built.metadata.shared,
        **resources(built.asm["cubin"]),
        "wgmma": "wgmma.mma_async" in built.asm["ptx"],
        "mma": "mma.sync" in built.asm["ptx"],
        "tcgen05": "tcgen05.mma" in built.asm["ptx"],
        "tma": "cp.async.bulk.tensor" in built.asm["ptx"],
        "copies": "cp.async.cg" in built.asm["ptx"],
        "scalar_stores": len(re.findall(r"st\.global\.b16", built.asm["ptx"])),
        "tile": [constants.get(n) for n in ("BM", "BN", "BK")],
    }


def resources(cubin: bytes) -> dict:
    """Registers and bytes of local memory (spills and stack) of a cubin, by Triton's own cuobjdump; reads and writes of
    it in the innermost loops with products."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        inside = 0
        if found["LOCAL"] or found["STACK"]:
            for code in machine_code(Path(file.name)).values():
                for loop in product_loops(code):
                    inside += sum(name.startswith(("LDL", "STL")) for name in loop)
    return {"registers": found["REG"], "local": found["LOCAL"], "stack": found["STACK"], "local_in_loops": inside}


def check_local(kernel: dict, capability: int, newest_at_most: int = 0) -> None:
    """On Hopper nothing spills in the loops with products; elsewhere nothing, or at most so many bytes, with the newest
    Triton, and little with older ones (3.6, whose Hopper code may spill outside these loops)."""
    spilled = kernel["local"] + kernel["stack"]
    newest = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    if capability == 90:
        assert kernel["local_in_loops"] == 0, kernel
    if newest or capability != 90:
        assert spilled <= (newest_at_most if newest else 512), kernel


def todo(capability: int, operand: str, tma: bool) -> list[tuple[str, dict, int, int]]:
    """(kernel, constants, warps, stages) of every kernel that a model can meet."""
    shared = {"GROUP": GROUP, "WIDEN": False, "TMA": tma}
    full = {"HAS_BIAS": True, "HAS_CAP": True, "ENTROPY": True}
    light = {**full, "HAS_CAP": False}  # the forward of a model without a soft cap, entropy on
    plain = {"HAS_BIAS": False, "HAS_CAP": False, "ENTROPY": False}
    found = []

    def add(name: str, t: Tiles, constants: dict) -> None:
        found.append((name, {"BM": t.BM, "BN": t.BN, "BK": t.BK, **shared, **constants}, t.warps, t.stages))

    dtype, chip = DTYPES[operand], (capability // 10, capability % 10)
    entropy = {**plain, "ENTROPY": True}
    for heavy, options in ((True, full), (False, light), (False, entropy), (False, plain)):
        t = score_tiles(dtype, chip, heavy, tma, None if options["HAS_BIAS"] else FORWARD_WIDE)
        add("forward_kernel", t, {"SPLIT": SPLIT_COLUMNS // t.BN, "NORMALIZE": True, **options})
    for heavy, options in ((True, full), (False, {**plain, "HAS_BIAS": True}), (False, plain)):
        add("dlogits_kernel", score_tiles(dtype, chip, heavy, tma, DLOGITS_WIDE), {"PRODUCTS": heavy, **options})
    add("dlogits_kernel", score_tiles(dtype, chip, True, tma), {"PRODUCTS": True, **plain})  # temperature is trained
    add("dhead_kernel", head_tiles(dtype, chip), {"BIAS": True})
    add("dhead_kernel", head_tiles(dtype, chip), {"BIAS": False})
    add("dhidden_kernel", hidden_tiles(dtype, chip), {"ADD": True, "LOW": operand == "bf16"})
    return found


def main(operand: str, which: str, *capabilities: int) -> None:
    """which: "all", or "few": each kernel once a generation, as a model without bias and soft cap meets it."""
    for capability in capabilities:
        paths = [False, True] if capability >= 90 and operand != "fp32" else [False]
        for tma in paths if which == "all" else paths[-1:]:
            seen = set()
            for name, constants, warps, stages in reversed(todo(capability, operand, tma)):
                if which == "all" or name not in seen:
                    print(json.dumps(compile_kernel(name, constants, capability, operand, warps, stages)), flush=True)
                seen.add(name)
        for name, constants, warps in ROW_KERNELS:
            print(json.dumps(compile_kernel(name, constants, capability, operand, warps, 3)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
