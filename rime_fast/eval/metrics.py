"""Retrieval metrics from the ranks of the relevant candidates (``ranking.rank_candidates``), averaged over queries.

All but ``mean_cosine`` take a ``Ranking`` and return a Python float in [0, 1]. Definitions:

    hit@k        1 if the best-placed relevant candidate has rank <= k
    MRR          1 / rank of the best-placed relevant candidate
    recall@k     relevant candidates with rank <= k, over min(number relevant, k) when ``capped``, else over all of them
    precision@k  relevant candidates with rank <= k, over k
    f1@k         harmonic mean of precision@k and recall@k
    map@k        precision at the ranks <= k of relevant candidates, summed, over min(number relevant, k): MMEB's form;
                 trec_eval's map_cut divides by the number relevant
    nDCG@k       sum over relevant with rank <= k of gain / log2(1 + rank), over the same sum for the best order

The gain in nDCG is linear, as in trec_eval and hence MTEB and MMEB-V2 (``exponential=True``: 2^gain - 1, Jarvelin and
Kekalainen's later form). Ties: see ranking.py (a tie with a wrong candidate counts as a miss).
``per_query`` gives the values before they are averaged, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from rime_fast.eval.ranking import NEVER, Ranking, rank_candidates

__all__ = [
    "Ranking",
    "f1_at_k",
    "hit_at_k",
    "mean_average_precision",
    "mean_cosine",
    "mean_reciprocal_rank",
    "ndcg_at_k",
    "per_query",
    "precision_at_k",
    "rank_candidates",
    "recall_at_k",
    "summary",
]


def hit_at_k(ranking: Ranking, k: int = 1) -> float:
    """Fraction of queries with a relevant candidate among the first ``k``."""
    return _hit(ranking, k).mean().item()


def mean_reciprocal_rank(ranking: Ranking, k: int | None = None) -> float:
    """Mean of 1/rank of the best-placed relevant candidate; with ``k``, ranks beyond it count 0 (MRR@k)."""
    return _reciprocal(ranking, k).mean().item()


def recall_at_k(ranking: Ranking, k: int, *, capped: bool = False) -> float:
    """Mean fraction of the relevant candidates among the first ``k`` (``capped``: of the k possible at most)."""
    return _recall(ranking, k, capped).mean().item()


def precision_at_k(ranking: Ranking, k: int) -> float:
    """Mean fraction of the first ``k`` places that hold a relevant candidate; a shorter list has empty places."""
    return _precision(ranking, k).mean().item()


def f1_at_k(ranking: Ranking, k: int) -> float:
    """Mean over queries of the harmonic mean of precision and recall among the first ``k``."""
    return _f1(ranking, k).mean().item()


def mean_average_precision(ranking: Ranking, k: int) -> float:
    """Mean average precision of the first ``k``, over min(number relevant, k) as MMEB's code has it."""
    return _average_precision(ranking, k).mean().item()


def ndcg_at_k(ranking: Ranking, k: int = 10, *, exponential: bool = False) -> float:
    """Mean normalised discounted cumulative gain of the first ``k``."""
    return _ndcg(ranking, k, exponential).mean().item()


def summary(ranking: Ranking, hits: Sequence[int] = (1, 5, 10), ndcg: Sequence[int] = (5, 10)) -> dict[str, float]:
    """The usual set of metrics by name: ``hit@k``, ``mrr``, ``ndcg@k``, and ``recall@k`` when some query has several
    relevant."""
    values = {f"hit@{k}": hit_at_k(ranking, k) for k in hits}
    values["mrr"] = mean_reciprocal_rank(ranking)
    values |= {f"ndcg@{k}": ndcg_at_k(ranking, k) for k in ndcg}
    if ranking.ranks.shape[1] > 1:
        values |= {f"recall@{k}": recall_at_k(ranking, k) for k in hits}
    return values


def per_query(ranking: Ranking, name: str) -> torch.Tensor:
    """The metric ``name`` of each query by itself, [N] float64.

    Names: "mrr", or one of hit, recall, precision, f1, map, mrr, ndcg, ndcg_linear (the same), ndcg_exponential with
    "@k". Raises ValueError for another.
    """
    kind, _, k = name.partition("@")
    if name == "mrr":
        return _reciprocal(ranking, None)
    if kind not in _BY_NAME or not k.isdigit():
        raise ValueError(f"metric is {name!r}; expected mrr, or one of {', '.join(_BY_NAME)} with @k")
    return _BY_NAME[kind](ranking, int(k))


def mean_cosine(embedding: torch.Tensor) -> float:
    """Average the cosine of two different rows, at unit norm: near 1, an encoder gives everything one place."""
    n = embedding.shape[0]
    if n < 2:
        return 0.0
    rows = embedding.double()
    return ((rows.sum(dim=0).square().sum() - rows.square().sum()) / (n * (n - 1))).item()


def _hit(ranking: Ranking, k: int) -> torch.Tensor:
    return (ranking.best <= _positive(k)).double()


def _reciprocal(ranking: Ranking, k: int | None) -> torch.Tensor:
    reciprocal = torch.where(ranking.best < NEVER, 1.0 / ranking.best.double(), 0.0)
    return reciprocal if k is None else torch.where(ranking.best <= _positive(k), reciprocal, 0.0)


def _found(ranking: Ranking, k: int) -> torch.Tensor:
    """[N, K]: which relevant candidates are among the first ``k``."""
    return (ranking.ranks > 0) & (ranking.ranks <= _positive(k))


def _recall(ranking: Ranking, k: int, capped: bool = False) -> torch.Tensor:
    possible = (ranking.ranks > 0).sum(dim=1).double()
    return _found(ranking, k).sum(dim=1).double() / (possible.clamp(max=k) if capped else possible)


def _precision(ranking: Ranking, k: int) -> torch.Tensor:
    return _found(ranking, k).sum(dim=1).double() / k


def _f1(ranking: Ranking, k: int) -> torch.Tensor:
    precision, recall = _precision(ranking, k), _recall(ranking, k)
    return torch.where(precision > 0, 2 * precision * recall / (precision + recall), 0.0)


def _average_precision(ranking: Ranking, k: int) -> torch.Tensor:
    ranks = torch.where(_found(ranking, k), ranking.ranks, NEVER).sort(dim=1).values
    hits = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64)
    possible = (ranking.ranks > 0).sum(dim=1).double().clamp(max=k)
    return torch.where(ranks < NEVER, hits / ranks.double(), 0.0).sum(dim=1) / possible


def _ndcg(ranking: Ranking, k: int, exponential: bool = False) -> torch.Tensor:
    gains = torch.exp2(ranking.gains) - 1 if exponential else ranking.gains
    discounted = gains / torch.log2(1.0 + ranking.ranks.clamp(min=1).double())
    dcg = torch.where(_found(ranking, k), discounted, 0.0).sum(dim=1)
    ideal = gains.sort(dim=1, descending=True).values[:, :k]
    ideal_dcg = (ideal / torch.log2(2.0 + torch.arange(ideal.shape[1], dtype=torch.float64))).sum(dim=1)
    return dcg / ideal_dcg


_BY_NAME: dict[str, Callable[[Ranking, int], torch.Tensor]] = {
    "hit": _hit,
    "recall": _recall,
    "precision": _precision,
    "f1": _f1,
    "map": _average_precision,
    "mrr": _reciprocal,
    "ndcg": _ndcg,
    "ndcg_linear": _ndcg,
    "ndcg_exponential": partial(_ndcg, exponential=True),
}


def _positive(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k
