"""The Triton backend of operator A: numbers through the interpreter, code through the cross-compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from rime_fast.ops.logprob_pool import fused_linear_ce, fused_logprob_pool, triton_backend
from tests.ops.logprob_cases import Case, assert_close_to_truth

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_backend.interpreted(), reason="the interpreter is for machines without CUDA"
)
device_type = "cuda" if torch.cuda.is_available() else "cpu"


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", ["recompute", "forward"])
def test_close_to_truth(dtype: torch.dtype, schedule: str) -> None:
    for case in (
        Case(37, 40, 300, dtype, softcap=5.0),
        Case(7, 33, 123, dtype, scored="all", bias=False),
        Case(1, 5, 3, dtype, scored="all"),
        Case(9, 16, 40, dtype, scored="none"),
    ):
        assert_close_to_truth(case, case.run("triton", schedule=schedule), schedule)


@needs_interpreter
@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_flat_and_peaked_logits(spread: float) -> None:
    case = Case(33, 40, 300, spread=spread, scored="one")
    assert_close_to_truth(case, case.run("triton"))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_panels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "PANEL_BYTES", 37 * 4 * 64)
    case = Case(37, 17, 150, dtype, scored="all")
    assert_close_to_truth(case, case.run("triton"))


@needs_interpreter
def test_batch_invariant_and_deterministic() -> None:
    # Small whole numbers: the interpreter's product (numpy's) is exact, so that what is tested is ours.
    hidden, lm_head = torch.randint(-3, 4, (75, 24)).float(), torch.randint(-1, 2, (300, 24)).float()
    targets = torch.randint(0, 300, (75,))
    whole = fused_logprob_pool(hidden, lm_head, targets, entropy=True, backend="triton")
    for rows in ([5], [74], [3, 5, 9, 50, 51, 70, 74]):
        part = fused_logprob_pool(hidden[rows], lm_head, targets[rows], backend="triton")
        assert torch.equal(part.logp, whole.logp[rows])
    case = Case(37, 40, 300)
    first, second = case.run("triton"), case.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_interpreter
def test_frozen_head_and_empty_batch() -> None:
    case = Case(9, 16, 40)
    leaves, t = case.leaves(), case.tensors
    every = case.run("triton", schedule="forward")
    loss, out = fused_linear_ce(
        leaves["hidden"], leaves["lm_head"].detach(), t["targets"], token_weight=t["token_weight"],
        **case.options(leaves, backend="triton"),
    )  # fmt: skip
    assert torch.equal(case.collect({"hidden": leaves["hidden"]}, loss, out)["d_hidden"], every["d_hidden"])
    empty = torch.empty(0, 16, requires_grad=True)
    loss, _ = fused_linear_ce(empty, leaves["lm_head"], torch.empty(0, dtype=torch.long), backend="triton")
    assert torch.autograd.grad(loss, leaves["lm_head"])[0].count_nonzero() == 0


@needs_interpreter
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_outs(dtype: torch.dtype, normalize: bool) -> None:
    """The kernels of CUDA without csrc against those in use on the CPU, spans that share rows included."""
    from rime_fast.ops.logprob_pool import pooling, triton_pool

    hidden = torch.randn(9, 33).to(dtype)
    hidden[7] = 0.0
    starts, ends = torch.tensor([2, 0, 4, 7]), torch.tensor([3, 9, 5, 8])
    expected, norms = pooling.pool_forward(hidden, starts, ends, normalize)
    pooled, inv_norm = torch.empty_like(expected), torch.empty_like(norms)
    triton_pool.pool_forward(hidden, starts, ends, normalize, pooled, inv_norm, pooling.EPSILON)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(inv_norm, norms)
    grad, found, wanted = torch.randn(4, 33), torch.zeros_like(hidden), torch.zeros_like(hidden)
    grad[3] *= 1e-12  # the zero row's factor is 1e12
    pooling.pool_backward_(wanted, grad, expected, norms, starts, ends, normalize)
    triton_pool.pool_backward(found, grad, expected, norms, starts, ends, normalize, pooling.EPSILON)
    # The interpreter cuts to bf16 where the hardware rounds: 1/64 for values in [2, 4), in each of two additions.
    torch.testing.assert_close(found, wanted, **({} if dtype == torch.float32 else {"rtol": 0.0, "atol": 0.04}))


def test_compaction_keeps_the_order() -> None:
    targets = torch.tensor([-100, 4, -100, -100, 0, 2, -100], device=device_type)
    order, count = triton_backend.scored_rows(targets, -100)
    assert int(count) == 3
    assert order[:3].tolist() == [1, 4, 5]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("operand", ["bf16", pytest.param("fp16", marks=pytest.mark.slow), "fp32"])
def test_compiles_without_spills(capability: int, operand: str) -> None:
    """Every kernel becomes machine code: nothing in local memory, shared memory fits, tensor cores used."""
    if operand == "fp32" and capability != 90:
        pytest.skip("fp32 operands use no tensor cores: one generation stands for all")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    script = ROOT / "tests" / "ops" / "compile_logprob_triton.py"
    done = subprocess.run(
        [sys.executable, script, str(capability), operand], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {b["kernel"] for b in built} == {
        "forward_kernel", "merge_kernel", "dlogits_kernel", "dhead_kernel", "dhidden_kernel", "scatter_kernel"
    }  # fmt: skip
    for kernel in built:
        assert kernel["local"] == kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED_LIMIT[capability], kernel
        if operand != "fp32" and kernel["kernel"] not in ("merge_kernel", "scatter_kernel"):
            assert kernel[{80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]], kernel


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("schedule", ["recompute", "forward"])
def test_on_the_gpu(dtype: torch.dtype, backend: str, schedule: str) -> None:
    for shape in ((57, 96, 123), (507, 1537, 32003), (1, 96, 123)):
        case = Case(*shape, dtype, scored="all" if shape[0] == 1 else "some")
        case.tensors = {name: tensor.cuda() for name, tensor in case.tensors.items()}
        assert_close_to_truth(case, case.run(backend, schedule=schedule), schedule)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_on_the_gpu(dtype: torch.dtype) -> None:
    hidden, lm_head = torch.randn(1023, 96, dtype=dtype).cuda(), torch.randn(32003, 96, dtype=dtype).cuda()
    targets = torch.randint(0, 32003, (1023,)).cuda()
    whole = fused_logprob_pool(hidden, lm_head, targets, backend="triton")
    for rows in ([5], [1022], [3, 5, 9, 500, 501, 1000, 1022]):
        part = fused_logprob_pool(hidden[rows], lm_head, targets[rows], entropy=True, backend="triton")
        assert torch.equal(part.logp, whole.logp[rows])
