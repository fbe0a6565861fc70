"""The reward's reference against loops over single similarities, written from recipe section 4."""

from __future__ import annotations

import math
import statistics as stats

import pytest
import torch

from rime_fast.ops.reward import RewardWeights
from tests.ops.reward_cases import Case, make_case, score


def _similarity(x: torch.Tensor, y: torch.Tensor) -> float:
    return math.fsum(a * b for a, b in zip(x.double().tolist(), y.double().tolist(), strict=True))


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float())


def _by_hand(case: Case, weights: RewardWeights) -> dict[str, list[list[float]]]:
    """Every term of every rollout, one at a time."""
    n_items, group_size, _ = case["gen"].shape
    out: dict[str, list[list[float]]] = {}
    for b in range(n_items):
        rows = [_one(case, weights, b, g) for g in range(group_size)]
        rewards = [row["reward"] for row in rows]
        deviation = stats.stdev(rewards) if group_size > 1 else 0.0
        for row in rows:
            row["group_std"] = deviation
            row["advantage"] = row["reward"] - stats.fmean(rewards)
            if weights.normalize_std:
                row["advantage"] /= deviation + weights.eps
        for name in rows[0]:
            out.setdefault(name, []).append([row[name] for row in rows])
    return out


def _one(case: Case, weights: RewardWeights, b: int, g: int) -> dict[str, float]:
    first = int(case["positive"][b])
    own_columns = range(first, first + weights.positives)
    sims = [_similarity(case["gen"][b, g], anchor) for anchor in case["anchors"]]
    own = [sims[j] for j in own_columns]
    mask = case["negatives_mask"]
    others = [s for j, s in enumerate(sims) if j not in own_columns and (mask is None or mask[b, j])]

    def rank(p: int, among: list[float]) -> float:
        threshold = _fp32(own[p])
        return 1 + sum(_fp32(s) > threshold for s in among) + 0.5 * sum(_fp32(s) == threshold for s in among)

    ranks = [rank(p, others) for p in range(weights.positives)]
    positive, negative = stats.fmean(own), _negative(others, weights)
    if weights.mode == "ume_r1":
        everyone = [rank(p, others + own[:p] + own[p + 1 :]) for p in range(weights.positives)]
        hit = stats.fmean(float(r <= weights.positives) for r in everyone)
        factor = hit
    else:
        hit = float(ranks[0] <= weights.hit_k)
        factor = {"hit": hit, "1/rank": 1 / ranks[0], "1/log2(1+rank)": 1 / math.log2(1 + ranks[0])}[
            weights.rank_reward
        ]
    over = max(0.0, float(case["lengths"][b, g]) - weights.length_limit)
    row = {
        "format": weights.w_fmt * float(case["format_ok"][b, g]),
        "score": weights.w_rank * factor * (positive - negative),
        "refine": weights.w_refine * (positive - float(case["disc_similarity"][b])),
        "length": -weights.w_len * over / weights.length_limit,
    }
    return row | {
        "reward": sum(row.values()),
        "rank": stats.fmean(ranks),
        "hit": hit,
        "positive": positive,
        "negative": negative,
        "nan": 0.0,
    }


def _negative(others: list[float], weights: RewardWeights) -> float:
    if not others:
        return 0.0
    if weights.mode == "ume_r1" or weights.negative == "mean":
        return stats.fmean(others)
    if weights.negative == "max":
        return max(others)
    shares = [math.exp(s / weights.softmax_temperature) for s in others]
    return sum(w * s for w, s in zip(shares, others, strict=True)) / sum(shares)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "weights",
    [
        RewardWeights(),
        RewardWeights(rank_reward="hit", hit_k=3, negative="softmax", normalize_std=False),
        RewardWeights(rank_reward="1/rank", negative="max", w_fmt=0.3, w_rank=2.0, w_refine=0.1, w_len=0.5),
        RewardWeights(negative="softmax", softmax_temperature=0.05, length_limit=20, eps=1e-2),
        RewardWeights.ume_r1(3),
    ],
    ids=["default", "hit", "reciprocal", "softmax", "ume_r1"],
)
def test_reference_by_hand(weights: RewardWeights, ties: bool) -> None:
    case = make_case(3, 4, 8, 40, positives=weights.positives, ties=ties)
    got = score(case, weights, backend="reference")
    want = _by_hand(case, weights)
    for name, values in want.items():
        torch.testing.assert_close(got[name], torch.tensor(values), rtol=2e-6, atol=2e-6, msg=lambda m, n=name: n + m)
    if ties:
        assert bool((got["rank"] % 1 != 0).any())  # half ranks did occur


def test_format_of_the_reward_is_the_sum_of_its_terms() -> None:
    got = score(make_case(), backend="reference")
    torch.testing.assert_close(got["reward"], got["format"] + got["score"] + got["refine"] + got["length"])


def test_ume_r1_is_the_top_k_rule_without_ties() -> None:
    """hits of the own group in the top G / G, as torch.topk finds them."""
    group_size, n_items = 4, 5
    case = make_case(n_items, group_size, 6, n_items * group_size, spread=0.8, masked=False)
    case["positive"] = torch.arange(n_items) * group_size
    case["anchors"] = case["gen"].flatten(0, 1).roll(1, 0)  # near the groups, but not the same
    got = score(case, RewardWeights.ume_r1(group_size), backend="reference")
    similarity = case["gen"] @ case["anchors"].T
    top = similarity.topk(group_size, dim=2).indices // group_size
    hits = (top == torch.arange(n_items)[:, None, None]).float().mean(2)
    assert 0 < float(hits.mean()) < 1
    torch.testing.assert_close(got["hit"], hits)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"mode": "cosine"}, ValueError),
        ({"rank_reward": "rank"}, ValueError),
        ({"negative": "min"}, ValueError),
        ({"positives": 4}, ValueError),
        ({"positives": 0, "mode": "ume_r1"}, ValueError),
        ({"hit_k": 0}, ValueError),
        ({"hit_k": 1.5}, TypeError),
        ({"w_fmt": float("nan")}, ValueError),
        ({"eps": 0.0}, ValueError),
        ({"length_limit": -1}, ValueError),
        ({"normalize_std": 1}, TypeError),
    ],
)
def test_weights_refuse_what_they_cannot_mean(fields: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"RewardWeights.{next(iter(fields))}"):
        RewardWeights(**fields)


def test_weights_survive_the_operators_schema() -> None:
    for weights in (
        RewardWeights.ume_r1(8, w_fmt=0.5),
        RewardWeights(rank_reward="hit", hit_k=5, negative="max", normalize_std=False, length_limit=64, eps=1e-3),
    ):
        assert RewardWeights.decode(tuple(weights.encode())) == weights
