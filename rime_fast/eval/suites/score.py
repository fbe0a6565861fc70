"""From embeddings to a task's numbers: the official metrics, ties, categories, and what each query got."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rime_fast.eval.index import margins
from rime_fast.eval.metrics import per_query
from rime_fast.eval.ranking import Ranking, rank_candidates
from rime_fast.eval.suites.tasks import TaskData, mean

KINDS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
METRICS = tuple(f"{kind}@{k}" for kind in KINDS for k in (1, 5, 10))
PAIRED = "ndcg_linear@5_official_pairing"
TOP = 100  # names kept of each query's ranking


@dataclass
class CellScore:
    """The score of one pairing of modes on one task. main: [N], the main metric of each query. tied: share of queries
    whose first place several candidates have. predictions: the first names of each query. margins: [N], the first
    place's score less the second's (infinite where there is no second)."""

    metrics: dict[str, float]
    main: torch.Tensor
    tied: float
    categories: dict[str, float] = field(default_factory=dict)
    predictions: list[list[str]] = field(default_factory=list)
    margins: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


def score_cell(
    data: TaskData, metric: str, queries: torch.Tensor, candidates: torch.Tensor, ties: str = "pessimistic"
) -> CellScore:
    """Rank the candidates of every query and measure. queries [N, D], candidates [M, D], unit norm.

    A query without a right candidate gets 0, and recall 1, as in MMEB's code; so does the mean over queries.
    """
    known = [i for i, own in enumerate(data.correct) if own and (data.pools is None or data.pools[i])]
    nothing_right = torch.tensor([not own for own in data.correct], dtype=torch.float64)
    names = dict.fromkeys((*METRICS, metric))
    values = {name: nothing_right.clone() if name.startswith("recall") else 0 * nothing_right for name in names}
    tied, predictions = 0.0, [list[str]() for _ in data.queries]
    apart = torch.full((len(data.queries),), torch.inf, dtype=torch.float64)
    if known:
        ranking = _ranked(data, known, queries, candidates, ties)
        for name, value in values.items():
            value[known] = per_query(ranking, name)
        apart[known] = margins(ranking.top_scores).double()
        tied = (apart[known] == 0).double().mean().item()
        predictions = _predictions(data, known, ranking, ties)
    metrics = {name: value.mean().item() for name, value in values.items()}
    if known and (paired := _official_pairing(data)) is not None:
        ranking = _ranked(replace(data, gains=paired), known, queries, candidates, ties)
        metrics[PAIRED] = per_query(ranking, "ndcg_linear@5").sum().item() / len(data.queries)
    main = values[metric]
    return CellScore(metrics, main, tied, _by_category(data, main), predictions, apart)


def _ranked(data: TaskData, known: list[int], queries: Any, candidates: Any, ties: str) -> Ranking:
    return rank_candidates(
        queries[known],
        candidates,
        [data.correct[i] for i in known],
        gains=None if data.gains is None else [data.gains[i] for i in known],
        lists=None if data.pools is None else [data.pools[i] for i in known],
        top_k=TOP,
        ties=ties,
        absent="never",
    )


def _predictions(data: TaskData, known: list[int], ranking: Ranking, ties: str) -> list[list[str]]:
    """Names by falling similarity; equal ones in the order that the ranks were counted in."""
    found: list[list[str]] = [[] for _ in data.queries]
    for place, i in enumerate(known):
        pool = None if data.pools is None else {row: k for k, row in enumerate(data.pools[i])}
        right = set(data.correct[i])
        rows = [
            (-score, row in right and ties == "pessimistic", row if pool is None else pool[row], row)
            for row, score in zip(ranking.top[place].tolist(), ranking.top_scores[place].tolist(), strict=True)
            if row >= 0 and (pool is None or row in pool)
        ]
        found[i] = [data.names[row] for *_, row in sorted(rows)]
    return found


def _by_category(data: TaskData, main: torch.Tensor) -> dict[str, float]:
    if data.categories is None:
        return {}
    names = dict.fromkeys(data.categories)
    return {name: mean(v for v, c in zip(main.tolist(), data.categories, strict=True) if c == name) for name in names}


def _official_pairing(data: TaskData) -> list[list[float]] | None:
    """Gains as MMEB's code pairs them: it takes the labels through a set and the relevance as it was. Only whole
    numbers have one order there (that of strings changes from run to run), and only graded relevance is touched."""
    if data.gains is None or not all(data.names[row].isdigit() for own in data.correct for row in own):
        return None
    paired = []
    for rows, gains in zip(data.correct, data.gains, strict=True):
        row_of = {int(data.names[row]): row for row in rows}
        given = dict(zip((row_of[label] for label in set(row_of)), gains, strict=True))
        paired.append([given[row] for row in rows])
    return paired
