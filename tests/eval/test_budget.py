"""The budget curve against the queries sent one by one, and against mode auto at its thresholds."""

from __future__ import annotations

import pytest
import torch

from rime_fast.data.retrieval import RetrievalSet
from rime_fast.eval.budget import budget_curve, budget_points, mean_curve, outcomes
from rime_fast.eval.embedder import RimeEmbedder, as_side
from rime_fast.eval.index import EmbeddingIndex
from rime_fast.eval.suites.tasks import TaskData
from tests.eval.test_embedder import ITEMS, TEXTS, parts


@pytest.fixture(scope="module")
def embedder() -> RimeEmbedder:
    return RimeEmbedder(*parts(), max_new_tokens=6)


@pytest.fixture(scope="module")
def data() -> RetrievalSet:
    queries = [as_side(item) for item in [*ITEMS, *TEXTS[2:], "find the boat", "a blue lake"]]
    candidates = [as_side(text) for text in [*TEXTS, "a small green one", "the lake ?"]]
    return RetrievalSet(queries, candidates, [[i % len(candidates)] for i in range(len(queries))])


def test_points_are_the_queries_sent_one_by_one():
    generator = torch.Generator().manual_seed(0)
    disc, gen = (torch.rand(37, generator=generator, dtype=torch.float64).round() for _ in "dg")
    margins = torch.rand(37, generator=generator).double()
    tokens = torch.randint(1, 9, (37,), generator=generator).tolist()
    curve = budget_points(disc, gen, margins, tokens)
    assert curve.shares[0] == 0
    assert curve.shares[-1] == 1
    assert len(curve.shares) == 21
    for share, score, spent, limit in zip(curve.shares, curve.scores, curve.tokens, curve.thresholds, strict=True):
        sent = margins < limit
        assert share == pytest.approx(sent.double().mean().item())
        assert score == pytest.approx(torch.where(sent, gen, disc).mean().item())
        assert spent == pytest.approx((sent * torch.tensor(tokens)).double().mean().item())
    assert f"{curve.scores[0]:.3f} by disc" in curve.line()


def test_equal_margins_go_together_and_infinite_ones_never():
    margins = torch.tensor([0.1, 0.1, 0.1, 0.4, torch.inf])
    curve = budget_points(torch.zeros(5), torch.tensor([1.0, 1, 0, 0, 1]), margins, [10] * 5)
    assert curve.shares == [0, 0.6, 0.8]
    assert curve.scores == pytest.approx([0, 0.4, 0.4])
    assert curve.tokens == [0, 6, 8]
    assert curve.thresholds == pytest.approx([0, 0.25, 2])
    assert curve.knee == 1
    assert "0.400 with 60% decoded (6.0 tokens a query, --threshold 0.25)" in curve.line()
    worse = budget_points(torch.ones(4), torch.zeros(4), torch.arange(4.0), [1] * 4)
    assert worse.knee is None
    assert "no share" in worse.line()
    assert budget_points(torch.ones(2), torch.zeros(2), torch.full((2,), torch.inf), [1, 1]).shares == [0]
    with pytest.raises(ValueError, match="entries"):
        budget_points(torch.ones(2), torch.zeros(2), torch.zeros(3), [1, 1, 1])


def test_the_mean_of_two_tasks():
    first = budget_points(torch.zeros(2), torch.ones(2), torch.tensor([0.1, 0.2]), [4, 4])
    second = budget_points(torch.zeros(4), torch.ones(4), torch.arange(4.0), [8] * 4, "ndcg@5")
    mean = mean_curve([first, second])
    assert mean.scores == pytest.approx(mean.shares)
    assert mean.tokens[-1] == 6
    assert mean.metric == "hit@1 or ndcg@5"
    assert mean.thresholds == []


def test_mode_auto_at_a_points_threshold_is_that_point(embedder, data):
    curve = budget_curve(embedder, data, metric="mrr")
    index = EmbeddingIndex(embedder.encode(data.candidates), facts={"mode": "disc"})
    k = len(curve.shares) // 2
    made = embedder.encode_items(data.queries, "auto", index=index, threshold=curve.thresholds[k])
    decoded = torch.tensor(made.tokens) > 0
    assert 0 < curve.shares[k] < 1
    assert decoded.double().mean().item() == pytest.approx(curve.shares[k])
    assert sum(made.tokens) / len(made.tokens) == pytest.approx(curve.tokens[k])
    scores, _ = outcomes(data, made.embeddings, index.rows, "mrr")
    assert scores.mean().item() == pytest.approx(curve.scores[k])
    with pytest.raises(ValueError, match="mode 'both'"):
        budget_curve(embedder, data, queries=embedder.encode_items(data.queries, "gen"))


def test_a_suites_task_with_lists_and_a_query_nobody_judged(embedder):
    task = TaskData(
        [as_side(text) for text in TEXTS[:3]],
        [as_side(text) for text in TEXTS],
        list("abcd"),
        [[0], [], [3]],
        pools=[[0, 1], [0, 1], [2]],
    )
    scores, margins = outcomes(task, torch.eye(4)[:3], torch.eye(4))
    assert scores.tolist() == [1, 0, 0]
    assert margins.tolist() == [1, torch.inf, torch.inf]
    assert budget_curve(embedder, task).shares == [0, 1 / 3]
