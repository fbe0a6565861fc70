"""The budget curve: what accuracy each share of decoded queries buys, against one index of disc embeddings.

[ours] Every query is answered by its disc embedding first. The queries whose first two places lie closest together go
to mode gen; the curve sets accuracy and decoded tokens against their share. Where it bends is the operating point of
mode "auto" (``RimeEmbedder.encode``, ``rime-fast serve``), and the curve gives the threshold for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rime_fast.eval.index import margins as margins_of
from rime_fast.eval.metrics import per_query
from rime_fast.eval.ranking import rank_candidates

if TYPE_CHECKING:
    from rime_fast.eval.embedder import Encoded, RimeEmbedder

STEPS = 20  # points of a curve after the first
WIDEST = 2.0  # no two cosines lie further apart
EQUAL = 2e-6  # closer margins are one: another batch rounds them otherwise, and a threshold must stand between


@dataclass(frozen=True)
class BudgetCurve:
    """Points by growing share of decoded queries; the first is disc alone, the last (nearly) gen alone.

    shares: of the queries. scores: mean of ``metric``. tokens: decoded tokens a query, over all queries. thresholds:
    what mode "auto" needs to decode these very queries (empty for a mean of curves). knee: the point furthest above
    the straight line between the ends, which is what queries taken at random give ([known]: Satopaa et al. 2011); None
    where no point lies above it and above disc alone.
    """

    metric: str
    n_queries: int
    shares: list[float]
    scores: list[float]
    tokens: list[float]
    thresholds: list[float]
    knee: int | None

    def to_dict(self) -> dict[str, Any]:
        """Give plain numbers, for a report."""
        return asdict(self)

    def line(self) -> str:
        """Say the curve in one line: its ends, and the point to work at."""
        ends = f"{self.metric} {self.scores[0]:.3f} by disc, {self.scores[-1]:.3f} with all decoded"
        if self.knee is None:
            return f"budget: {ends}; no share of the queries with small margins beats taking them at random"
        k = self.knee
        limit = f", --threshold {self.thresholds[k]:.4g}" if self.thresholds else ""
        return (
            f"budget: {ends}; {self.scores[k]:.3f} with {self.shares[k]:.0%} decoded ({self.tokens[k]:.1f} tokens a "
            f"query{limit})"
        )


def budget_curve(
    embedder: RimeEmbedder,
    data: Any,
    *,
    queries: Encoded | None = None,
    targets: torch.Tensor | None = None,
    metric: str = "hit@1",
) -> BudgetCurve:
    """Measure the curve of a model on a RetrievalSet, or on a suite's task (``task.load()``).

    queries: ``embedder.encode_items(data.queries, "both")``, targets: [M, D] disc embeddings of ``data.candidates``;
    made here where they are not given. metric: a name of ``metrics.per_query``. Raises ValueError for queries that were
    not encoded in mode "both".
    """
    queries = embedder.encode_items(data.queries, "both") if queries is None else queries
    targets = embedder.encode(data.candidates) if targets is None else targets
    if queries.disc is None:
        raise ValueError("queries has no disc embeddings; encode them in mode 'both'")
    disc, margins = outcomes(data, queries.disc, targets, metric)
    gen, _ = outcomes(data, queries.embeddings, targets, metric)
    return budget_points(disc, gen, margins, queries.tokens, metric)


def budget_points(
    disc: torch.Tensor, gen: torch.Tensor, margins: torch.Tensor, tokens: Sequence[int], metric: str = "hit@1"
) -> BudgetCurve:
    """Make the curve from its parts, each [N]: a query's score by either mode, its margin by disc, its decoded tokens.

    A margin may be infinite: such a query is never decoded. Queries of one margin (to rounding) are decoded together.
    """
    n = len(margins)
    if not n or not len(disc) == len(gen) == len(tokens) == n:
        raise ValueError(f"disc, gen, margins, tokens have {len(disc)}, {len(gen)}, {n}, {len(tokens)} entries")
    ordered, order = margins.double().sort(stable=True)
    last = int(torch.isfinite(ordered).sum())
    counts = {0: None}
    for step in range(1, STEPS + 1):
        count = min(round(step * n / STEPS), last)
        while 0 < count < last and ordered[count] - ordered[count - 1] <= EQUAL:
            count += 1
        counts[count] = None
    gained = torch.cat([torch.zeros(1, dtype=torch.float64), (gen - disc).double()[order].cumsum(0)])
    spent = [0, *torch.as_tensor(tokens)[order].cumsum(0).tolist()]
    found = list(counts)
    base = disc.double().sum()
    scores = [((base + gained[k]) / n).item() for k in found]
    shares = [k / n for k in found]
    between = [WIDEST if k >= last else (ordered[k - 1] + ordered[k]).item() / 2 for k in found]
    thresholds = [limit if k else 0.0 for k, limit in zip(found, between, strict=True)]
    return BudgetCurve(metric, n, shares, scores, [spent[k] / n for k in found], thresholds, _knee(shares, scores))


def mean_curve(curves: Sequence[BudgetCurve]) -> BudgetCurve:
    """Average curves over tasks, each of which decodes the same share of its queries; between points on a line."""
    shares = [step / STEPS for step in range(STEPS + 1)]
    scores = np.mean([np.interp(shares, one.shares, one.scores) for one in curves], axis=0).tolist()
    tokens = np.mean([np.interp(shares, one.shares, one.tokens) for one in curves], axis=0).tolist()
    names = " or ".join(dict.fromkeys(one.metric for one in curves))
    n_queries = sum(one.n_queries for one in curves)
    return BudgetCurve(names, n_queries, shares, scores, tokens, [], _knee(shares, scores))


def outcomes(
    data: Any, queries: torch.Tensor, targets: torch.Tensor, metric: str = "hit@1"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (the metric of each query [N] fp64, its margin [N] fp64) of a RetrievalSet or a TaskData.

    A query without a right candidate, or without candidates, scores 0 and has an infinite margin.
    """
    known = [i for i, own in enumerate(data.correct) if own and (data.pools is None or data.pools[i])]
    scores = torch.zeros(len(data.queries), dtype=torch.float64)
    margins = torch.full((len(data.queries),), torch.inf, dtype=torch.float64)
    if known:
        ranking = rank_candidates(
            queries[known],
            targets,
            [data.correct[i] for i in known],
            gains=None if data.gains is None else [data.gains[i] for i in known],
            lists=None if data.pools is None else [data.pools[i] for i in known],
            top_k=2,
            absent="never",
        )
        scores[known], margins[known] = per_query(ranking, metric), margins_of(ranking.top_scores).double()
    return scores, margins


def _knee(shares: list[float], scores: list[float]) -> int | None:
    run = shares[-1] - shares[0]
    if not run:
        return None
    slope = (scores[-1] - scores[0]) / run
    above = [score - scores[0] - slope * share for share, score in zip(shares, scores, strict=True)]
    best = max(range(len(shares)), key=lambda k: (above[k], -k))
    return best if above[best] > 1e-12 and scores[best] > scores[0] else None
