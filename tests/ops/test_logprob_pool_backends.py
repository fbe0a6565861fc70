"""What every backend of the log-prob operator promises: strided and frozen inputs, ignored rows, autocast, bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rime_fast.ops.logprob_pool import cpu, cuda, fused_linear_ce, fused_logprob_pool, op, triton
from rime_fast.ops.logprob_pool.triton_tiles import interpreted
from tests.ops.logprob_cases import Case, assert_close_to_truth, relative

ENGINES = ["reference", "chunked", "cuda", "triton"]
SCHEDULES = ["recompute", "forward"]


@pytest.fixture(params=ENGINES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The argument that chooses a schedule; CUDA's form of "chunked" is put in its place."""
    if request.param == "triton" and not interpreted():
        pytest.skip("the interpreter is for machines without CUDA")
    if request.param == "cuda":
        monkeypatch.setattr(op, "schedule_for", lambda backend, hidden: cuda)
        return "chunked"
    return request.param


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: whoever reads what nobody wrote shows it."""
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


def _gradients(case: Case, backend: str, schedule: str, poison: float | None) -> dict[str, torch.Tensor]:
    """Outputs and gradients; with ``poison``, everything at the ignored rows has that value."""
    t = {name: value.clone() for name, value in case.tensors.items()}
    ignored = t["targets"] == -100
    for name in ("hidden", "token_weight", "grad_entropy") if poison is not None else ():
        t[name][ignored] = poison
    leaves = {n: t[n].requires_grad_() for n in ("hidden", "lm_head", "bias", "temperature")}
    options = {"bias": t["bias"], "temperature": t["temperature"], "softcap": case.softcap, "backend": backend}
    args = t["hidden"], t["lm_head"], t["targets"]
    if schedule == "recompute":
        out = fused_logprob_pool(*args, entropy=True, **options)
        grads = torch.autograd.grad(
            (out.logp, out.entropy), list(leaves.values()), (-t["token_weight"], t["grad_entropy"])
        )
        found = {"logp": out.logp, "entropy": out.entropy}
    else:
        loss, out = fused_linear_ce(*args, token_weight=t["token_weight"], entropy=True, **options)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        found = {"logp": out.logp, "entropy": out.entropy, "loss": loss}
        with torch.no_grad():
            scored, _ = fused_linear_ce(*args, token_weight=t["token_weight"], **options)
        torch.testing.assert_close(scored, loss.detach())
    return {n: v.detach() for n, v in found.items()} | {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scored", ["some", "none"])
@pytest.mark.usefixtures("_poisoned_memory")
def test_nothing_unwritten_or_ignored_is_read(backend: str, schedule: str, scored: str) -> None:
    """NaN and inf in fresh memory and at the ignored rows, in inputs, weights and upstream gradients, reach nothing."""
    case = Case(37, 16, 75, scored=scored, softcap=5.0)
    ignored = case.tensors["targets"] == -100
    assert ignored.any()
    clean = _gradients(case, backend, schedule, None)
    for poison in (float("nan"), float("inf")):
        found = _gradients(case, backend, schedule, poison)
        for name, value in found.items():
            assert value.isfinite().all(), name
            assert relative(value, clean[name]) < 1e-6, name
        for name in ("logp", "entropy", "d_hidden"):
            assert not found[name][ignored].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(backend: str, dtype: torch.dtype) -> None:
    case = Case(40, 32, 77, dtype)
    wide = torch.full((80, 64), torch.nan, dtype=dtype)
    wide[::2, ::2] = case.tensors["hidden"]
    bias = torch.full((154,), torch.nan, dtype=dtype)
    bias[::2] = case.tensors["bias"]
    case.tensors["hidden"], case.tensors["bias"] = wide[::2, ::2], bias[::2]
    case.tensors["lm_head"] = case.tensors["lm_head"].t().contiguous().t()
    leaves = {n: case.tensors[n].detach().requires_grad_() for n in ("hidden", "lm_head", "bias", "temperature")}
    assert not any(leaves[n].is_contiguous() for n in ("hidden", "lm_head", "bias"))
    targets = case.tensors["targets"].repeat_interleave(2)[::2]
    out = fused_logprob_pool(
        leaves["hidden"], leaves["lm_head"], targets, entropy=True, **case.options(leaves, backend=backend)
    )
    weight = case.tensors["token_weight"].repeat_interleave(2)[::2]
    loss = -(out.logp * weight).sum() + (out.entropy * case.tensors["grad_entropy"]).sum()
    found = case.collect(leaves, loss, out)
    assert_close_to_truth(case, found)


@pytest.mark.parametrize("trained", ["hidden", "lm_head", "bias", "temperature"])
def test_frozen_inputs(backend: str, trained: str) -> None:
    """Each input trained alone gets the gradient it gets among all."""
    case = Case(40, 32, 77)
    for schedule in SCHEDULES:
        every = case.run(backend, schedule=schedule)
        leaves = {n: t.detach().requires_grad_(n == trained) for n, t in case.leaves().items()}
        args, weight = (leaves["hidden"], leaves["lm_head"], case.tensors["targets"]), case.tensors["token_weight"]
        if schedule == "recompute":
            out = fused_logprob_pool(*args, entropy=True, **case.options(leaves, backend=backend))
            loss = -(out.logp * weight).sum() + (out.entropy * case.tensors["grad_entropy"]).sum()
        else:
            loss, out = fused_linear_ce(*args, token_weight=weight, **case.options(leaves, backend=backend))
        found = case.collect({trained: leaves[trained]}, loss, out)
        assert relative(found[f"d_{trained}"], every[f"d_{trained}"]) < 2e-6


def test_max_scored_changes_nothing(backend: str) -> None:
    case = Case(60, 16, 75)
    scored = int((case.tensors["targets"] != -100).sum())
    assert 0 < scored < 60
    results = []
    for bound in (None, scored, 99):
        leaves = case.leaves()
        loss, out = fused_linear_ce(
            leaves["hidden"],
            leaves["lm_head"],
            case.tensors["targets"],
            entropy=True,
            max_scored=bound,
            **case.options(leaves, backend=backend),
        )
        results.append(case.collect(leaves, loss + out.logp.sum(), out))
    for found in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(found[name], value) if name == "logp" else relative(found[name], value) < 2e-6, name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_casts_the_operands_alone(backend: str, schedule: str) -> None:
    """Autocast gives bf16 operands and nothing else: logits, their gradient and sums stay as without it."""
    case = Case(40, 16, 30)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run(backend, schedule=schedule)
    half = Case(40, 16, 30, torch.bfloat16)
    half.tensors = case.tensors | {n: case.tensors[n].bfloat16() for n in ("hidden", "lm_head")}
    expected = half.run(backend, schedule=schedule)
    assert found["d_lm_head"].dtype == torch.float32
    for name, value in expected.items():
        # The reference's backward is torch's own, which runs under autocast as well when it is called inside.
        if backend != "reference" or not name.startswith("d_"):
            assert relative(found[name], value) < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule_of", [cuda, triton])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(507, 96, 123), (7, 1537, 123), (3, 32, 32_003)])
def test_odd_shapes(
    schedule_of: object, rows: int, width: int, vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the backends for CUDA; test_logprob_pool.py has those of the CPU's."""
    monkeypatch.setattr(op, "schedule_for", lambda backend, hidden: schedule_of)
    assert op.schedule_for("chunked", torch.empty(0)) is not cpu
    case = Case(rows, width, vocabulary, dtype, scored="all" if rows < 8 else "some")
    for schedule in SCHEDULES:
        assert_close_to_truth(case, case.run("chunked", schedule=schedule), schedule)
