"""Metrics against the official numbers of MMEB's code and trec_eval's, for shared pools and lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rime_fast.eval.metrics import per_query, recall_at_k
from rime_fast.eval.ranking import NEVER, rank_candidates

CASES = json.loads((Path(__file__).parent / "metric_goldens.json").read_text())
# With graded relevance the official code pairs gains with the wrong labels; ours is held to trec_eval there.
MISPAIRED = ("shared-graded", "ndcg")


def ranked(case, **options):
    queries, candidates = (torch.tensor(case[side], dtype=torch.float64) for side in ("queries", "candidates"))
    return rank_candidates(queries, candidates, case["relevant"], gains=case["gains"], lists=case["lists"], **options)


@pytest.mark.parametrize("ties", ["pessimistic", "official"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_official_numbers(case, ties):
    ranking = ranked(case, ties=ties)
    for name, expected in case["official"].items():
        if (case["name"], name.partition("_")[0]) == MISPAIRED:
            continue
        assert per_query(ranking, name).mean().item() == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_trec_eval(case):
    ranking = ranked(case)
    names = {"recip_rank": "mrr"}
    for k in (1, 5, 10):
        names |= {f"P_{k}": f"precision@{k}", f"recall_{k}": f"recall@{k}", f"ndcg_cut_{k}": f"ndcg@{k}"}
        names |= {f"success_{k}": f"hit@{k}"}
    for theirs, ours in names.items():
        assert per_query(ranking, ours).mean().item() == pytest.approx(case["trec_eval"][theirs], abs=1e-12), theirs


def test_official_ties_follow_the_list():
    same = torch.ones(6, 4)
    lists = [[3, 1, 2], [5, 0, 4]]
    first, last = ([3], [5]), ([2], [4])
    for right, hit in ((first, 1.0), (last, 0.0)):
        ranking = rank_candidates(same[:2], same, list(right), lists=lists, ties="official")
        assert per_query(ranking, "hit@1").mean().item() == hit
        assert per_query(rank_candidates(same[:2], same, list(right), lists=lists), "hit@1").sum() == 0
    shared = rank_candidates(same, same, list(range(6)), ties="official", candidate_tile=2)
    assert shared.ranks.flatten().tolist() == [1, 2, 3, 4, 5, 6]
    several = rank_candidates(same[:1], same, [[4, 1]], ties="official")
    assert several.ranks.tolist() == [[5, 2]]


@pytest.mark.parametrize("width", [3, 40])
def test_lists_by_product_and_by_gather_agree(width, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(150, 16, generator=generator), torch.randn(2500, 16, generator=generator)
    lists = [torch.randperm(2500, generator=generator)[:width].tolist() for _ in range(150)]
    relevant = [[own[0], own[-1]] for own in lists]
    found = []
    for share in (0, 1000):
        monkeypatch.setattr("rime_fast.eval.ranking.SHARED_LISTS", share)
        found.append(rank_candidates(queries, candidates, relevant, lists=lists, top_k=2))
    assert torch.equal(found[0].ranks, found[1].ranks)
    assert torch.equal(found[0].top, found[1].top)


def test_relevant_outside_the_list_is_never_found():
    eye = torch.eye(4)
    ranking = rank_candidates(eye[:2], eye, [[0, 3], [2]], lists=[[0, 1], [1, 3]], absent="never")
    assert ranking.ranks.tolist() == [[1, NEVER], [NEVER, 0]]
    assert per_query(ranking, "recall@10").tolist() == [0.5, 0.0]
    assert per_query(ranking, "mrr").tolist() == [1.0, 0.0]
    assert per_query(ranking, "map@5").tolist() == [0.5, 0.0]
    assert per_query(ranking, "ndcg@5")[0] < 1
    assert recall_at_k(ranking, 1, capped=True) == 0.5


@pytest.mark.parametrize("name", ["hit", "hits@1", "ndcg@x", "map"])
def test_unknown_metric(name):
    with pytest.raises(ValueError, match="expected mrr, or one of hit"):
        per_query(rank_candidates(torch.eye(2), torch.eye(2), [0, 1]), name)


def test_options_are_checked():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="ties is 'optimistic'"):
        rank_candidates(eye, eye, [0, 1], ties="optimistic")
    with pytest.raises(ValueError, match="absent is 'zero'"):
        rank_candidates(eye, eye, [0, 1], absent="zero")
