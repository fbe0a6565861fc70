"""Matryoshka: several widths of one contrast in one sweep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rime_fast.ops.contrastive import contrastive_loss, cpu
from rime_fast.ops.contrastive.problem import Options
from tests.ops.contrastive_cases import Case, check_rule, make_case, relative, run


def nested(*shape: int, dims: list[int], dim_weights: list[float] | None = None, **more: Any) -> Case:
    """Rows that are not of unit norm, at any width."""
    case = make_case(*shape, **more)
    for side in (case.queries, case.keys):
        for rows in side.values():
            rows *= torch.linspace(0.5, 2, rows.shape[0], dtype=torch.float64)[:, None]
            rows[:] = rows.to(more.get("dtype", torch.float32)).double()
    return replace(case, settings={**case.settings, "dims": dims, "dim_weights": dim_weights})


def of_one_width(case: Case, width: int) -> Case:
    cut = [{m: F.normalize(rows[:, :width], dim=1) for m, rows in side.items()} for side in (case.queries, case.keys)]
    plain = {name: value for name, value in case.settings.items() if name not in ("dims", "dim_weights")}
    return replace(case, queries=cut[0], keys=cut[1], settings=plain)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_is_the_weighted_sum_of_the_widths(backend: str) -> None:
    case = nested(9, 13, 12, dims=[3, 5, 12], dim_weights=[0.5, 2.0, 1.0], ids=True, margin=0.1)
    out = run(case, torch.float64, backend).out
    single = {width: run(of_one_width(case, width), torch.float64, "reference").out for width in (3, 5, 12)}
    assert list(out.per_dim) == [3, 5, 12]
    for width, one in single.items():
        assert relative(out.per_dim[width], one.loss) < 1e-12
        for name, hit in one.accuracy.items():
            assert out.accuracy[(str(name), width)] == hit
    for name, value in out.per_term.items():
        expected = 0.5 * single[3].per_term[name] + 2 * single[5].per_term[name] + single[12].per_term[name]
        assert relative(value, expected) < 1e-12
        assert out.accuracy[name] == out.accuracy[(name, 12)]
    assert relative(out.loss, 0.5 * single[3].loss + 2 * single[5].loss + single[12].loss) < 1e-12


@pytest.mark.parametrize("masks", ["none", "both", "several"])
@pytest.mark.parametrize("temperature", [0.02, 0.004])
def test_chunked_obeys_the_rule(masks: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "NESTED_TILE", (37, 300))
    for shape, dims in (((1, 1, 5), [1, 5]), ((80, 340, 33), [7, 8, 20, 31])):
        for symmetric in (True, False):
            case = nested(
                *shape,
                dims=dims,
                dim_weights=[0.5 + i for i in range(len(dims))],
                temperature=temperature,
                shuffled=masks != "several",
                positives=3 if masks == "several" else 1,
                symmetric=symmetric,
                ids=masks != "none",
                margin=0.02 if masks != "none" and shape[2] > 5 else None,
            )
            truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
            check_rule(run(case, torch.float32, "chunked"), eager, truth, torch.float32)
            check_rule(run(case, torch.float64, "chunked"), truth, truth, torch.float64)


def test_more_widths_than_the_kernels_take() -> None:
    case = nested(9, 20, 24, dims=list(range(3, 23)), ids=True, margin=0.1)
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    check_rule(run(case, torch.float32, "chunked"), eager, truth, torch.float32)


def test_a_width_of_zeros_and_threads_change_nothing() -> None:
    """Rows whose first columns are 0 have no direction there; sums do not depend on the threads."""
    case = nested(150, 610, 40, dims=[8, 24, 40], positives=2)
    for side in (case.queries, case.keys):
        for rows in side.values():
            rows[:3, :8] = 0.0
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(run(case, torch.float32, "chunked"))
    finally:
        torch.set_num_threads(threads)
    check_rule(found[0], eager, truth, torch.float32)
    assert all(torch.equal(rows, found[1].gradients[name]) for name, rows in found[0].gradients.items())


@pytest.mark.parametrize("temperature", [1e-6, 1e-8])
@pytest.mark.parametrize("dims", [[2, 32], [31, 32]])
def test_logits_of_any_size(dims: list[int], temperature: float) -> None:
    """Forward and backward make the same logits: at 10^6 the last digit is 0.06, and an exponential shows it."""
    case = nested(40, 50, 32, dims=dims, temperature=temperature)
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    check_rule(run(case, torch.float32, "chunked"), eager, truth, torch.float32)


@pytest.mark.parametrize("dims", [[1], [1, 2], [1, 8, 32], list(range(1, 20))])
@pytest.mark.parametrize("first", [0.0, 1e-5, 1.0])
def test_a_width_of_one_compares_signs(dims: list[int], first: float) -> None:
    """Whose gradient is 0: none of its terms may be left over, times the inverse of a first column near 0."""
    case = nested(40, 330, 32, dims=dims, ids=True, margin=0.1)
    for side in (case.queries, case.keys):
        for rows in side.values():
            rows[:, 0] = (first * rows[:, 0]).float()
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    for dtype, plain in ((torch.float32, eager), (torch.float64, truth)):
        found = run(case, dtype, "chunked")
        found.out = replace(found.out, accuracy=truth.out.accuracy)  # signs tie: rounding says which of them hits
        check_rule(found, plain, truth, dtype)
    if dims == [1]:
        assert not any(value.any() for name, value in eager.gradients.items() if name != "temperature")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_half_precision(dtype: torch.dtype, as_on_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = nested(40, 60, 24, dims=[4, 16, 24], dtype=dtype, ids=True)
    truth, eager = run(case, torch.float64, "reference"), run(case, dtype, "reference")
    if as_on_cuda:  # rows in their own dtype
        monkeypatch.setattr(cpu, "operands", lambda tensors: [t.detach().contiguous() for t in tensors])
    check_rule(run(case, dtype, "chunked"), eager, truth, dtype)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 20),
    extra=st.integers(0, 20),
    dims=st.lists(st.integers(2, 24), min_size=1, max_size=5, unique=True).map(sorted),
    spare=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_any_widths(n: int, extra: int, dims: list[int], spare: int, seed: int) -> None:
    case = nested(n, n + extra, dims[-1] + spare, dims=dims, seed=seed)
    truth = run(case, torch.float64, "reference")
    check_rule(run(case, torch.float64, "chunked"), truth, truth, torch.float64)


def test_the_whole_width_alone_is_the_loss_of_normalised_rows_bit_for_bit() -> None:
    case = nested(70, 90, 24, dims=[24], ids=True, margin=0.1)
    queries = {m: rows.float().requires_grad_() for m, rows in case.queries.items()}
    keys = {m: rows.float().requires_grad_() for m, rows in case.keys.items()}
    leaves = [*queries.values(), *keys.values()]
    found = contrastive_loss(queries, keys, terms=case.terms, **case.settings)
    unit = [{m: F.normalize(rows, dim=1) for m, rows in side.items()} for side in (queries, keys)]
    plain = {name: value for name, value in case.settings.items() if name not in ("dims", "dim_weights")}
    wanted = contrastive_loss(*unit, terms=case.terms, **plain)
    assert torch.equal(found.loss, wanted.loss)
    for ours, theirs in zip(*(torch.autograd.grad(out.loss, leaves) for out in (found, wanted)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend: str) -> None:
    case = nested(4, 6, 5, dims=[2, 3, 5], dim_weights=[1.0, 0.5, 2.0], temperature=0.5, ids=True, margin=0.9)

    def loss(q: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
        options = {"terms": [("a", "a", 1.0)], "temperature": temperature, "backend": backend, **case.settings}
        return contrastive_loss({"a": q}, {"a": k}, **options).loss

    leaves = [case.queries["disc"], case.keys["disc"], torch.tensor(0.5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(loss, [leaf.clone().requires_grad_() for leaf in leaves])


def test_opcheck_and_one_graph() -> None:
    queries, keys = F.normalize(torch.randn(9, 6), dim=1).requires_grad_(), F.normalize(torch.randn(11, 6), dim=1)
    options = Options(((0, 0),), 0.1, True, "chunked", (2, 6)).encode()
    arguments = ([queries], [keys], torch.tensor(0.1, requires_grad=True), None, None, None, options)
    torch.library.opcheck(torch.ops.rime_fast.contrastive.default, arguments)

    def step(rows: Tensor, weight: float) -> Tensor:
        options = {"terms": [("a", "a", 1.0)], "dims": [2, 6], "dim_weights": [weight, 1.0]}
        return contrastive_loss({"a": rows}, {"a": keys}, **options).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for weight in (0.5, 0.7):
        assert torch.equal(compiled(queries, weight), step(queries, weight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": [4, 2]}, r"dims is \[4, 2\]; expected ascending whole numbers from 1 to 4"),
        ({"dims": [2, 5]}, "expected ascending whole numbers from 1 to 4"),
        ({"dims": [2, 2]}, "expected ascending"),
        ({"dims": [0, 2]}, "expected ascending"),
        ({"dims": [2.0, 4]}, "expected ascending"),
        ({"dims": []}, "expected ascending"),
        ({"dims": 4}, "dims is int; expected a list of widths"),
        ({"dim_weights": [1.0]}, "dim_weights came without dims"),
        ({"dims": [2, 4], "dim_weights": [1.0]}, "expected a number for each of the 2 dims"),
        ({"dims": [2, 4], "dim_weights": [1.0, float("nan")]}, "dim_weights holds nan"),
    ],
)
def test_bad_widths_are_named(changes: dict[str, Any], message: str) -> None:
    rows = {"a": torch.randn(3, 4)}
    with pytest.raises((ValueError, TypeError), match=message):
        contrastive_loss(rows, rows, terms=[("a", "a", 1.0)], **changes)
