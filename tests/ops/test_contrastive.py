"""The contrastive loss alone: the reference against its definition, the tiled backends against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from rime_fast.ops import dispatch, native
from rime_fast.ops.contrastive import contrastive_loss, cpu, schedule
from rime_fast.ops.contrastive.problem import Options
from rime_fast.ops.contrastive.softmax import BOUNDED
from tests.ops.contrastive_cases import RIME_TERMS, Case, check_rule, make_case, relative, run

ONE_TERM = [("disc", "disc", 1.0)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way, none of them a round number of vectors."""
    monkeypatch.setattr(cpu, "TILE", (37, 300))


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


# The reference against the definition written with F.cross_entropy.


@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_is_cross_entropy_over_all_keys(symmetric: bool) -> None:
    case = make_case(9, 13, 6, shuffled=False, symmetric=symmetric)
    out = run(case, torch.float64, "reference").out
    expected = torch.zeros((), dtype=torch.float64)
    for q, k, weight in case.terms:
        logits = case.queries[q] @ case.keys[k].T / case.temperature
        value = F.cross_entropy(logits, torch.arange(9))
        if symmetric:
            value = 0.5 * (value + F.cross_entropy(logits[:, :9].T, torch.arange(9)))
        assert relative(out.per_term[f"{q}-{k}"], value) < 1e-12
        assert out.accuracy[f"{q}-{k}"] == (logits.argmax(1) == torch.arange(9)).double().mean()
        expected = expected + weight * value
    assert relative(out.loss, expected) < 1e-12


def test_masks_leave_out_twins_and_candidates_above_the_margin_but_never_the_positive() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    similarity, tau = queries @ keys.T, 0.5  # rows: [0.6, 0, 1], [0.8, 1, 0]

    def loss(**masks: Any) -> float:
        call = contrastive_loss(
            {"a": queries}, {"a": keys}, terms=[("a", "a", 1.0)], temperature=tau, symmetric=False, **masks
        )
        return call.loss.item()

    def expected(first: list[int], second: list[int]) -> float:
        rows = [(similarity[0, first] / tau).logsumexp(0) - similarity[0, 0] / tau]
        rows.append((similarity[1, second] / tau).logsumexp(0) - similarity[1, 1] / tau)
        return torch.stack(rows).mean().item()

    ids = {"query_ids": torch.tensor([7, 8]), "key_ids": torch.tensor([7, 8, 7])}
    assert loss() == pytest.approx(expected([0, 1, 2], [0, 1, 2]))
    assert loss(**ids) == pytest.approx(expected([0, 1], [0, 1, 2]))  # key 2 is a twin of query 0's positive
    assert loss(margin=0.3) == pytest.approx(expected([0, 1], [0, 1, 2]))  # 1.0 > 0.6 + 0.3
    assert loss(margin=0.5) == pytest.approx(expected([0, 1, 2], [0, 1, 2]))
    everything = {"query_ids": torch.tensor([7, 7]), "key_ids": torch.tensor([7, 7, 7])}
    assert loss(**everything) == 0.0  # each row keeps its positive alone


def test_second_direction_of_the_margin_belongs_to_the_key() -> None:
    """C(a, b) with both directions is the mean of C(a, b) and C(b, a) with one each."""
    case = make_case(40, 40, 8, ids=True, margin=0.05, seed=3)
    a, b, ids = case.queries["disc"], case.keys["disc"], case.settings
    settings = {"terms": [("m", "m", 1.0)], "margin": 0.05, "temperature": 0.1}
    both = contrastive_loss({"m": a}, {"m": b}, query_ids=ids["query_ids"], key_ids=ids["key_ids"], **settings)
    there = contrastive_loss(
        {"m": a}, {"m": b}, query_ids=ids["query_ids"], key_ids=ids["key_ids"], symmetric=False, **settings
    )
    back = contrastive_loss(
        {"m": b}, {"m": a}, query_ids=ids["key_ids"], key_ids=ids["query_ids"], symmetric=False, **settings
    )
    assert relative(both.loss, 0.5 * (there.loss + back.loss)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "chunked", *(["triton"] if dispatch.interpreted() else [])])
def test_twins_of_the_positive_stay_with_a_margin_of_zero(backend: str, dtype: torch.dtype) -> None:
    """All candidates are the positive itself: none is above it, whatever the order its product was summed in."""
    torch.manual_seed(0)
    for n, d, size in ((3, 5, 1.0), (17, 96, 1.0), (40, 257, 20.0), (23, 1536, 1.0)):
        row = (size * unit(1, d)).to(dtype)
        options = {"terms": [("a", "a", 1.0)], "temperature": size**2, "margin": 0.0, "backend": backend}
        found = contrastive_loss({"a": row.expand(n, d)}, {"a": row.expand(n + 9, d)}, **options)
        queries = (size * unit(n, d)).to(dtype)
        twins = contrastive_loss({"a": queries}, {"a": queries.repeat(2, 1)}, symmetric=False, **options)
        similarity = queries.double() @ queries.double().T
        above = similarity > similarity.diagonal()[:, None] * (1 + 1e-4)
        logits = (similarity / size**2).masked_fill(above, -torch.inf).repeat(1, 2)
        expected = F.cross_entropy(logits, torch.arange(n))
        assert relative(found.loss, 0.5 * (torch.tensor(n + 9.0).log() + torch.tensor(float(n)).log())) < 1e-5
        assert relative(twins.loss, expected) < 1e-5


@pytest.mark.parametrize("wrapped", [False, True])
def test_forward_mode_ad_is_refused_by_name(wrapped: bool) -> None:
    queries, keys, tangent = unit(4, 3), unit(4, 3), unit(4, 3)

    def loss(rows: Tensor, temperature: Tensor, backend: str) -> Tensor:
        options = {"terms": [("a", "a", 1.0)], "temperature": temperature, "backend": backend}
        return contrastive_loss({"a": rows}, {"a": keys}, **options).loss

    def derivative(backend: str, of_temperature: bool = False) -> Tensor:
        primals, tangents = (queries, torch.tensor(0.1)), (tangent, torch.zeros(()))
        if of_temperature:
            tangents = torch.zeros_like(tangent), torch.ones(())
        if wrapped:
            return torch.func.jvp(lambda q, t: loss(q, t, backend), primals, tangents)[1]
        with forward_ad.dual_level():
            dual = (forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True))
            return forward_ad.unpack_dual(loss(*dual, backend)).tangent

    for of_temperature in (False, True):
        with pytest.raises(ValueError, match=r"contrastive_loss: forward-mode AD .* expected backend='reference'"):
            derivative("chunked", of_temperature)
        leaves = queries.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
        gradients = torch.autograd.grad(loss(*leaves, "chunked"), leaves)
        expected = gradients[1] if of_temperature else (gradients[0] * tangent).sum()
        assert relative(derivative("reference", of_temperature), expected) < 1e-5


def test_a_temperature_below_zero_is_a_named_error() -> None:
    for backend in ("reference", "chunked"):
        with pytest.raises(ValueError, match=r"temperature is -0.5; expected a finite number > 0"):
            run(replace(make_case(4, 4, 3), temperature=-0.5), torch.float64, backend)


# The tiled backend by the test rule.

SHAPES = [(1, 1, 5), (3, 5, 7), (130, 650, 33)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masks", ["none", "ids", "margin", "both"])
@pytest.mark.parametrize("temperature", [0.02, 0.004])
def test_chunked_obeys_the_rule(shape: tuple[int, int, int], masks: str, temperature: float) -> None:
    """Temperature 0.02 takes the kernels' one-exponential path, 0.004 the general one."""
    assert (1 / temperature < BOUNDED) == (temperature == 0.02)
    for peaked in (False, True):
        for symmetric in (True, False):
            case = make_case(
                *shape,
                temperature=temperature,
                peaked=peaked,
                shuffled=True,
                symmetric=symmetric,
                ids=masks in ("ids", "both"),
                margin=0.02 if masks in ("margin", "both") else None,
            )
            truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
            check_rule(run(case, torch.float32, "chunked"), eager, truth, torch.float32)
            check_rule(run(case, torch.float64, "chunked"), truth, truth, torch.float64)


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("symmetric", [True, False])
def test_logits_of_any_size(temperature: float, symmetric: bool) -> None:
    """A logit is rounded before it is compared, and the same number is subtracted: an fma would see half a digit more,
    which is 32 at 10^9."""
    case = make_case(40, 50, 32, temperature=temperature, symmetric=symmetric)
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    check_rule(run(case, torch.float32, "chunked"), eager, truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_accumulate_in_fp32(dtype: torch.dtype) -> None:
    case = make_case(65, 90, 48, dtype=dtype, temperature=0.02, peaked=True)
    truth, eager = run(case, torch.float64, "reference"), run(case, dtype, "reference")
    found = run(case, dtype, "chunked")
    check_rule(found, eager, truth, dtype)
    assert found.out.loss.dtype == torch.float32
    assert relative(found.out.loss, truth.out.loss) < 1e-5  # the inputs are exact, so the loss is fp32's
    assert found.gradients["queries[gen]"].dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_obeys_the_rule_at_full_tiles(dtype: torch.dtype) -> None:
    for seed, peaked in enumerate((False, True)):
        case = make_case(1023, 4099, 129, seed=seed, peaked=peaked, ids=True, margin=0.2, shuffled=True, dtype=dtype)
        # On a grid similarities are exact, multiples of 1/256, and none is nearer to a limit than 0.0007. Of 8 million
        # others some lie at one to the last bit, where rounding decides, differently with each instruction set.
        for side in (case.queries, case.keys):
            side.update({mode: (16 * rows).round() / 16 for mode, rows in side.items()})
        truth, eager = run(case, torch.float64, "reference"), run(case, dtype, "reference")
        check_rule(run(case, dtype, "chunked"), eager, truth, dtype)


@pytest.mark.usefixtures("small_tiles")
def test_torch_rows_agree_with_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installations without a compiler take the torch version of the row kernels."""
    case = make_case(75, 333, 20, ids=True, margin=0.1, shuffled=True, temperature=0.02)
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    monkeypatch.setattr(native, "available", lambda cuda=False: False)
    check_rule(run(case, torch.float32, "chunked"), eager, truth, torch.float32)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    extra=st.integers(0, 60),
    d=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    ids=st.booleans(),
    margin=st.sampled_from([None, 0.0, 0.3]),
    symmetric=st.booleans(),
)
def test_any_shape(n: int, extra: int, d: int, seed: int, ids: bool, margin: float | None, symmetric: bool) -> None:
    case = make_case(n, n + extra, d, seed=seed, ids=ids, margin=None if d == 1 else margin, symmetric=symmetric)
    truth = run(case, torch.float64, "reference")
    check_rule(run(case, torch.float64, "chunked"), truth, truth, torch.float64)
    check_rule(run(case, torch.float32, "chunked"), run(case, torch.float32, "reference"), truth, torch.float32)


def test_a_saturated_loss_keeps_its_digits() -> None:
    """All positives at similarity 1, rivals near -1: the loss is 1e-21, where 1 - softmax in fp32 is noise."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.02]], dtype=torch.float32)
    case = Case({"disc": rows.double()}, {"disc": rows.double()}, 0.041, terms=ONE_TERM)
    found = run(case, torch.float32, "chunked")
    similarity = (rows @ rows.T).double() / 0.041
    gaps = similarity.diagonal() - torch.stack([similarity[0, 1], similarity[1, 0]])
    expected = (-gaps).exp().log1p().mean()
    assert 0 < expected < 1e-20
    assert relative(found.out.loss / 1e-21, expected / 1e-21) < 1e-4
    assert found.gradients["queries[disc]"].norm() > 0


@pytest.mark.usefixtures("small_tiles")
def test_deterministic_and_independent_of_layout() -> None:
    case = make_case(90, 700, 24, ids=True, shuffled=True)
    first, second = run(case, torch.float32, "chunked"), run(case, torch.float32, "chunked")
    strided = Case(
        {m: v.T.contiguous().T for m, v in case.queries.items()},
        {m: torch.stack([v, v], 2)[:, :, 0] for m, v in case.keys.items()},
        case.temperature,
        case.settings,
    )
    third = run(strided, torch.float32, "chunked")
    for other in (second, third):
        assert torch.equal(first.out.loss, other.out.loss)
        for name, gradient in first.gradients.items():
            assert torch.equal(gradient, other.gradients[name]), name


# NaN, frozen inputs, outputs.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_row_that_is_not_finite_is_a_named_error(bad: float, backend: str) -> None:
    for side, row in (("queries", 7), ("keys", 39)):
        for fine in ("disc", "gen"):
            case = make_case(40, 40, 8)
            broken = {"disc": "gen", "gen": "disc"}[fine]
            getattr(case, side)[broken][row, 3] = bad
            with pytest.raises(ValueError, match=rf"{side}\['{broken}'\] holds NaN or Inf in row {row}; expected"):
                run(case, torch.float32, backend)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_computed_temperature_that_is_not_finite_is_a_named_error(value: float) -> None:
    for backend in ("reference", "chunked"):
        with pytest.raises(ValueError, match=f"temperature is {value}"):
            run(replace(make_case(4, 4, 3), temperature=value), torch.float32, backend)


def test_finite_rows_whose_norm_overflows_pass_the_check() -> None:
    case = make_case(4, 4, 3, temperature=1e38)
    case.queries["disc"] *= 1e30
    assert run(case, torch.float32, "chunked").out.loss.isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.02, 0.004])
def test_unchecked_a_bad_row_gives_nan_and_touches_no_other_query(
    bad: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, where nobody looks: the loss is NaN, the other queries' gradients are right."""
    monkeypatch.setattr(schedule, "require_finite", lambda *_: None)
    queries, keys = unit(40, 8), unit(40, 8)
    queries[7, 3] = bad
    queries.requires_grad_()
    options = {"temperature": temperature, "symmetric": False}
    out = contrastive_loss({"a": queries}, {"a": keys}, terms=[("a", "a", 1.0)], **options)
    assert out.loss.isnan()
    assert out.accuracy["a-a"].isfinite()
    out.loss.backward()
    assert queries.grad is not None
    finite = queries.grad.isfinite().all(1)
    assert not finite[7]
    assert finite.sum() == 39


def test_frozen_sides_get_no_gradient_and_no_grad_saves_nothing() -> None:
    queries, keys = unit(6, 4).requires_grad_(), unit(6, 4)
    out = contrastive_loss({"a": queries}, {"a": keys}, terms=[("a", "a", 1.0)])
    out.loss.backward()
    assert keys.grad is None
    assert queries.grad is not None
    with torch.no_grad():
        silent = contrastive_loss({"a": queries}, {"a": keys}, terms=[("a", "a", 1.0)])
    assert silent.loss.grad_fn is None
    assert torch.equal(silent.loss, out.loss.detach())
    temperature = torch.tensor(0.1, requires_grad=True)
    frozen = {"a": queries.detach()}
    contrastive_loss(frozen, {"a": keys}, terms=[("a", "a", 1.0)], temperature=temperature).loss.backward()
    assert temperature.grad is not None


def test_per_term_losses_carry_gradient() -> None:
    case = make_case(12, 12, 5)
    whole = run(case, torch.float64, "chunked")
    queries = {m: v.clone().requires_grad_() for m, v in case.queries.items()}
    out = contrastive_loss(queries, case.keys, terms=RIME_TERMS, temperature=case.temperature)
    sum(weight * out.per_term[f"{q}-{k}"] for q, k, weight in RIME_TERMS).backward()
    assert queries["gen"].grad is not None
    assert relative(queries["gen"].grad, whole.gradients["queries[gen]"]) < 1e-12


def test_equal_rivals_are_a_miss() -> None:
    row = torch.ones(3, 2)
    out = contrastive_loss({"a": row}, {"a": row}, terms=[("a", "a", 1.0)])
    assert out.accuracy["a-a"] == 0
    assert contrastive_loss({"a": row[:1]}, {"a": row[:1]}, terms=[("a", "a", 1.0)]).accuracy["a-a"] == 1


# torch.library, torch.compile, gradcheck.


@pytest.mark.parametrize("with_masks", [True, False])
def test_opcheck(with_masks: bool) -> None:
    queries, keys = [unit(9, 4).requires_grad_(), unit(9, 4).requires_grad_()], [unit(11, 4).requires_grad_()]
    temperature = torch.tensor(0.1, requires_grad=True)
    index = torch.arange(9)
    masks = (index, index, torch.arange(11)) if with_masks else (None, None, None)
    tail = (Options(((0, 0), (1, 0)), 0.1 if with_masks else None, with_masks, "chunked").encode(),)
    torch.library.opcheck(torch.ops.rime_fast.contrastive.default, (queries, keys, temperature, *masks, *tail))
    _, _, *solved = torch.ops.rime_fast.contrastive(queries, keys, temperature, *masks, *tail)
    plain = [t.detach() for t in (*solved, *queries, *keys, temperature)]
    arguments = (torch.ones(2), *plain[:6], plain[6:8], plain[8:9], plain[9], *masks, *tail)
    torch.library.opcheck(torch.ops.rime_fast.contrastive_backward.default, (*arguments, [True, False], [True], True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_similarities_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does where they are few: two modes, hard negatives."""
    queries, keys = ([unit(n, 16).to(dtype).requires_grad_() for _ in range(2)] for n in (37, 52))

    def gradients() -> list[Tensor]:
        sides = [dict(zip("dg", side, strict=True)) for side in (queries, keys)]
        terms = [("d", "d", 1.0), ("g", "d", 0.5)]
        loss = contrastive_loss(*sides, terms=terms, temperature=0.05, backend="chunked").loss
        return [loss, *torch.autograd.grad(loss, [*queries, keys[0]], retain_graph=True)]

    wanted = gradients()
    monkeypatch.setattr("rime_fast.ops.contrastive.op._keeps", lambda problem: True)
    for found, expected in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_compiles_as_one_graph() -> None:
    index = torch.arange(33)

    def step(queries: Tensor, keys: Tensor, temperature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = contrastive_loss(
            {"disc": queries, "gen": queries},
            {"disc": keys},
            terms=[("disc", "disc", 1.0), ("gen", "disc", 0.5)],
            temperature=temperature,
            labels=index,
            query_ids=index,
            key_ids=index,
            margin=0.1,
        )
        return out.loss, out.accuracy

    leaves = [unit(33, 16).requires_grad_(), unit(33, 16).requires_grad_(), torch.tensor(0.05, requires_grad=True)]
    eager, _ = step(*leaves)
    expected = torch.autograd.grad(eager, leaves)
    compiled, _ = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, eager)
    for found, wanted in zip(torch.autograd.grad(compiled, leaves), expected, strict=True):
        assert torch.equal(found, wanted)


def test_compiles_once_more_when_a_number_changes() -> None:
    """Temperature, margin and weight as Python numbers, also integers."""
    queries, keys = unit(6, 3).requires_grad_(), unit(6, 3)

    def step(rows: Tensor, temperature: float, margin: float, weight: float) -> Tensor:
        terms = [("a", "a", weight), ("b", "a", 1.0)]
        return contrastive_loss(
            {"a": rows, "b": rows}, {"a": keys}, terms=terms, temperature=temperature, margin=margin
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for numbers in ((0.1, 0.1, 1.0), (0.2, 0.1, 1.0), (0.3, 0.2, 1.0), (0.3, 0.3, 2.0), (1, 1, 2)):
        found, wanted = compiled(queries, *numbers), step(queries, *numbers)
        assert torch.equal(found, wanted)
        assert torch.equal(*(torch.autograd.grad(loss, queries)[0] for loss in (found, wanted)))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend: str) -> None:
    case = make_case(4, 6, 3, temperature=0.5, ids=True, margin=0.9, shuffled=True)

    def loss(q: Tensor, g: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
        sides = {"disc": q, "gen": g}, {"disc": k}
        terms = [("disc", "disc", 1.0), ("gen", "disc", 0.5)]
        return contrastive_loss(*sides, terms=terms, temperature=temperature, backend=backend, **case.settings).loss

    leaves = [case.queries["disc"], case.queries["gen"], case.keys["disc"], torch.tensor(0.5, dtype=torch.float64)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(loss, leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, leaves)


def test_a_second_derivative_is_an_error_not_zero() -> None:
    """A gradient penalty beside the loss itself; create_graph=True alone is fine."""
    query, keys = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)

    def loss() -> Tensor:
        return contrastive_loss({"a": query}, {"a": keys}, terms=[("a", "a", 1.0)], backend="chunked").loss

    value = loss()
    (gradient,) = torch.autograd.grad(value, query, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(loss(), query)[0])
    with pytest.raises(RuntimeError, match=r"contrastive_loss: .* no second derivative; use backend='reference'"):
        (value + gradient.square().sum()).backward()


def test_the_reference_ignores_autocast() -> None:
    case = make_case(6, 8, 5)
    found = run(case, torch.float32, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        again = run(case, torch.float32, "reference")
    assert torch.equal(found.out.loss, again.out.loss)


# Errors.

GOOD = {"queries": {"a": torch.ones(3, 2)}, "keys": {"a": torch.ones(4, 2)}, "terms": [("a", "a", 1.0)]}
WRONG = {
    "queries is Tensor": {"queries": torch.ones(3, 2)},
    "queries is empty": {"queries": {}},
    r"queries\['a'\] has shape \(3,\)": {"queries": {"a": torch.ones(3)}},
    r"queries\['a'\] has shape \(0, 2\)": {"queries": {"a": torch.ones(0, 2)}},
    r"queries\['a'\] is torch.int64": {"queries": {"a": torch.ones(3, 2, dtype=torch.int64)}},
    r"keys\['a'\] is torch.float64": {"keys": {"a": torch.ones(4, 2).double()}},
    "of D 2 with .* of D 5": {"keys": {"a": torch.ones(4, 5)}},
    r"keys\['b'\] has 5 rows; expected 4": {
        "keys": {"a": torch.ones(4, 2), "b": torch.ones(5, 2)},
        "terms": [("a", "a", 1.0), ("a", "b", 1.0)],
    },
    "terms is empty": {"terms": []},
    "terms is str": {"terms": "aa"},
    r"terms\[0\] is": {"terms": [("a", "a")]},
    "terms.* names query mode 'x'": {"terms": [("x", "a", 1.0)]},
    "terms.* names key mode 'x'": {"terms": [("a", "x", 1.0)]},
    "repeats": {"terms": [("a", "a", 1.0), ("a", "a", 1.0)]},
    "weight nan": {"terms": [("a", "a", float("nan"))]},
    "temperature is 0": {"temperature": 0},
    "temperature is str": {"temperature": "0.1"},
    r"temperature is a torch.float32 tensor of shape \(1,\)": {"temperature": torch.ones(1)},
    "labels is None": {"keys": {"a": torch.ones(2, 2)}},
    r"labels has shape \(2,\); expected \[3\] or \[3, P\]": {"labels": torch.zeros(2, dtype=torch.int64)},
    r"labels has shape \(3, 0\)": {"labels": torch.zeros(3, 0, dtype=torch.int64)},
    "labels: expected values in .-1, 4., got 4": {"labels": torch.tensor([[0, -1], [1, 2], [4, 3]])},
    "at least one positive .* got none in row 1": {"labels": torch.tensor([[0, -1], [-1, -1], [3, 3]])},
    "row 2 names a key twice": {"labels": torch.tensor([[0, -1], [1, -1], [3, 3]])},
    "labels is torch.int32": {"labels": torch.zeros(3, dtype=torch.int32)},
    "labels: expected values in": {"labels": torch.tensor([0, 1, 4])},
    "labels: expected values": {"labels": torch.tensor([-1, 0, 1])},
    "query_ids came without key_ids": {"query_ids": torch.arange(3)},
    "key_ids came without query_ids": {"key_ids": torch.arange(4)},
    r"key_ids has shape \(3,\)": {"query_ids": torch.arange(3), "key_ids": torch.arange(3)},
    "margin is inf": {"margin": float("inf")},
    "group was given": {"group": "world"},
    "backend is 'cutlass'": {"backend": "cutlass"},
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_errors_name_the_argument(message: str, backend: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        contrastive_loss(**{**GOOD, "backend": backend, **WRONG[message]})


def test_unused_modes_are_ignored() -> None:
    queries = {"a": unit(3, 2), "spare": torch.ones(9, 9, 9)}
    assert contrastive_loss(queries, {"a": unit(3, 2)}, terms=[("a", "a", 1.0)]).loss.isfinite()
