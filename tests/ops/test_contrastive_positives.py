"""The contrastive loss with several positives a query (labels [N, P], -1 where there are fewer)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rime_fast.ops import dispatch, native
from rime_fast.ops.contrastive import contrastive_loss, cpu
from rime_fast.ops.contrastive.problem import Options
from tests.ops.contrastive_cases import Case, check_rule, make_case, relative, run

interpreter = pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1 (no GPU)")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TILE", (37, 300))


def by_definition(case: Case) -> Tensor:
    """Pair by pair: every query weighs 1, shared by its positives; softmaxes run over all that is not masked."""
    labels, ids = case.settings["labels"], (case.settings.get("query_ids"), case.settings.get("key_ids"))
    total = torch.zeros((), dtype=torch.float64)
    for q, k, weight in case.terms:
        similarity = case.queries[q] @ case.keys[k].T
        positive = torch.zeros_like(similarity, dtype=torch.bool)
        for i, row in enumerate(labels.tolist()):
            for j in row:
                positive[i, j] |= j >= 0
        row_out = col_out = torch.zeros_like(positive)
        if ids[0] is not None:
            row_out = col_out = ids[0][:, None] == ids[1]
        if (margin := case.settings["margin"]) is not None:
            known = similarity.masked_fill(~positive, -torch.inf)
            row_out = row_out | (similarity > known.amax(1, keepdim=True) + margin)
            col_out = col_out | (similarity > known.amax(0, keepdim=True) + margin)
        logits = similarity / case.temperature
        by_row = logits.masked_fill(row_out & ~positive, -torch.inf).logsumexp(1, keepdim=True) - logits
        by_col = logits.masked_fill(col_out & ~positive, -torch.inf).logsumexp(0, keepdim=True) - logits
        pairs = 0.5 * (by_row + by_col) if case.settings["symmetric"] else by_row
        per_query = pairs.masked_fill(~positive, 0).sum(1) / positive.sum(1)
        total = total + weight * per_query.mean()
    return total


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_is_the_mean_over_positives(backend: str, masked: bool, symmetric: bool) -> None:
    case = make_case(9, 13, 6, positives=3, ids=masked, margin=0.1 if masked else None, symmetric=symmetric)
    assert (case.settings["labels"] >= 0).sum(1).unique().numel() > 1
    assert relative(run(case, torch.float64, backend).out.loss, by_definition(case)) < 1e-12


def test_class_labels_give_supcon_both_ways() -> None:
    """Classes of one size, keys of the same classes: SupCon's L_out of a b^T and of b a^T, averaged."""
    classes = torch.arange(12) % 4
    case = make_case(12, 12, 5, temperature=0.1)
    case.terms = [("disc", "gen", 1.0)]
    same = classes[:, None] == classes
    case.settings["labels"] = same.nonzero()[:, 1].view(12, 3)
    logits = case.queries["disc"] @ case.keys["gen"].T / 0.1
    expected = 0.5 * sum(-(m.log_softmax(1) * same).sum(1).div(3).mean() for m in (logits, logits.T))
    assert relative(run(case, torch.float64, "chunked").out.loss, torch.as_tensor(expected)) < 1e-12


def test_the_best_positive_makes_the_hit() -> None:
    queries, keys = torch.eye(3), torch.eye(3)
    found = contrastive_loss(
        {"a": queries}, {"a": keys}, terms=[("a", "a", 1.0)], labels=torch.tensor([[1, 0], [2, 0], [2, -1]])
    )
    assert found.accuracy["a-a"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("backend", ["reference", "chunked", pytest.param("triton", marks=interpreter)])
def test_one_positive_in_two_dimensions_is_one_in_one(backend: str) -> None:
    case = make_case(20, 30, 8, shuffled=True, ids=True, margin=0.1)
    flat = run(case, torch.float32, backend)
    column = case.settings["labels"][:, None]
    none = torch.full_like(column, -1)
    shapes = {"[N, 1]": column, "[N, 3]": torch.cat([none, column, none], 1)}
    for name, labels in shapes.items():
        found = run(replace(case, settings={**case.settings, "labels": labels}), torch.float32, backend)
        same = torch.equal if name == "[N, 1]" else lambda a, b: relative(a, b) < 1e-6
        assert same(found.out.loss, flat.out.loss), name
        for leaf, gradient in flat.gradients.items():
            assert same(found.gradients[leaf], gradient), (name, leaf)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("temperature", [0.02, 0.004])
@pytest.mark.parametrize("compiled", [True, False])
def test_chunked_obeys_the_rule(
    masks: str, temperature: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape, peaked in (((3, 5, 7), False), ((80, 650, 33), True)):
        for symmetric in (True, False):
            case = make_case(
                *shape,
                temperature=temperature,
                peaked=peaked,
                symmetric=symmetric,
                positives=4,
                ids=masks == "both",
                margin=0.02 if masks == "both" else None,
            )
            truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
            with monkeypatch.context() as patch:
                if not compiled:
                    patch.setattr(native, "available", lambda cuda=False: False)
                check_rule(run(case, torch.float32, "chunked"), eager, truth, torch.float32)
            check_rule(run(case, torch.float64, "chunked"), truth, truth, torch.float64)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.02, 0.004])
def test_interpreted_kernels_obey_the_rule(dtype: torch.dtype, temperature: float) -> None:
    case = make_case(70, 90, 19, temperature=temperature, dtype=dtype, positives=3, ids=True, margin=0.05)
    truth, eager = run(case, torch.float64, "reference"), run(case, dtype, "reference")
    check_rule(run(case, dtype, "triton"), eager, truth, dtype)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 20),
    extra=st.integers(0, 20),
    positives=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    symmetric=st.booleans(),
)
def test_any_shape(n: int, extra: int, positives: int, seed: int, symmetric: bool) -> None:
    case = make_case(n, n + extra, 5, seed=seed, positives=positives, symmetric=symmetric)
    truth = run(case, torch.float64, "reference")
    check_rule(run(case, torch.float64, "chunked"), truth, truth, torch.float64)
    check_rule(run(case, torch.float32, "chunked"), run(case, torch.float32, "reference"), truth, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend: str) -> None:
    case = make_case(4, 6, 3, temperature=0.5, ids=True, margin=0.9, positives=3)

    def loss(q: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
        terms = [("disc", "disc", 1.0)]
        sides = {"disc": q}, {"disc": k}
        return contrastive_loss(*sides, terms=terms, temperature=temperature, backend=backend, **case.settings).loss

    leaves = [case.queries["disc"], case.keys["disc"], torch.tensor(0.5, dtype=torch.float64)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(loss, leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, leaves)


def test_opcheck_and_one_graph() -> None:
    case = make_case(9, 11, 4, positives=3)
    leaves = [case.queries["disc"].float().requires_grad_(), case.keys["disc"].float().requires_grad_()]
    labels, temperature = case.settings["labels"], torch.tensor(0.1)
    arguments = (
        [leaves[0]],
        [leaves[1]],
        temperature,
        labels,
        None,
        None,
        Options(((0, 0),), None, True, "chunked").encode(),
    )
    torch.library.opcheck(torch.ops.rime_fast.contrastive.default, arguments)

    def step(queries: Tensor, keys: Tensor) -> Tensor:
        return contrastive_loss({"a": queries}, {"a": keys}, terms=[("a", "a", 1.0)], labels=labels).loss

    expected = torch.autograd.grad(step(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
