"""Cross-compiles the contrastive loss's Triton kernels and prints one JSON line a kernel; needs no GPU.

Run by test_contrastive_triton.py in a process of its own, without TRITON_INTERPRET:
    python tests/ops/compile_contrastive_triton.py 90 bf16 00,10,11 [pointers | nested | merge]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rime_fast.ops.contrastive import triton_kernels, triton_nested_kernels
from rime_fast.ops.contrastive.triton import tiles_for
from rime_fast.ops.contrastive.triton_nested import nested_tiles
from rime_fast.ops.contrastive.triton_parts import MERGED
from tests.ops.compile_logprob_triton import DTYPES, resources

OPERANDS = {"q", "k", "panel"}
TYPES = {
    "labels": "*i64",
    "label_range": "*i64",
    "row_ids": "*i32",
    "col_ids": "*i32",
    "bounded": "*i32",
    "edges": "*i32",
}
INTS = {
    "row_first",
    "col_first",
    "n",
    "n_keys",
    "width",
    "stride_q",
    "stride_k",
    "stride_panel",
    "plane_q",
    "first_row",
    "n_terms",
    "query_modes",
    "key_modes",
    "SM",
    "SN",
    "positives",
    "widths",
    "all_rows",
    "all_keys",
    "plane",
}


def compile_kernel(name: str, constants: dict[str, Any], capability: int, operand: str, tma: bool) -> dict[str, Any]:
    """Compile one kernel for one chip; what the gate looks at."""
    heavy = constants["MARGIN"] or constants.get("BOUNDED") is False
    nested = name.startswith("nested")
    tiles = tiles_for(name, DTYPES[operand], (capability // 10, capability % 10), tma, heavy)
    tiles = nested_tiles(DTYPES[operand]) if nested else tiles
    constants = {**constants, "BM": tiles.BM, "BN": tiles.BN, "BK": tiles.BK, "WIDEN": False, "PRECISION": "ieee"}
    constants |= {} if nested else {"EVEN": True, "TMA": tma}
    kernel = getattr(triton_nested_kernels if nested else triton_kernels, name)

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in INTS:
            return "i32"
        if tma and argument in ("q", "k"):
            return f"tensordesc<{operand}[{tiles.BM if argument == 'q' else tiles.BN},{tiles.BK}]>"
        return f"*{operand}" if argument in OPERANDS else TYPES.get(argument, "*fp32")

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    # Real embeddings have rows of a multiple of 16 bytes; knowing it, loads are wide and asynchronous.
    aligned = [
        i
        for i, a in enumerate(kernel.arg_names)
        if signature[a].startswith("*") or (signature[a] == "i32" and a.startswith(("width", "stride", "SM", "SN")))
    ]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(a),): v for a, v in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": name,
        "operand": operand,
        "ids": constants["IDS"],
        "margin": constants["MARGIN"],
        "bounded": constants.get("BOUNDED"),
        "tile": list(tiles),
        "shared": built.metadata.shared,
        **resources(built.asm["cubin"]),
        "wgmma": "wgmma.mma_async" in built.asm["ptx"],
        "mma": "mma.sync" in built.asm["ptx"],
        "tcgen05": "tcgen05.mma" in built.asm["ptx"],
        "tma": "cp.async.bulk.tensor" in built.asm["ptx"],
    }


def compile_merge(planes: int, capability: int) -> dict[str, Any]:
    """Compile the merge of rows (three planes) or of keys."""
    kernel = triton_kernels.merge_kernel
    types = {"running_sum": "*fp64", "PLANES": "constexpr", "BLOCK": "constexpr"}
    types |= dict.fromkeys(("n_parts", "size", "positives", "stride", "stride_known"), "i32")
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    constants = {"PLANES": planes, "BLOCK": MERGED}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(a),): v for a, v in constants.items()})
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    found = {"kernel": "merge_kernel", "shared": built.metadata.shared}
    return {**found, **resources(built.asm["cubin"]), "log 2 in fp64": "0d3FE62E42FEFA39EF" in built.asm["ptx"]}


if __name__ == "__main__":
    chip, dtype = int(sys.argv[1]), sys.argv[2]
    if "merge" in sys.argv:
        for planes in (2, 3):
            print(json.dumps(compile_merge(planes, chip)))
        sys.exit()
    variants = [tuple(flag == "1" for flag in word) for word in sys.argv[3].split(",")]  # ids and margin of each
    for ids, margin in variants:
        flags = {"IDS": ids, "MARGIN": margin}
        prefix = "nested_" if "nested" in sys.argv else ""
        for name, constants in (
            ("statistics_kernel", {**flags, "BOUNDED": True}),
            ("statistics_kernel", {**flags, "BOUNDED": False}),
            ("gradient_kernel", flags),
        ):
            tma = chip >= 90 and dtype != "fp32" and not {"pointers", "nested"} & set(sys.argv)
            found = compile_kernel(prefix + name, constants, chip, dtype, tma)
            print(json.dumps(found), flush=True)
