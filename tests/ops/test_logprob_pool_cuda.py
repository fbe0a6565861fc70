"""The log-prob operator's schedule for CUDA (library products over panels of the vocabulary), run on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rime_fast.ops.logprob_pool import cuda, fused_linear_ce, fused_logprob_pool, op, places, problem, triton
from rime_fast.ops.logprob_pool import rows as row_kernels
from rime_fast.ops.logprob_pool.problem import Needs, Options, Problem, Scoring, Spans, Upstream
from tests.ops.error_rule import assert_rule
from tests.ops.logprob_cases import Case, assert_close_to_truth

SCHEDULES = ["recompute", "forward"]


@pytest.fixture(autouse=True)
def _on_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "schedule_for", lambda backend, hidden: cuda)


def _small(monkeypatch: pytest.MonkeyPatch, limit: int, rows: int = 32) -> None:
    """Blocks of ``rows`` rows and ``limit`` bytes of workspace."""
    monkeypatch.setattr(cuda, "ROWS", rows)
    monkeypatch.setattr(cuda, "workspace_limit", lambda *_: limit)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_close_to_truth(schedule: str, dtype: torch.dtype, softcap: float | None) -> None:
    for shape in ((1, 96, 123), (7, 1537, 123), (507, 96, 123), (3, 1, 1)):
        case = Case(*shape, dtype, scored="all" if shape[0] < 8 else "some", softcap=softcap)
        assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (5.0, True)])
def test_close_to_truth_by_tritons_row_kernels(
    schedule: str, dtype: torch.dtype, softcap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_kernels, "_kernels", lambda _: "triton")
    monkeypatch.setattr(places, "by_triton", lambda _: True)
    _small(monkeypatch, 32 << 20, rows=8)  # few programs for the interpreter
    for shape, spread in (((5, 96, 123), 1.0), ((11, 64, 5003), 30.0)):
        case = Case(*shape, dtype, softcap=softcap, bias=bias, temperature=1.3, spread=spread)
        assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [30_000, 300_000])
def test_close_to_truth_by_tritons_tiles(dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain head's logits, as an sm_90 makes them; in panels and groups of rows, and scored rows fewer than T."""
    monkeypatch.setattr(cuda, "tiled", lambda call: call.scoring.bias is None)
    monkeypatch.setattr(cuda, "TILED_ROWS", 1)
    monkeypatch.setattr(places, "by_triton", lambda _: True)
    _small(monkeypatch, limit)
    made: list[int] = []
    tiles = triton.dlogits
    monkeypatch.setattr(triton, "dlogits", lambda *given: made.append(given[8]) or tiles(*given))
    for scored in ("some", "all", "none"):
        case = Case(61, 96, 517, dtype, scored=scored, bias=False)
        found, truth, eager = case.run_plain("chunked"), *(case.eager(d, "forward") for d in (torch.float64, None))
        for name, value in found.items():
            assert_rule(f"{name} of {case}", value, eager[name], truth[name], dtype)
    assert (max(made) > 0) == (limit == 30_000)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_row_kernels_alone(
    narrow: torch.dtype, kernels: str, outside: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics, gradient in place (narrow too) and products against fp64, over a target that is another rank's; five
    rows, more than the interpreter has programs."""
    monkeypatch.setattr(row_kernels, "_kernels", lambda _: kernels)
    logits = torch.randn(5, 4500) * 10
    z = (logits.double() / 1.3).requires_grad_()
    targets = torch.tensor([0, 4499, -5 if outside else 7, 4000, 1])
    g, h = torch.randn(5), torch.zeros(5) if at_once else torch.randn(5)
    inside = (targets >= 0).double()
    picked = z.gather(1, targets.clamp(min=0)[:, None])[:, 0] * inside
    lse = z.logsumexp(1)
    entropy = -(z.log_softmax(1).exp() * z.log_softmax(1)).sum(1)
    (dz,) = torch.autograd.grad((g * (picked - lse)).sum() + (h * entropy).sum(), z)
    scoring = Scoring(None, torch.tensor(1.3), None)
    memory = logits.data_ptr()
    if at_once:
        copy = logits.clone()
        found, dlogits, products = row_kernels.rows_both_(logits, targets, scoring, g, True, narrow, True)
        bare, same, _ = row_kernels.rows_both_(copy, targets, scoring, g, False, narrow, False)
        assert torch.equal(same, dlogits)
        assert torch.equal(bare.lse, found.lse)
    else:
        found = row_kernels.rows_forward(logits, targets, scoring, True)
        dlogits, products = row_kernels.rows_backward_(logits, targets, scoring, found, Upstream(g, h), narrow)
    torch.testing.assert_close(found.lse.double().sum(0), lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.target_logit.double(), picked, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=0)
    assert dlogits.data_ptr() == memory or kernels == "torch"
    torch.testing.assert_close(dlogits.double(), dz / 1.3, rtol=2 * torch.finfo(narrow).eps, atol=3e-6)
    wanted = (dz * (z - picked[:, None])).sum(1)
    torch.testing.assert_close(products.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scored", ["all", "one", "none"])
@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_flat_and_peaked_logits(schedule: str, scored: str, spread: float) -> None:
    case = Case(33, 64, 517, scored=scored, spread=spread, bias=spread > 1, temperature=1.3)
    assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [60_000, 300_000])
def test_several_blocks_panels_and_groups(limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch, limit)
    case = Case(201, 96, 517, dtype, scored="all")
    cut = cuda.plan(201, 96, 517, torch.finfo(dtype).bits // 8, limit)
    assert cut.columns < 517
    assert (cut.rows < 201) == (limit == 60_000)
    assert cuda.forward_columns(517, limit) < 517 or limit == 300_000
    for schedule in SCHEDULES:
        assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_from_the_forwards_logits(chunks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows, in one chunk and in several whose dW adds up; each product of logits is made once."""
    _small(monkeypatch, 300 * 517 * dtype.itemsize if chunks == 1 else 96 * 517 * dtype.itemsize)
    monkeypatch.setattr(cuda, "WORTHWHILE", 64)
    case = Case(201, 96, 517, dtype, scored="all", softcap=5.0 if chunks == 1 else None)
    made: list[tuple[int, ...]] = []
    both, backward = cuda.rows_both_, cuda.backward
    monkeypatch.setattr(cuda, "rows_both_", lambda z, *rest: made.append(tuple(z.shape)) or both(z, *rest))
    monkeypatch.setattr(cuda, "backward", lambda *_: pytest.fail("the logits were made twice"))
    found = case.run("chunked", schedule="forward")
    assert made == ([(201, 517)] if chunks == 1 else [(96, 517), (96, 517), (9, 517)])
    monkeypatch.setattr(cuda, "backward", backward)
    assert_close_to_truth(case, found, "forward")
    again = case.run("chunked", schedule="forward")
    assert all(torch.equal(found[name], again[name]) for name in found)
    # fp32 logits by the switch; 16-bit ones round once more.
    monkeypatch.setattr(cuda, "WORTHWHILE", 1)
    monkeypatch.setenv("RIME_FAST_FP32_LOGITS", "1")
    exact = case.run("chunked", schedule="forward")
    assert_close_to_truth(case, exact, "forward")
    assert torch.equal(exact["logp"], found["logp"]) == (dtype == torch.float32)


def test_whole_rows_of_the_published_sizes() -> None:
    """By the default workspace: R = H rows of bf16 logits; every size of a benchmark in so many chunks."""
    for width, rows, chunks in ((4096, 8192, 2), (4096, 819, 1), (1536, 819, 1), (3584, 8192, 3), (2048, 8192, 4)):
        limit = problem.workspace_limit(2 * width * 151_936)
        size = cuda.whole_rows(rows, 151_936, 2, limit)
        assert size * 151_936 * 2 <= limit
        assert -(-rows // size) == chunks
    assert cuda.whole_rows(8192, 151_936, 2, problem.workspace_limit(2 * 896 * 151_936)) == 0  # 512 rows a chunk
    assert cuda.whole_rows(0, 151_936, 2, 256 << 20) == 0


@pytest.mark.parametrize("trained", ["hidden", "lm_head", "bias", "temperature"])
@pytest.mark.parametrize("limit", [60_000, 1 << 20])
def test_frozen_inputs(trained: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch, limit)
    case = Case(201, 96, 77, scored="all")
    every = case.run("chunked", schedule="forward")
    leaves = {n: t.detach().requires_grad_(n == trained) for n, t in case.leaves().items()}
    loss, out = fused_linear_ce(
        leaves["hidden"],
        leaves["lm_head"],
        case.tensors["targets"],
        token_weight=case.tensors["token_weight"],
        **case.options(leaves, backend="chunked"),
    )
    found = case.collect({trained: leaves[trained]}, loss, out)
    torch.testing.assert_close(found[f"d_{trained}"], every[f"d_{trained}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_and_deterministic(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits alone, among 7, among 1,023 and for any capacity; two panels of columns."""
    _small(monkeypatch, 300_000, rows=128)
    hidden, lm_head = torch.randn(1023, 96).to(dtype), torch.randn(700, 96).to(dtype)
    targets = torch.randint(0, 700, (1023,))
    assert cuda.forward_columns(700, 300_000) < 700
    options = {"temperature": 0.9, "entropy": True, "backend": "chunked"}
    whole = fused_logprob_pool(hidden, lm_head, targets, **options)
    for rows in ([5], [1022], [3, 5, 9, 500, 501, 1000, 1022]):
        part = fused_logprob_pool(hidden[rows], lm_head, targets[rows], **options)
        assert torch.equal(part.logp, whole.logp[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])
        few = torch.full_like(targets, -100)
        few[rows] = targets[rows]
        assert torch.equal(fused_logprob_pool(hidden, lm_head, few, max_scored=8, **options).logp[rows], part.logp)
    case = Case(130, 96, 517, dtype)
    first, second = case.run("chunked"), case.run("chunked")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_padding_is_harmless() -> None:
    """Places past the scored rows: NaN in the rows there, scores whose exponential overflows, no gradient from them."""
    case = Case(20, 16, 50, scored="some")
    case.tensors["bias"] += 150.0
    case.tensors["hidden"][case.tensors["targets"] == -100] = float("nan")
    case.pools = False
    assert (case.tensors["targets"] == -100).any()
    found = case.run("chunked")
    assert all(value.isfinite().all() for value in found.values())
    truth = Case(20, 16, 50, scored="some", pools=False)
    truth.tensors = case.tensors | {"hidden": case.tensors["hidden"].nan_to_num()}
    assert_close_to_truth(truth, found)


class _NoSync(TorchDispatchMode):
    """Fails on whatever would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("nonzero", "_local_scalar_dense", "masked_select", "item")
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(40, 16, 50)
    t = case.tensors
    scoring = Scoring(t["bias"].float(), t["temperature"], None)
    options = Options("chunked", entropy=True, max_scored=30, needs=Needs(True, True, True, True))
    spans = Spans(t["starts"], t["ends"])
    call = Problem(t["hidden"], t["lm_head"], t["targets"], scoring, spans, options)
    # CUDA's read-outs are Triton's; those of the CPU look at the spans.
    monkeypatch.setattr(cuda.read_outs, "read_outs_forward", lambda *_: None)
    with _NoSync():
        stats, _ = cuda.forward(call)
        found = cuda.backward(call, stats, Upstream(t["token_weight"], t["grad_entropy"]), None)
    assert all(grad is not None and grad.isfinite().all() for grad in found)
    with pytest.raises(AssertionError), _NoSync():
        t["targets"].nonzero()


def test_compaction() -> None:
    targets = torch.tensor([-100, 4, -100, -100, 0, 2, -100])
    every = [1, 4, 5, 7, 7, 7, 7]
    for capacity, order in ((-1, every), (3, every[:3]), (4, every[:4]), (99, every)):
        scored = problem.scored_rows(targets == -100, capacity)
        assert scored.order.tolist() == order
        assert int(scored.number) == 3
    part = problem.scored_rows(targets == -100).part(2, 3)
    assert (part.order.tolist(), int(part.number)) == ([5, 7, 7], 1)
    assert int(problem.scored_rows(targets == -100).part(4, 3).number) == 0
    assert problem.scored_rows(torch.empty(0, dtype=torch.bool)).order.shape == (0,)


@pytest.mark.parametrize("vocabulary", [32_003, 151_936, 248_320])
@pytest.mark.parametrize("width", [96, 1536, 4096, 8192])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_workspace_stays_within_the_limit(vocabulary: int, width: int, itemsize: int) -> None:
    limit = problem.workspace_limit()
    assert limit == 256 << 20
    for capacity in (1, 507, 8192, 16_384, 65_536):
        cut = cuda.plan(capacity, width, vocabulary, itemsize, limit)
        assert cut.workspace <= limit
        assert cut.workspace >= cut.rows * cut.columns * 4 + cut.rows * width * 4
        assert cut.rows >= min(capacity, 3072)
        assert cut.columns >= min(vocabulary, 512)
    block = cuda.ROWS * (4 * cuda.forward_columns(vocabulary, limit) + itemsize * width)
    assert block <= limit


def test_one_group_at_the_published_sizes() -> None:
    """M 8192 and H up to 4096 keep to 8MHV: dX of all rows fits."""
    for width in (1536, 2048, 3584, 4096):
        assert cuda.plan(8192, width, 151_936, 2, 256 << 20).rows == 8192


def test_workspace_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIME_FAST_WORKSPACE_MIB", "1024")
    assert problem.workspace_limit() == problem.workspace_limit(1 << 40) == 1 << 30
    for bad in ("", "4", "lots", "-256"):
        monkeypatch.setenv("RIME_FAST_WORKSPACE_MIB", bad)
        with pytest.raises(ValueError, match="RIME_FAST_WORKSPACE_MIB: expected a whole number"):
            problem.workspace_limit()


@pytest.mark.parametrize("bound", [-1, 4, 2500, 9999])  # 4: too small, which an assertion reports
@pytest.mark.parametrize("weighted", [False, True])
def test_places_by_triton_are_torchs(bound: int, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, targets, slopes, and every way to the places and back, among more rows than a step of the kernel takes."""
    rows = 2500
    targets = torch.where(torch.rand(rows) < 0.5, -100, torch.randint(0, 900, (rows,)))
    options = Options("chunked", entropy=True, max_scored=bound, vocab_start=300)
    scoring, spans = Scoring(None, torch.ones(()), None), Spans(targets[:0], targets[:0])
    call = Problem(torch.randn(rows, 20).bfloat16(), torch.randn(5, 20).bfloat16(), targets, scoring, spans, options)
    weight = torch.randn(rows, 2)[:, 1] if weighted else None
    slope = torch.ones(()).expand(rows)
    found = {}
    for by_triton in (False, True):
        monkeypatch.setattr(places, "by_triton", lambda _, answer=by_triton: answer)
        at = places.Places(call, 512, True, weight)
        torch.manual_seed(1)
        stats, grad = torch.randn(3, rows), torch.randn(rows)
        known, above = at.pick(problem.Statistics(stats[:2], stats[2], grad), Upstream(slope, grad))
        back = at.spread([problem.Statistics(known.lse, known.target_logit, known.entropy)])
        x = at.take(call.hidden, 3, 40, torch.float32)
        out = torch.zeros(rows + 1, 20, dtype=torch.bfloat16)
        at.put(x, 3, out)
        found[by_triton] = (at.order, at.targets, at.slope, *known, *above, *back, x, out[:-1])
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
