"""Retrieval metrics from the ranks of the relevant candidates (``ranking.rank_candidates``), averaged over queries.

All take a ``Ranking`` and return a Python float in [0, 1]. Definitions:

    hit@k     1 if the best-placed relevant candidate has rank <= k
    MRR       1 / rank of the best-placed relevant candidate
    recall@k  relevant candidates with rank <= k, over min(number relevant, k) when ``capped``, else over all of them
    nDCG@k    sum over relevant with rank <= k of gain / log2(1 + rank), over the same sum for the best possible order

The gain in nDCG is linear, as in trec_eval and hence MTEB and MMEB-V2 (``exponential=True``: 2^gain - 1, Jarvelin and
Kekalainen's later form). Ties: see ranking.py (a tie with a wrong candidate counts as a miss).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rime_fast.eval.ranking import Ranking, rank_candidates

__all__ = ["Ranking", "hit_at_k", "mean_reciprocal_rank", "ndcg_at_k", "rank_candidates", "recall_at_k", "summary"]


def hit_at_k(ranking: Ranking, k: int = 1) -> float:
    """Fraction of queries with a relevant candidate among the first ``k``."""
    return (ranking.best <= _positive(k)).double().mean().item()


def mean_reciprocal_rank(ranking: Ranking, k: int | None = None) -> float:
    """Mean of 1/rank of the best-placed relevant candidate; with ``k``, ranks beyond it count 0 (MRR@k)."""
    reciprocal = 1.0 / ranking.best.double()
    if k is not None:
        reciprocal = torch.where(ranking.best <= _positive(k), reciprocal, 0.0)
    return reciprocal.mean().item()


def recall_at_k(ranking: Ranking, k: int, *, capped: bool = False) -> float:
    """Mean fraction of the relevant candidates among the first ``k`` (``capped``: of the k possible at most)."""
    real = ranking.ranks > 0
    possible = real.sum(dim=1).double()
    if capped:
        possible = possible.clamp(max=_positive(k))
    return ((real & (ranking.ranks <= _positive(k))).sum(dim=1).double() / possible).mean().item()


def ndcg_at_k(ranking: Ranking, k: int = 10, *, exponential: bool = False) -> float:
    """Mean normalised discounted cumulative gain of the first ``k``."""
    gains = torch.exp2(ranking.gains) - 1 if exponential else ranking.gains
    seen = (ranking.ranks > 0) & (ranking.ranks <= _positive(k))
    discounted = gains / torch.log2(1.0 + ranking.ranks.clamp(min=1).double())
    dcg = torch.where(seen, discounted, 0.0).sum(dim=1)
    ideal = gains.sort(dim=1, descending=True).values[:, :k]
    ideal_dcg = (ideal / torch.log2(2.0 + torch.arange(ideal.shape[1], dtype=torch.float64))).sum(dim=1)
    return (dcg / ideal_dcg).mean().item()


def summary(ranking: Ranking, hits: Sequence[int] = (1, 5, 10), ndcg: Sequence[int] = (5, 10)) -> dict[str, float]:
    """The usual set by name: ``hit@k``, ``mrr``, ``ndcg@k``, and ``recall@k`` when some query has several relevant."""
    values = {f"hit@{k}": hit_at_k(ranking, k) for k in hits}
    values["mrr"] = mean_reciprocal_rank(ranking)
    values |= {f"ndcg@{k}": ndcg_at_k(ranking, k) for k in ndcg}
    if ranking.ranks.shape[1] > 1:
        values |= {f"recall@{k}": recall_at_k(ranking, k) for k in hits}
    return values


def _positive(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k
