"""Cross-compiles operator B's Triton kernels and prints one JSON line a kernel; needs no GPU.

Run by test_contrastive_triton.py in a process of its own, without TRITON_INTERPRET:
    python tests/ops/compile_contrastive_triton.py 90 bf16
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rime_fast.ops.contrastive import triton_kernels as kernels
from rime_fast.ops.contrastive.triton_sweep import tiles_for
from tests.ops.compile_logprob_triton import DTYPES, resources

OPERANDS = {"q", "k", "panel"}
TYPES = {"labels": "*i64", "row_ids": "*i64", "col_ids": "*i64", "bounded": "*i32"}
INTS = {
    "row_first", "col_first", "n", "n_keys", "width", "stride_q", "stride_k", "stride_panel", "plane_q", "plane_k",
    "n_terms", "query_modes", "key_modes", "SM", "SN",
}  # fmt: skip


def compile_kernel(name: str, constants: dict[str, Any], capability: int, operand: str) -> dict[str, Any]:
    """Compile one kernel for one chip; what the gate looks at."""
    tiles = tiles_for(DTYPES[operand], (capability // 10, capability % 10))
    constants = {**constants, "BM": tiles.BM, "BN": tiles.BN, "BK": tiles.BK}
    constants |= {"WIDEN": False, "EVEN": True, "PRECISION": "ieee"}
    kernel = getattr(kernels, name)

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in INTS:
            return "i64" if argument.startswith("plane") else "i32"
        return f"*{operand}" if argument in OPERANDS else TYPES.get(argument, "*fp32")

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    # Real embeddings have rows of a multiple of 16 bytes; knowing it, loads are wide and asynchronous.
    aligned = [
        i for i, a in enumerate(kernel.arg_names)
        if (signature[a].startswith(("*", "i")) and a.startswith(("width", "stride", "plane", "SM", "SN")))
        or signature[a].startswith("*")
    ]  # fmt: skip
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(a),): v for a, v in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )  # fmt: skip
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": name, "operand": operand, "masks": constants["IDS"], "shared": built.metadata.shared,
        **resources(built.asm["cubin"]), "wgmma": "wgmma.mma_async" in built.asm["ptx"],
        "mma": "mma.sync" in built.asm["ptx"], "tcgen05": "tcgen05.mma" in built.asm["ptx"],
    }  # fmt: skip


if __name__ == "__main__":
    assert torch.bfloat16 in DTYPES.values()
    for name in ("statistics_kernel", "gradient_kernel"):
        for masks in (False, True):
            found = compile_kernel(name, {"IDS": masks, "MARGIN": masks}, int(sys.argv[1]), sys.argv[2])
            print(json.dumps(found), flush=True)
