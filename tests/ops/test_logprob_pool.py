"""The log-prob operator against the fp64 truth, and what it promises beyond: the same bits, nothing unneeded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rime_fast.ops.logprob_pool import cpu, fused_linear_ce, fused_logprob_pool
from rime_fast.ops.logprob_pool.problem import Needs, Options, Problem, Scoring, Spans
from tests.ops.logprob_cases import Case, assert_close_to_truth, relative

SHAPES = [(1, 96, 123), (7, 1537, 123), (507, 96, 123), (7, 96, 32003), (3, 1, 1), (64, 16, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEDULES = ["recompute", "forward"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), SHAPES)
def test_odd_shapes(rows: int, width: int, vocabulary: int, dtype: torch.dtype, schedule: str) -> None:
    case = Case(rows, width, vocabulary, dtype, scored="all" if rows < 8 else "some")
    assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scored", ["all", "one", "none"])
@pytest.mark.parametrize("spread", [1e-3, 30.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flat_and_peaked_logits(schedule: str, scored: str, spread: float, softcap: float | None) -> None:
    case = Case(33, 64, 517, scored=scored, spread=spread, softcap=softcap, bias=spread > 1, temperature=1.3)
    assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_keeps_the_rule(dtype: torch.dtype) -> None:
    case = Case(57, 96, 123, dtype, softcap=5.0)
    assert_close_to_truth(case, case.run("reference"))
    assert case.run("reference", dtype=torch.float64)["logp"].dtype == torch.float64


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    width=st.integers(2, 40),  # one number of unit norm has no gradient but rounding
    vocabulary=st.integers(1, 300),
    scored=st.sampled_from(["all", "some", "one", "none"]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    schedule=st.sampled_from(SCHEDULES),
    seed=st.integers(0, 99),
)
def test_any_shape(**drawn) -> None:
    schedule = drawn.pop("schedule")
    case = Case(**drawn)
    assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_several_blocks_and_panels(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks: the sums over blocks of rows and panels of the vocabulary, in fp32 and in a widened dtype."""
    monkeypatch.setattr(cpu, "BLOCK_ROWS", 32)
    monkeypatch.setattr(cpu, "PANEL_BYTES", 20_000)
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(201, 96, 123, dtype, scored="all")
        assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)


def test_torch_row_kernels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installation without compiled kernels computes the same."""
    monkeypatch.setattr("rime_fast.ops.native.available", lambda cuda=False: False)
    for softcap in (None, 5.0):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(57, 96, 123, dtype, softcap=softcap)
            for schedule in SCHEDULES:
                assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)


def _row_inputs(vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(1023, 96, dtype=dtype),
        torch.randn(vocabulary, 96, dtype=dtype),
        torch.randint(0, vocabulary, (1023,)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [123, 3001])
def test_logp_is_batch_invariant(vocabulary: int, dtype: torch.dtype) -> None:
    """A row's logp and entropy are the same bits alone, among 7 and among 1,023, in either schedule."""
    hidden, lm_head, targets = _row_inputs(vocabulary, dtype)
    options = {"temperature": 0.9, "softcap": 20.0, "entropy": True, "backend": "chunked"}
    whole = fused_logprob_pool(hidden, lm_head, targets, **options)
    for rows in ([5], [1022], [3, 5, 9, 500, 501, 1000, 1022]):
        part = fused_logprob_pool(hidden[rows], lm_head, targets[rows], **options)
        assert torch.equal(part.logp, whole.logp[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])
        plain = fused_logprob_pool(hidden[rows], lm_head, targets[rows], **(options | {"entropy": False}))
        assert torch.equal(plain.logp, whole.logp[rows])
        _, trained = fused_linear_ce(hidden[rows].requires_grad_(), lm_head, targets[rows], **options)
        assert torch.equal(trained.logp, whole.logp[rows])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deterministic(schedule: str) -> None:
    case = Case(130, 96, 3001, scored="all")
    case.tensors["last"] = torch.tensor([4, 4, 4])  # read-outs that share a row
    first, second = case.run("chunked", schedule=schedule), case.run("chunked", schedule=schedule)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_nan_stays_in_its_row() -> None:
    hidden, lm_head, targets = torch.randn(9, 16), torch.randn(50, 16), torch.randint(0, 50, (9,))
    hidden[4, 3] = float("nan")
    hidden[6, 3] = float("inf")
    hidden.requires_grad_()
    out = fused_logprob_pool(hidden, lm_head, targets, pools={"last": torch.tensor([4, 5])}, entropy=True)
    clean = torch.tensor([0, 1, 2, 3, 5, 7, 8])
    assert out.logp[[4, 6]].isnan().all()
    assert out.logp[clean].isfinite().all()
    assert out.embeddings["last"].isnan().any(dim=1).tolist() == [True, False]
    (grad,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), hidden)
    assert grad[4].isnan().all()
    assert grad[clean].isfinite().all()


def test_minus_infinity_in_bias_bans_a_token() -> None:
    case = Case(9, 16, 50, scored="all")
    case.tensors["bias"][7:11] = float("-inf")
    case.tensors["targets"].clamp_max_(6)
    found = case.run("chunked")
    assert all(value.isfinite().all() for value in found.values())
    assert (found["d_bias"][7:11] == 0).all()
    keep = [v for v in range(50) if v not in range(7, 11)]
    smaller = Case(9, 16, 46, scored="all")
    smaller.tensors = case.tensors | {"bias": case.tensors["bias"][keep], "lm_head": case.tensors["lm_head"][keep]}
    expected = smaller.eager(torch.float64)
    for name in ("logp", "entropy", "d_hidden", "d_temperature"):
        assert relative(found[name], expected[name]) < 1e-5, name


def test_empty_batch_and_all_ignored() -> None:
    lm_head = torch.randn(50, 16, requires_grad=True)
    empty = torch.empty(0, 16, requires_grad=True)
    loss, out = fused_linear_ce(empty, lm_head, torch.empty(0, dtype=torch.long), entropy=True)
    grads = torch.autograd.grad(loss, (empty, lm_head))
    assert (loss.item(), out.logp.shape, out.entropy.shape) == (0.0, (0,), (0,))
    assert grads[0].shape == (0, 16)
    assert not grads[1].any()
    hidden = torch.randn(4, 16, requires_grad=True)
    out = fused_logprob_pool(hidden, lm_head, torch.full((4,), -100), pools={"none": torch.empty(0, dtype=torch.long)})
    grads = torch.autograd.grad(out.logp.sum() + out.embeddings["none"].sum(), (hidden, lm_head))
    assert out.embeddings["none"].shape == (0, 16)
    assert not out.logp.any()
    assert not any(g.any() for g in grads)


def test_zero_row_has_zero_embedding() -> None:
    hidden = torch.zeros(3, 8, requires_grad=True)
    lm_head, targets = torch.randn(5, 8), torch.full((3,), -100)
    out = fused_logprob_pool(hidden, lm_head, targets, pools={"last": torch.tensor([1])})
    assert not out.embeddings["last"].any()
    assert torch.autograd.grad(out.embeddings["last"].sum(), hidden)[0].isfinite().all()


def test_unnormalised_read_out_is_the_mean() -> None:
    hidden, span = torch.randn(9, 16), (torch.tensor([2, 0]), torch.tensor([5, 9]))
    out = fused_logprob_pool(hidden, torch.randn(5, 16), torch.full((9,), -100), pools={"m": span}, normalize=False)
    torch.testing.assert_close(out.embeddings["m"], torch.stack([hidden[2:5].mean(0), hidden.mean(0)]))


def test_frozen_head_makes_no_head_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = cpu.Sums

    def watched(problem, rows):
        asked.append(problem.options.needs)
        return plain(problem, rows)

    monkeypatch.setattr(cpu, "Sums", watched)
    hidden, lm_head = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16)
    targets = torch.randint(0, 50, (9,))
    fused_linear_ce(hidden, lm_head, targets)[0].backward()
    fused_logprob_pool(hidden, lm_head, targets).logp.sum().backward()
    assert asked == [Needs(True, False, False, False)] * 2


def test_no_grad_saves_nothing() -> None:
    hidden, lm_head = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    with torch.no_grad():
        loss, out = fused_linear_ce(hidden, lm_head, torch.randint(0, 50, (9,)))
    assert loss.grad_fn is None
    assert out.logp.grad_fn is None


def test_token_weight_gets_a_gradient() -> None:
    hidden, lm_head = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16)
    weight = torch.rand(9, requires_grad=True)
    loss, out = fused_linear_ce(hidden, lm_head, torch.randint(0, 50, (9,)), token_weight=weight)
    torch.testing.assert_close(torch.autograd.grad(loss * 2, weight)[0], -2 * out.logp)


def test_memory_is_bounded_whatever_the_rows() -> None:
    """One block of logits at V 151,936 is within 48 MiB, and where there are several they share one buffer."""
    for rows in (64, 4096):
        index = torch.zeros(rows, dtype=torch.long)
        scoring, spans = Scoring(None, torch.ones(()), None), Spans(index[:0], index[:0])
        heads = torch.zeros(rows, 4), torch.zeros(151_936, 4)
        blocks = cpu.Blocks(Problem(*heads, index, scoring, spans, Options("chunked")))
        logits = next(iter(blocks))[1]
        assert 0 < logits.nbytes <= 48 << 20
        assert (blocks.buffer is None) == (rows == 64)
        assert blocks.buffer is None or logits.data_ptr() == blocks.buffer.data_ptr()
    assert cpu.block_rows(10**9) == cpu.ROWS
    assert cpu.block_rows(1) == cpu.BLOCK_ROWS


@pytest.mark.slow
def test_peak_memory_of_a_step() -> None:
    """Peak resident memory of a step beyond its gradients, at a real vocabulary and all rows scored."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    hidden, lm_head = torch.randn(1024, 64, requires_grad=True), torch.randn(151_936, 64, requires_grad=True)
    targets = torch.randint(0, 151_936, (1024,))
    outputs = hidden.nbytes + lm_head.nbytes
    for backward in (True, False):
        for _ in range(2):  # the first call also counts what libraries keep
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident(status, "VmRSS")
            loss, _ = fused_linear_ce(hidden, lm_head, targets)
            grads = torch.autograd.grad(loss, (hidden, lm_head)) if backward else None
            peak = _resident(status, "VmHWM") - before
            del loss, grads
        assert peak <= outputs + (64 << 20), f"{peak >> 20} MiB"


def _resident(status: Path, key: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(507, 1537, 32003), (1023, 96, 32003), (64, 256, 151936)])
def test_large_shapes(rows: int, width: int, vocabulary: int, spread: float, dtype: torch.dtype) -> None:
    case = Case(rows, width, vocabulary, dtype, spread=spread)
    for schedule in SCHEDULES:
        assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)
