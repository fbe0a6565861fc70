"""The contrastive loss on Triton: the kernels through the interpreter, and cross-compiled without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rime_fast.ops import dispatch
from rime_fast.ops.contrastive import triton as on_triton
from rime_fast.ops.contrastive import triton_parts
from tests.ops.compile_logprob_triton import check_local
from tests.ops.contrastive_cases import check_rule, make_case, run

pytest.importorskip("triton")
COMPILER = Path(__file__).with_name("compile_contrastive_triton.py")
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
interpreter = pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1 (no GPU)")


@interpreter
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.004])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_interpreted_kernels_obey_the_rule(dtype: torch.dtype, temperature: float, masked: bool) -> None:
    """Several tiles and superblocks, none whole; 0.02: one exponential. Rows of 24 halves come by descriptor (TMA)."""
    width, symmetric = (19, True) if dtype == torch.float32 else (24, not masked)
    case = make_case(
        70,
        90,
        width,
        temperature=temperature,
        shuffled=True,
        dtype=dtype,
        symmetric=symmetric,
        ids=masked,
        margin=0.05 if masked else None,
    )
    truth, eager = run(case, torch.float64, "reference"), run(case, dtype, "reference")
    check_rule(run(case, dtype, "triton"), eager, truth, dtype)


@interpreter
def test_descriptors_and_pointers_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that start on 16 bytes come by descriptor; others, and those of older chips, by pointers."""
    case = make_case(40, 70, 24, shuffled=True, ids=True, dtype=torch.float16)
    assert on_triton.uses_descriptors(case.queries["disc"].half(), case.keys["disc"].half())
    assert not on_triton.uses_descriptors(case.queries["disc"][:, 1:].half(), case.keys["disc"].half()[:, :23])
    by_descriptor = run(case, torch.float16, "triton")
    monkeypatch.setattr(on_triton, "INTERPRETER_TMA", False)
    by_pointer = run(case, torch.float16, "triton")
    assert torch.equal(by_descriptor.out.loss, by_pointer.out.loss)
    for name, gradient in by_pointer.gradients.items():
        assert torch.equal(by_descriptor.gradients[name], gradient), name


@interpreter
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 5, 7)], ids=str)
def test_interpreted_kernels_on_tiny_batches(shape: tuple[int, int, int]) -> None:
    case = make_case(*shape, temperature=0.02, peaked=True)
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    check_rule(run(case, torch.float32, "triton"), eager, truth, torch.float32)


@interpreter
def test_stripes_and_panels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in several launches, the gradient in several panels: the same numbers to rounding."""
    case = make_case(70, 90, 8, shuffled=True, ids=True)
    truth, whole = run(case, torch.float64, "reference"), run(case, torch.float32, "triton")
    monkeypatch.setattr(triton_parts, "STRIPE", 32)
    monkeypatch.setattr(triton_parts, "PANEL_BYTES", 32 * 64 * 4)
    check_rule(run(case, torch.float32, "triton"), whole, truth, torch.float32)


@interpreter
@pytest.mark.parametrize(
    ("dtype", "temperature", "masked"),
    [
        (torch.float32, 0.02, True),
        (torch.float32, 0.004, False),
        (torch.float16, 0.02, False),
        (torch.float16, 0.004, True),
    ],
)
def test_interpreted_widths_obey_the_rule(dtype: torch.dtype, temperature: float, masked: bool) -> None:
    """Several tiles, none whole, widths of no multiple of anything."""
    options: dict[str, Any] = {"ids": True, "margin": 0.05} if masked else {"positives": 2}
    case = make_case(40, 70, 24, temperature=temperature, dtype=dtype, symmetric=not masked, **options)
    case = replace(case, settings={**case.settings, "dims": [5, 16, 23], "dim_weights": [1.0, 0.5, 2.0]})
    truth, eager = run(case, torch.float64, "reference"), run(case, dtype, "reference")
    check_rule(run(case, dtype, "triton"), eager, truth, dtype)


@interpreter
def test_a_width_of_one_has_no_gradient() -> None:
    case = make_case(40, 70, 20)
    for rows in (*case.queries.values(), *case.keys.values()):
        rows[:, 0] = (1e-5 * rows[:, 0]).float()
    case = replace(case, settings={**case.settings, "dims": [1, 3, 20]})
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    found = run(case, torch.float32, "triton")
    found.out = replace(found.out, accuracy=truth.out.accuracy)  # signs tie: rounding says which of them hits
    check_rule(found, eager, truth, torch.float32)


@interpreter
def test_stripes_and_panels_of_widths_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(40, 70, 20, shuffled=True, ids=True)
    case = replace(case, settings={**case.settings, "dims": [3, 20]})
    truth, whole = run(case, torch.float64, "reference"), run(case, torch.float32, "triton")
    monkeypatch.setattr(triton_parts, "STRIPE", 32)
    monkeypatch.setattr(triton_parts, "PANEL_BYTES", 2 * 32 * 64 * 4)
    check_rule(run(case, torch.float32, "triton"), whole, truth, torch.float32)


def test_fp64_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"triton.*fp64 runs on chunked or reference"):
        run(make_case(3, 3, 4), torch.float64, "triton")


def compiled(capability: int, *arguments: str, folder: Path) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(COMPILER), str(capability), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_resources(kernels: list[dict[str, Any]], capability: int) -> None:
    for kernel in kernels:
        check_local(kernel, capability)
        assert kernel["shared"] <= SHARED_LIMIT[capability], kernel


def test_cross_compiles_for_hopper(tmp_path: Path) -> None:
    """RIME's usual case (bf16, ids masked, any margin left to the slow test): tensor cores by TMA, nothing spilled."""
    kernels = compiled(90, "bf16", "10", folder=tmp_path)
    check_resources(kernels, 90)
    assert [(k["kernel"], k["bounded"]) for k in kernels] == [
        ("statistics_kernel", True),
        ("statistics_kernel", False),
        ("gradient_kernel", None),
    ]
    for kernel in kernels:
        assert kernel["wgmma"], kernel
        assert kernel["tma"], kernel
    assert kernels[0]["tile"][:2] == [128, 128]


def test_widths_cross_compile_for_hopper(tmp_path: Path) -> None:
    kernels = compiled(90, "bf16", "10", "nested", folder=tmp_path)
    check_resources(kernels, 90)
    assert [kernel["wgmma"] for kernel in kernels] == [True] * 3


def test_the_merge_cross_compiles_with_exact_constants(tmp_path: Path) -> None:
    """A factor rounded to fp32 would cost the digits that the merge keeps in fp64."""
    kernels = compiled(90, "fp32", "00", "merge", folder=tmp_path)
    check_resources(kernels, 90)
    assert [kernel["log 2 in fp64"] for kernel in kernels] == [True] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", ["bf16 00,10,11", "fp16 11", "fp32 11", "bf16 11 pointers", "bf16 00,11 nested", "fp32 11 nested"]
)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_cross_compiles_without_spills(capability: int, arguments: str, tmp_path: Path) -> None:
    kernels = compiled(capability, *arguments.split(), folder=tmp_path)
    assert len(kernels) == 3 * len(arguments.split()[1].split(","))
    check_resources(kernels, capability)
    for kernel in kernels:
        if "fp32" not in arguments:
            assert kernel[{80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]], kernel
            assert kernel["tma"] == (capability >= 90 and not {"pointers", "nested"} & set(arguments.split())), kernel
