"""Every metric against a brute-force computation that sorts the whole similarity row in Python."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rime_fast.eval import metrics
from rime_fast.eval.ranking import rank_candidates


def sorted_gains(scores: list[float], relevance: dict[int, float], pool: list[int]) -> list[float]:
    """Gains in ranked order: similarity falling, ties lowest gain first."""
    order = sorted(pool, key=lambda c: (-scores[c], relevance.get(c, 0.0)))
    return [relevance.get(c, 0.0) for c in order]


def brute(queries, candidates, relevant, gains, lists, k, exponential=False):
    """Means of (hit@k, MRR, nDCG@k, recall@k) by definition."""
    sims = (queries.double() @ candidates.double().t()).tolist()
    rows = []
    for i, own in enumerate(relevant):
        pool = lists[i] if lists else range(len(sims[i]))
        ordered = sorted_gains(sims[i], dict(zip(own, gains[i], strict=True)), pool)
        lift = (lambda g: 2**g - 1) if exponential else (lambda g: g)
        places = [r for r, g in enumerate(ordered, 1) if g > 0]
        dcg = sum(lift(g) / math.log2(1 + r) for r, g in enumerate(ordered[:k], 1))
        best = sum(lift(g) / math.log2(1 + r) for r, g in enumerate(sorted(gains[i], reverse=True)[:k], 1))
        rows.append((places[0] <= k, 1 / places[0], dcg / best, sum(p <= k for p in places) / len(places)))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def computed(ranking, k, exponential=False):
    return [
        metrics.hit_at_k(ranking, k),
        metrics.mean_reciprocal_rank(ranking),
        metrics.ndcg_at_k(ranking, k, exponential=exponential),
        metrics.recall_at_k(ranking, k),
    ]


@st.composite
def problems(draw):
    """Small integer embeddings: exact in fp32 and full of ties."""
    seed = draw(st.integers(0, 2**31))
    n, m, d = draw(st.integers(1, 7)), draw(st.integers(1, 23)), draw(st.integers(1, 4))
    rng = random.Random(seed)
    queries = torch.tensor([[rng.randint(-1, 1) for _ in range(d)] for _ in range(n)], dtype=torch.float32)
    candidates = torch.tensor([[rng.randint(-2, 2) for _ in range(d)] for _ in range(m)], dtype=torch.float32)
    relevant = [rng.sample(range(m), rng.randint(1, min(m, 4))) for _ in range(n)]
    gains = [[float(rng.randint(1, 3)) for _ in own] for own in relevant]
    lists = None
    if draw(st.booleans()):
        lists = []
        for own in relevant:
            others = [c for c in range(m) if c not in own]
            chosen = own + rng.sample(others, rng.randint(0, len(others)))
            rng.shuffle(chosen)
            lists.append(chosen)
    return queries, candidates, relevant, gains, lists


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 12), st.booleans(), st.sampled_from([(128, 2048), (3, 4), (1, 1)]))
def test_equals_brute_force_with_ties_gains_and_lists(problem, k, exponential, tiles):
    queries, candidates, relevant, gains, lists = problem
    ranking = rank_candidates(
        queries, candidates, relevant, gains=gains, lists=lists, query_tile=tiles[0], candidate_tile=tiles[1]
    )
    expected = brute(queries, candidates, relevant, gains, lists, k, exponential)
    assert computed(ranking, k, exponential) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_candidate_order_does_not_matter(problem, rng):
    queries, candidates, relevant, gains, _ = problem
    order = list(range(len(candidates)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    moved = [[place[c] for c in own] for own in relevant]
    a = rank_candidates(queries, candidates, relevant, gains=gains)
    b = rank_candidates(queries, candidates[order], moved, gains=gains, candidate_tile=5)
    assert torch.equal(a.ranks.sort(dim=1).values, b.ranks.sort(dim=1).values)


def test_real_valued_embeddings_and_duplicates():
    """Random unit rows, every candidate present twice: the twin ties exactly and counts as a miss at rank 1."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(300, 48, generator=generator), dim=1)
    candidates = torch.cat([unit, unit])[torch.randperm(600, generator=generator)]
    rows = [(candidates == unit[i]).all(dim=1).nonzero().flatten().tolist() for i in range(300)]
    single = rank_candidates(unit, candidates, [own[0] for own in rows], candidate_tile=64, query_tile=50)
    both = rank_candidates(unit, candidates, rows, candidate_tile=64, query_tile=50)
    assert metrics.hit_at_k(single, 1) == 0.0
    assert metrics.hit_at_k(single, 2) == 1.0
    assert metrics.mean_reciprocal_rank(single) == 0.5
    assert metrics.hit_at_k(both, 1) == 1.0
    assert metrics.ndcg_at_k(both, 10) == pytest.approx(1.0)


def test_collapsed_encoder_scores_nothing():
    same = torch.ones(40, 8)
    ranking = rank_candidates(same, same, list(range(40)))
    assert metrics.hit_at_k(ranking, 39) == 0.0
    assert metrics.hit_at_k(ranking, 40) == 1.0


@pytest.mark.parametrize("lists", [None, [list(range(6))] * 3])
def test_nan_embeddings_come_last(lists):
    queries = torch.eye(6)[:3].clone()
    candidates = torch.eye(6).clone()
    queries[1] = torch.nan
    candidates[2] = torch.nan
    ranking = rank_candidates(queries, candidates, [0, 1, 2], lists=lists)
    assert ranking.ranks.flatten().tolist() == [1, 6, 6]


def test_top_rows_and_scores():
    queries = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[0.1, 0], [0.9, 0], [0.5, 0], [-1.0, 0], [0.7, 0]])
    shared = rank_candidates(queries, candidates, [2], top_k=3, candidate_tile=2)
    assert shared.top.tolist() == [[1, 4, 2]]
    assert shared.top_scores[0].tolist() == pytest.approx([0.9, 0.7, 0.5])
    own = rank_candidates(torch.cat([queries] * 2), candidates, [2, 0], lists=[[2, 3], [0, 3, 4]], top_k=3)
    assert own.top.tolist() == [[2, 3, -1], [4, 0, 3]]
    assert own.pool.tolist() == [2, 3]


def test_capped_recall_and_truncated_mrr():
    queries, candidates = torch.tensor([[1.0]]), torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    ranking = rank_candidates(queries, candidates, [[1, 2, 3]])
    assert metrics.recall_at_k(ranking, 2) == pytest.approx(1 / 3)
    assert metrics.recall_at_k(ranking, 2, capped=True) == pytest.approx(1 / 2)
    assert metrics.mean_reciprocal_rank(ranking, 1) == 0.0
    assert metrics.mean_reciprocal_rank(ranking, 2) == 0.5


def test_summary_names():
    eye = torch.eye(4)
    assert metrics.summary(rank_candidates(eye, eye, torch.arange(4))) == {
        "hit@1": 1.0,
        "hit@5": 1.0,
        "hit@10": 1.0,
        "mrr": 1.0,
        "ndcg@5": 1.0,
        "ndcg@10": 1.0,
    }
    assert "recall@5" in metrics.summary(rank_candidates(eye, eye, [[0, 1], [1], [2], [3]]))


def test_padded_tensor_relevance():
    eye = torch.eye(4)
    padded = rank_candidates(eye, eye, torch.tensor([[0, 1], [1, -1], [2, -1], [3, 0]]))
    listed = rank_candidates(eye, eye, [[0, 1], [1], [2], [3, 0]])
    assert torch.equal(padded.ranks, listed.ranks)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"relevant": [0]}, r"relevant must have one entry per query \(2\), got 1"),
        ({"relevant": [[0], []]}, r"relevant\[1\] is empty"),
        ({"relevant": [0, 3]}, r"relevant\[1\] names candidate 3; expected rows in \[0, 3\)"),
        ({"relevant": [[0, 0], [1]]}, r"relevant\[0\] names a candidate twice"),
        ({"relevant": [0, 1], "gains": [[1.0], [0.0]]}, r"gains\[1\] must be 1 positive numbers"),
        ({"relevant": [0, 1], "gains": [[1.0, 2.0], [1.0]]}, r"gains\[0\] must be 1 positive numbers"),
        ({"relevant": [0, 1], "gains": [[1.0], [float("inf")]]}, r"gains\[1\] must be 1 positive numbers"),
        ({"relevant": [0, 1], "gains": [[1.0]]}, r"gains must have one entry per query \(2\), got 1"),
        ({"relevant": [0, 1], "lists": [[0, 1]]}, r"lists must have one entry per query \(2\), got 1"),
        ({"relevant": [0, 1], "lists": [[0, 1], [0, 2]]}, r"lists\[1\] lacks candidate 1"),
        ({"relevant": [0, 1], "lists": [[0, 7], [1]]}, r"lists\[0\] names candidate 7"),
        ({"relevant": [0, 1], "lists": [[0, 0], [1]]}, r"lists\[0\] names a candidate twice"),
        ({"relevant": [0, 1], "queries": torch.ones(2, 4)}, r"must agree in D, got 4 and 5"),
        ({"relevant": [0, 1], "queries": torch.ones(2, 5, dtype=torch.int64)}, r"queries must be a floating"),
        ({"relevant": [], "queries": torch.ones(0, 5)}, r"queries must have at least one row"),
        ({"relevant": [0, 1], "candidates": torch.ones(0, 5)}, r"candidates must have at least one row"),
        ({"relevant": [0, 1], "candidates": torch.ones(5)}, r"candidates must be a floating"),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    arguments = {"queries": torch.ones(2, 5), "candidates": torch.ones(3, 5)} | kwargs
    with pytest.raises(ValueError, match=message):
        rank_candidates(**arguments)


def test_memory_does_not_grow_with_the_product(monkeypatch):
    """No tensor of the ranking is larger than the tile or the inputs."""
    largest = 0
    original = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        out = original(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    rows = torch.randn(700, 4)
    rank_candidates(rows, rows, list(range(700)), query_tile=16, candidate_tile=32)
    assert largest == 16 * 32
