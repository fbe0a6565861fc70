"""The Triton backend of the log-prob operator: numbers through the interpreter, code through the cross-compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from rime_fast.ops.logprob_pool import cuda, fused_linear_ce, fused_logprob_pool, read_outs, triton
from rime_fast.ops.logprob_pool.problem import Spans, workspace_limit
from rime_fast.ops.logprob_pool.triton_tiles import FORWARD_ROWS, SPLIT_COLUMNS, Plan, interpreted, plan
from tests.ops.compile_logprob_triton import check_local
from tests.ops.error_rule import assert_rule
from tests.ops.logprob_cases import Case, assert_close_to_truth, relative

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or not interpreted(), reason="the interpreter is for machines without CUDA"
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
    """Small workspaces: several launches of the forward, panels of columns, groups of rows."""
    monkeypatch.setattr(triton, "FORWARD_ROWS", 32)
    for width, rows, columns in ((17, 37, 64), (32, 16, 32), (32, 37, 96)):
        monkeypatch.setattr(triton, "plan", lambda *_, rows=rows, columns=columns: Plan(rows, columns, 0))
        case = Case(37, width, 150, dtype, scored="all")
        assert_close_to_truth(case, case.run("triton"))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_descriptors_and_pointers_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TMA path computes the same products in the same order: the same bits."""
    case = Case(37, 40, 300, dtype, softcap=5.0)
    found = []
    for tma in (True, False):
        monkeypatch.setattr(triton, "INTERPRETER_TMA", tma)
        assert triton.uses_tma(case.tensors["lm_head"]) == tma
        found.append(case.run("triton"))
    for name, value in found[0].items():
        # fp32 operands reach numpy's product in another layout, which may change its last bit.
        same = relative(value, found[1][name]) < 1e-6 if dtype == torch.float32 else torch.equal(value, found[1][name])
        assert same, name
    assert not triton.uses_tma(torch.zeros(4, 33, dtype=torch.bfloat16))
    assert not triton.uses_tma(torch.zeros(4, 64)[:, ::2])
    assert not triton.uses_tma(torch.zeros(4, 65, dtype=dtype)[:, 1:])


@pytest.mark.parametrize("width", [96, 1536, 4096])
@pytest.mark.parametrize("vocabulary", [32_003, 151_936, 248_320])
def test_workspace_stays_within_the_limit(vocabulary: int, width: int) -> None:
    limit = workspace_limit()
    for capacity in (1, 507, 8192, 16_384, 65_536):
        for itemsize, low in ((2, True), (2, False), (4, False)):
            for rest in (False, True):
                cut = plan(capacity, width, vocabulary, itemsize, low, rest, limit)
                rows = max(cut.rows, capacity if rest else 0)
                panel = rows * cut.columns * itemsize
                assert panel + (2 * cut.rows * width if low else 0) <= cut.workspace <= limit
                assert cut.columns >= 512
                assert cut.rows >= min(capacity, 16_384)
        partial = 4 * 4 * min(capacity, FORWARD_ROWS) * -(-vocabulary // SPLIT_COLUMNS)
        assert partial <= limit


@needs_interpreter
def test_batch_invariant_and_deterministic() -> None:
    # Small whole numbers: the interpreter's product (numpy's) is exact, so that what is tested is ours.
    hidden, lm_head = torch.randint(-3, 4, (1023, 16)).float(), torch.randint(-1, 2, (70, 16)).float()
    targets = torch.randint(0, 70, (1023,))
    whole = fused_logprob_pool(hidden, lm_head, targets, entropy=True, backend="triton")
    for rows in ([5], [1022], [3, 5, 9, 50, 51, 70, 1022]):
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
        leaves["hidden"],
        leaves["lm_head"].detach(),
        t["targets"],
        token_weight=t["token_weight"],
        **case.options(leaves, backend="triton"),
    )
    assert torch.equal(case.collect({"hidden": leaves["hidden"]}, loss, out)["d_hidden"], every["d_hidden"])
    empty = torch.empty(0, 16, requires_grad=True)
    loss, _ = fused_linear_ce(empty, leaves["lm_head"], torch.empty(0, dtype=torch.long), backend="triton")
    assert torch.autograd.grad(loss, leaves["lm_head"])[0].count_nonzero() == 0


@needs_interpreter
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_outs(dtype: torch.dtype, normalize: bool) -> None:
    """The kernels of CUDA without csrc against those in use on the CPU, spans that share rows included."""
    hidden = torch.randn(9, 33).to(dtype)
    hidden[7] = 0.0
    spans = Spans(torch.tensor([2, 0, 4, 7]), torch.tensor([3, 9, 5, 8]))
    expected, norms = read_outs.read_outs_forward(hidden, spans, normalize)
    pooled, inv_norm = triton.read_outs_forward(hidden, spans, normalize)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(inv_norm, norms)
    grad = torch.randn(4, 33)
    grad[3] *= 1e-12  # the zero row's factor is 1e12
    rows = read_outs.row_gradients(grad, read_outs.ReadOuts(expected, norms), spans, normalize)
    for factor in (None, torch.tensor(0.5)):
        before = torch.full((9, 33), torch.nan if factor is None else 2.0, dtype=dtype)
        found, wanted = before.clone(), before.clone()
        read_outs.start_gradient_(wanted, factor, rows, spans)
        triton.start_gradient_(found, factor, rows, spans)
        # The interpreter cuts to bf16 where the hardware rounds: 1/64 for values in [2, 4), in each of two additions.
        torch.testing.assert_close(found, wanted, **({} if dtype == torch.float32 else {"rtol": 0.0, "atol": 0.04}))


def _compiled(operand: str, which: str, *capabilities: int) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, ROOT / "tests" / "ops" / "compile_logprob_triton.py", operand, which]
    done = subprocess.run(
        [*command, *map(str, capabilities)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check_compiled(operand: str, which: str, *capabilities: int) -> None:
    """Every kernel becomes machine code: nothing in local memory, shared memory fits, tensor cores and TMA used."""
    built = _compiled(operand, which, *capabilities)
    paths = {"forward_kernel", "dlogits_kernel", "dhead_kernel", "dhidden_kernel"}
    for capability in capabilities:
        assert {b["kernel"] for b in built if b["capability"] == capability} == paths | {
            "places_kernel",
            "gather_kernel",
            "scatter_kernel",
            "pick_kernel",
            "spread_kernel",
            "merge_kernel",
            "read_outs_kernel",
            "start_gradient_kernel",
            "row_statistics_kernel",
            "row_gradient_kernel",
        }
        described = {b["kernel"] for b in built if b["capability"] == capability and b["descriptors"]}
        assert described == (set() if operand == "fp32" or capability == 80 else paths)
    for kernel in built:
        # Some bytes of the largest tiles outside their loops; on sm_100 of a soft cap with the entropy.
        largest = ("forward_kernel", "dlogits_kernel", "dhead_kernel")
        spills = kernel["capability"] != 80 and kernel["kernel"] in largest
        check_local(kernel, kernel["capability"], 64 if spills else 0)
        assert kernel["shared"] <= SHARED_LIMIT[kernel["capability"]], kernel
        assert not (kernel["kernel"].startswith("row_") and kernel["scalar_stores"]), kernel
        assert kernel["tma"] == bool(kernel["descriptors"]), kernel
        if kernel["kernel"] in paths:
            assert kernel["tma" if kernel["descriptors"] else "copies"], kernel
        if operand != "fp32" and kernel["kernel"] in paths:
            assert kernel[{80: "mma", 90: "wgmma", 100: "tcgen05"}[kernel["capability"]]], kernel


def test_compiles_without_spills() -> None:
    _check_compiled("bf16", "few", 80, 90, 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operand", "capability"), [("fp32", 90), *((t, c) for t in ("bf16", "fp16") for c in SHARED_LIMIT)]
)
def test_every_variant_compiles_without_spills(operand: str, capability: int) -> None:
    """fp32 operands use no tensor cores: one generation stands for all."""
    _check_compiled(operand, "all", capability)


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_plain_logits_on_the_gpu(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bias, and with temperature and entropy not trained; several panels."""
    monkeypatch.setenv("RIME_FAST_WORKSPACE_MIB", "16")
    monkeypatch.setattr(cuda, "TILED_ROWS", 100)
    for shape, scored in (((57, 96, 123), "some"), ((507, 1536, 32003), "all"), ((700, 64, 9999), "some")):
        case = Case(*shape, dtype, scored=scored, bias=False)
        case.tensors = {name: tensor.cuda() for name, tensor in case.tensors.items()}
        found, truth, eager = case.run_plain(backend), *(case.eager(d, "forward") for d in (torch.float64, None))
        for name, value in found.items():
            assert_rule(f"{name} of {case}", value, eager[name], truth[name], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_batch_invariant_on_the_gpu(dtype: torch.dtype, backend: str) -> None:
    hidden, lm_head = torch.randn(1023, 96, dtype=dtype).cuda(), torch.randn(32003, 96, dtype=dtype).cuda()
    targets = torch.randint(0, 32003, (1023,)).cuda()
    whole = fused_logprob_pool(hidden, lm_head, targets, backend=backend)
    for rows in ([5], [1022], [3, 5, 9, 500, 501, 1000, 1022]):
        part = fused_logprob_pool(hidden[rows], lm_head, targets[rows], entropy=True, backend=backend)
        assert torch.equal(part.logp, whole.logp[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("max_scored", [None, 507])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_nothing_waits_for_the_gpu(backend: str, max_scored: int | None) -> None:
    case = Case(507, 96, 32003, torch.bfloat16)
    case.tensors = {name: tensor.cuda() for name, tensor in case.tensors.items()}

    def step() -> None:
        leaves, t = case.leaves(), case.tensors
        options = case.options(leaves, backend=backend, max_scored=max_scored, entropy=True)
        args = leaves["hidden"], leaves["lm_head"], t["targets"]
        loss, _ = fused_linear_ce(*args, token_weight=t["token_weight"], **options)
        out = fused_logprob_pool(*args, **options)
        total = loss + out.logp.sum() + out.entropy.sum() + out.embeddings["mean"].sum()
        torch.autograd.grad(total, list(leaves.values()))

    step()  # compiles, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("rows", [2048, 20_000])
def test_peak_memory_on_the_gpu(backend: str, rows: int) -> None:
    """Beyond inputs, results and gradients a step allocates no more than the workspace limit (and T-sized vectors);
    where the logits come in several chunks also the head's gradient in fp32."""
    hidden = torch.randn(rows, 2048, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    lm_head = torch.randn(151_936, 2048, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    targets = torch.randint(0, 151_936, (rows,), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = fused_linear_ce(hidden, lm_head, targets, backend=backend)
        grads = torch.autograd.grad(loss, (hidden, lm_head))
        peak = torch.cuda.max_memory_allocated() - before
        del loss, grads
    limit = workspace_limit(lm_head.nbytes, lm_head)
    chunks = backend == "chunked" and 2 * rows * len(lm_head) > limit
    allowed = hidden.nbytes + lm_head.nbytes + limit + 2 * chunks * lm_head.nbytes
    assert peak <= allowed + 100 * rows + (32 << 20)
