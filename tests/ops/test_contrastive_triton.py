"""Operator B on Triton: the kernels through the interpreter, and cross-compiled for real chips without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rime_fast.ops.contrastive import triton_sweep
from tests.ops.contrastive_cases import check_rule, make_case, run

pytest.importorskip("triton")
COMPILER = Path(__file__).with_name("compile_contrastive_triton.py")
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
interpreter = pytest.mark.skipif(not triton_sweep.interpreted(), reason="needs TRITON_INTERPRET=1 (no GPU)")


@interpreter
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.004])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_interpreted_kernels_obey_the_rule(dtype: torch.dtype, temperature: float, masked: bool) -> None:
    """Several tiles and superblocks each way, none of them whole; 0.02 takes the one-exponential path."""
    for symmetric in (True, False):
        case = make_case(
            70, 90, 19, temperature=temperature, shuffled=True, dtype=dtype, symmetric=symmetric, ids=masked,
            margin=0.05 if masked else None,
        )  # fmt: skip
        truth, eager = run(case, torch.float64, "reference"), run(case, dtype, "reference")
        check_rule(run(case, dtype, "triton"), eager, truth, dtype)


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
    monkeypatch.setattr(triton_sweep, "STRIPE", 32)
    monkeypatch.setattr(triton_sweep, "PANEL_BYTES", 32 * 64 * 4)
    check_rule(run(case, torch.float32, "triton"), whole, truth, torch.float32)


def test_fp64_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"triton.*fp64 runs on chunked or reference"):
        run(make_case(3, 3, 4), torch.float64, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_cross_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(COMPILER), str(capability), "bf16"],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 4
    for kernel in kernels:
        assert kernel["local"] == 0, kernel
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED_LIMIT[capability], kernel
        assert kernel[{80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]], kernel
