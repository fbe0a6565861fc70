"""Faults of the log-prob operator that were found by trying it: the value that is right, and its neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from rime_fast.ops.logprob_pool import cuda, fused_linear_ce, fused_logprob_pool, op
from rime_fast.ops.logprob_pool.triton_tiles import interpreted
from tests.ops.logprob_cases import Case, assert_close_to_truth, relative
from tests.ranks import run_ranks

SCHEDULES = ["recompute", "forward"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["reference", "chunked", "cuda", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The argument that chooses a schedule; CUDA's form of "chunked" is put in its place."""
    if request.param == "triton" and not interpreted():
        pytest.skip("the interpreter is for machines without CUDA")
    if request.param == "cuda":
        monkeypatch.setattr(op, "schedule_for", lambda backend, hidden: cuda)
        return "chunked"
    return request.param


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("width", [896, 1280, 1536, 2048])
@pytest.mark.usefixtures("_threads")
def test_bits_of_a_row_at_the_widths_of_real_models(width: int, threads: int) -> None:
    """A library's product of another number of rows sums in another order, from two threads on."""
    torch.set_num_threads(threads)
    lm_head = torch.randn(1003, width)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, targets = torch.randn(300, width).to(dtype), torch.randint(0, 1003, (300,))
        whole = fused_logprob_pool(hidden, lm_head.to(dtype), targets, entropy=True, backend="chunked")
        for rows in ([0], [299], [3, 5, 130], list(range(100, 217))):
            part = fused_logprob_pool(hidden[rows], lm_head.to(dtype), targets[rows], entropy=True, backend="chunked")
            assert torch.equal(part.logp, whole.logp[rows])
            assert torch.equal(part.entropy, whole.entropy[rows])
            x = hidden[rows].clone().requires_grad_()
            _, trained = fused_linear_ce(x, lm_head.to(dtype), targets[rows], backend="chunked")
            assert torch.equal(trained.logp, whole.logp[rows])


def _unequal_parts(rank: int, world: int) -> None:
    """6 + 5 columns: an error on every rank, whatever the targets; the group serves the next call."""
    hidden, group = torch.randn(7, 8), dist.group.WORLD
    for part in (6 - rank, 5 + rank, 11 * rank, 0):
        for targets in (torch.zeros(7, dtype=torch.long), torch.full((7,), 10), torch.full((7,), 11)):
            for function in (fused_linear_ce, fused_logprob_pool):
                with pytest.raises(ValueError, match="vocab_group: expected equal parts of lm_head on all ranks, got"):
                    function(hidden, torch.randn(part, 8), targets, vocab_group=group)
    torch.manual_seed(0)
    hidden, lm_head, targets = torch.randn(7, 8), torch.randn(12, 8), torch.arange(5, 12)
    found = fused_logprob_pool(hidden, lm_head.chunk(world)[rank], targets, vocab_group=group).logp
    truth = (hidden @ lm_head.t()).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, truth)
    with pytest.raises(RuntimeError, match=r"vocab_group: not inside of torch\.compile"):
        torch.compile(fused_logprob_pool, backend="eager", fullgraph=True)(
            hidden, torch.randn(6 - rank, 8), targets, vocab_group=group
        )
    outside = torch.compile(fused_logprob_pool, backend="eager")
    torch.testing.assert_close(outside(hidden, lm_head.chunk(world)[rank], targets, vocab_group=group).logp, truth)
    with pytest.raises((ValueError, RuntimeError), match="vocab_group: expected equal parts"):
        outside(hidden, torch.randn(6 - rank, 8), targets.clamp(max=9), vocab_group=group)


@pytest.mark.dist
def test_unequal_parts_of_a_vocabulary_are_refused_on_every_rank() -> None:
    run_ranks(_unequal_parts, 2)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_default_dtype_changes_nothing(backend: str, schedule: str, default: torch.dtype) -> None:
    case = Case(23, 16, 40, softcap=5.0)
    expected = case.run(backend, schedule=schedule)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = case.run(backend, schedule=schedule)
        plain, _ = fused_linear_ce(case.tensors["hidden"], case.tensors["lm_head"], case.tensors["targets"])
    finally:
        torch.set_default_dtype(before)
    assert plain.dtype == torch.float32
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("vocabulary", [1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_certain_target_has_no_gradient(backend: str, vocabulary: int, softcap: float | None) -> None:
    """p exactly 1: dz = g - g p is 0, not what a product's rounding leaves."""
    hidden, lm_head = torch.randn(40, 16, requires_grad=True), torch.randn(vocabulary, 16) * 1e2
    bias, temperature = torch.full((vocabulary,), -1e4), torch.tensor(0.07, requires_grad=True)
    bias[0] = 1e4
    lm_head.requires_grad_()
    targets, weight = torch.zeros(40, dtype=torch.long), torch.linspace(0.1, 0.9, 40)
    options = {"bias": bias, "temperature": temperature, "softcap": softcap, "backend": backend}
    out = fused_logprob_pool(hidden, lm_head, targets, entropy=True, **options)
    grads = torch.autograd.grad((out.logp * weight).sum(), (hidden, lm_head, temperature))
    assert not out.logp.any()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("scale", [1e6, 3e9, 1e12, 1e30])
def test_huge_logits(backend: str, scale: float) -> None:
    hidden, lm_head, targets = torch.randn(12, 16), torch.randn(50, 16) * scale, torch.randint(0, 50, (12,))
    targets[:6] = (hidden @ lm_head.t()).argmax(1)[:6]
    results = []
    for dtype in (torch.float32, torch.float64):
        name = backend if dtype == torch.float32 else "reference"
        x, w = (t.to(dtype).requires_grad_() for t in (hidden, lm_head))
        out = fused_logprob_pool(x, w, targets, temperature=0.7, entropy=True, backend=name)
        results.append((out.logp, out.entropy, *torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (x, w))))
    assert not results[0][0][:6].any()
    for found, truth in zip(*results, strict=True):
        assert relative(found.detach(), truth.detach()) < 1e-6


def test_unnormalised_read_out_of_a_bad_row_has_a_gradient(backend: str) -> None:
    """A mean is linear: its gradient does not depend on the rows, and a NaN stays in its own read-out."""
    hidden = torch.randn(9, 16)
    hidden[4] = NAN
    hidden[6, 1] = INF
    hidden.requires_grad_()
    pools = {"last": torch.tensor([4, 5, 6]), "mean": (torch.tensor([3, 0]), torch.tensor([8, 3]))}
    targets = torch.full((9,), -100)
    for function in (fused_linear_ce, fused_logprob_pool):
        found = function(hidden, torch.randn(5, 16), targets, pools=pools, normalize=False, backend=backend)
        out = found[1] if function is fused_linear_ce else found
        total = sum(e.sum() for e in out.embeddings.values()) + (found[0] if function is fused_linear_ce else 0.0)
        (grad,) = torch.autograd.grad(total, hidden)
        expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.2, 1.2, 1.2, 1.2, 0.2, 0.0])
        torch.testing.assert_close(grad, expected[:, None].expand(9, 16))
        assert out.embeddings["last"].isfinite().all(1).tolist() == [False, True, False]
        assert out.embeddings["mean"].isfinite().all(1).tolist() == [False, True]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_minus_infinity_in_bias(backend: str, softcap: float | None) -> None:
    """A banned token leaves finite gradients of everything, the entropy's and the temperature's too."""
    case = Case(9, 16, 50, scored="all", softcap=softcap)
    case.tensors["bias"][7:11] = -INF
    case.tensors["targets"].clamp_max_(6)
    found = case.run(backend)
    assert all(value.isfinite().all() for value in found.values())
    if softcap is None:  # a cap makes a token of -inf one of -softcap
        assert (found["d_bias"][7:11] == 0).all()
        keep = [v for v in range(50) if v not in range(7, 11)]
        smaller = Case(9, 16, 46, scored="all")
        smaller.tensors = case.tensors | {n: case.tensors[n][keep] for n in ("bias", "lm_head")}
        expected = smaller.eager(torch.float64)
        for name in ("logp", "entropy", "d_hidden", "d_temperature"):
            assert relative(found[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("name", ["hidden", "lm_head", "bias", "temperature", "token_weight"])
def test_forward_mode_is_refused_by_name(name: str) -> None:
    """Never a derivative of 0; the reference has it, as the finite difference says."""
    t = {"hidden": torch.randn(5, 8), "lm_head": torch.randn(30, 8), "bias": torch.randn(30)}
    t |= {"temperature": torch.tensor(0.8), "token_weight": torch.rand(5)}
    targets, along = torch.randint(0, 30, (5,)), torch.randn_like(t[name])

    def loss(value: torch.Tensor, backend: str) -> torch.Tensor:
        given = t | {name: value}
        return fused_linear_ce(given.pop("hidden"), given.pop("lm_head"), targets, backend=backend, **given)[0]

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t[name], along)
        for backend in ("auto", "chunked"):
            with pytest.raises(ValueError, match=f"{name}: forward-mode AD"):
                loss(dual, backend)
        slope = forward_ad.unpack_dual(loss(dual, "reference")).tangent
    with pytest.raises(ValueError, match=f"{name}: forward-mode AD"):
        torch.func.jvp(lambda value: loss(value, "auto"), (t[name],), (along,))
    wide = {n: value.double() for n, value in t.items()}
    t, step = wide, 1e-6 * along.double()
    difference = loss(t[name] + step, "reference") - loss(t[name] - step, "reference")
    assert slope is not None
    assert relative(slope, difference / 2e-6) < 1e-4


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 20.0])
def test_temperature_gradient_and_slope_of_the_cap(backend: str, spread: float, softcap: float | None) -> None:
    """Flat logits, whose differences a log-sum-exp of 8 would swallow; and a cap whose scores reach 40."""
    case = Case(33, 64, 3001, scored="all", spread=spread, softcap=softcap, bias=False, temperature=0.05)
    truth, eager = case.eager(torch.float64, "forward"), case.eager(None, "forward")
    found = case.run(backend, schedule="forward")
    for name in ("d_temperature", "d_hidden", "d_lm_head"):
        bound = 1e-4 if name == "d_temperature" else 1e-5
        assert relative(found[name], truth[name]) < 2 * relative(eager[name], truth[name]) + bound, name
    assert_close_to_truth(case, found, "forward")


def test_the_loss_factor_is_not_rounded_to_the_gradients_dtype(backend: str) -> None:
    """1/3 in bf16 is 0.2 % off; a gradient's own rounding is 2^-9 at random."""
    case = Case(40, 64, 300, torch.bfloat16, scored="all", pools=False, bias=False)
    gradients = []
    for factor in (1.0, 1 / 3):
        leaves = case.leaves()
        loss, _ = fused_linear_ce(leaves["hidden"], leaves["lm_head"], case.tensors["targets"], backend=backend)
        gradients.append(torch.autograd.grad(loss * factor, (leaves["hidden"], leaves["lm_head"])))
    for whole, part in zip(*gradients, strict=True):
        share = (part.double() * whole.double()).sum() / whole.double().square().sum()
        slack = 5e-4 if backend != "triton" else 3e-3  # the interpreter cuts to bf16 where the hardware rounds
        assert abs(float(share) * 3 - 1) < slack


@pytest.mark.parametrize("value", [-1.0, -0.0, 0.0, NAN, INF, -INF])
def test_bad_temperature_tensors(backend: str, value: float) -> None:
    args = torch.randn(3, 8), torch.randn(30, 8), torch.randint(0, 30, (3,))
    for temperature in (value, torch.tensor(value), torch.tensor(value, dtype=torch.float64, requires_grad=True)):
        for function in (fused_linear_ce, fused_logprob_pool):
            with pytest.raises(ValueError, match="temperature: expected a"):
                function(*args, temperature=temperature, backend=backend)
