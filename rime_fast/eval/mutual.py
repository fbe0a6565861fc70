"""Mutual retrieval: the table of query mode x target mode, with what each mode costs: 2 x 2, or 3 x 3 with latents.

A discriminative embedding costs one prefill, a generative one the decoding of its rewrite as well. Cross-Mode
Alignment puts both into one space, so that either side may use either: cell "gen-disc" is generative queries against
an index of discriminative targets. The table shows accuracy and cost of all of them in one look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rime_fast.eval import metrics
from rime_fast.eval.budget import BudgetCurve, budget_curve
from rime_fast.eval.index import truncated
from rime_fast.eval.ranking import Ranking, Rows, rank_candidates
from rime_fast.eval.sensitivity import Sensitivity, rewrite_sensitivity
from rime_fast.recipe.int8 import to_int8

if TYPE_CHECKING:
    from rime_fast.data.retrieval import RetrievalSet
    from rime_fast.eval.embedder import Encoded, RimeEmbedder

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class Cell:
    """One cell of the table: ``metrics`` (hit@1, hit@5, hit@10, mrr, ndcg@5, ndcg@10; see metrics.py) and the ranking
    behind it."""

    metrics: dict[str, float]
    ranking: Ranking


def mutual_table(
    queries: Mapping[str, torch.Tensor],
    candidates: Mapping[str, torch.Tensor],
    relevant: Rows,
    *,
    gains: Sequence[Sequence[float]] | None = None,
    lists: Sequence[Sequence[int]] | None = None,
    top_k: int = 0,
) -> dict[str, Cell]:
    """Score every pairing of the given modes, by name "<query mode>-<target mode>".

    queries: mode -> [N, D], candidates: mode -> [M, D], unit norm; the rest as for ``rank_candidates``.
    """
    table = {}
    for q, query in queries.items():
        for c, candidate in candidates.items():
            ranking = rank_candidates(query, candidate, relevant, gains=gains, lists=lists, top_k=top_k)
            table[f"{q}-{c}"] = Cell(metrics.summary(ranking), ranking)
    return table


@dataclass(frozen=True)
class MutualResult:
    """What ``evaluate_mutual`` measured.

    cells: as ``mutual_table``. cost: mode -> {"query_seconds", "target_seconds", "query_tokens", "target_tokens"},
    means per item, measured in this run; tokens are all decoded ones, tags and <gen_emb> included (0 for disc).
    missing_gen: side -> generations that never reached <gen_emb>, so that their last state stood in.
    format_errors: side -> rewrites that do not parse. examples: queries with their first candidates, for the report.
    dims: width -> cell -> metrics, of rows cut to so many numbers and normalised again, or "int8". budget,
    sensitivity: against the disc index, where disc and gen ran.
    """

    cells: dict[str, Cell]
    cost: dict[str, dict[str, float]]
    missing_gen: dict[str, int]
    format_errors: dict[str, int]
    n_queries: int
    n_candidates: int
    mean_pool: float
    examples: list[dict[str, Any]] = field(default_factory=list)
    dims: dict[int | str, dict[str, dict[str, float]]] = field(default_factory=dict)
    budget: BudgetCurve | None = None
    sensitivity: Sensitivity | None = None

    def hit_at_1(self) -> dict[str, float]:
        """The table's hit@1 by pairing: {"disc-disc": ..., ...}."""
        return {name: cell.metrics["hit@1"] for name, cell in self.cells.items()}

    def to_dict(self) -> dict[str, Any]:
        """The result as plain numbers and strings: the ``mutual`` entry of a report (see report.py)."""
        cells = {}
        for name, cell in self.cells.items():
            query, target = name.split("-")
            cost = {f"query_{what}": self.cost[query][f"query_{what}"] for what in ("tokens", "seconds")}
            cost |= {f"target_{what}": self.cost[target][f"target_{what}"] for what in ("tokens", "seconds")}
            cells[name] = cell.metrics | cost
        return {
            "cells": cells,
            "cost": self.cost,
            "missing_gen": self.missing_gen,
            "format_errors": self.format_errors,
            "n_queries": self.n_queries,
            "n_candidates": self.n_candidates,
            "mean_pool": self.mean_pool,
            "examples": self.examples,
            "dims": self.dims,
            "budget": self.budget and self.budget.to_dict(),
            "sensitivity": self.sensitivity and self.sensitivity.to_dict(),
        }


def evaluate_mutual(
    embedder: RimeEmbedder,
    data: RetrievalSet,
    *,
    modes: Sequence[str] | None = None,
    top_k: int = 5,
    n_examples: int = 24,
    dims: Sequence[int] = (),
    int8_step: float | None = None,
    progress: Progress | None = None,
) -> MutualResult:
    """Embed both sides of ``data`` in each mode, rank, and time it. Equal candidates (by id or content) count as one.

    modes: some of the model's; None: all of them. n_examples: queries kept for the report, evenly spaced over the
    set (not chosen by outcome). dims: further widths that the embeddings are scored at.
    int8_step: score them rounded to int8 by this step too, as "int8" of the result's ``dims``.
    progress: called as ``progress("gen query", done, total)``. With disc and gen among the modes the budget curve and
    the rewrites' sensitivity are measured too: a prefill of each query for each kind of rewrite.
    """
    modes = embedder.modes if modes is None else modes
    unknown = [mode for mode in modes if mode not in embedder.modes]
    if unknown or not modes:
        raise ValueError(f"modes is {tuple(modes)}; expected a choice of {embedder.modes}, what this model gives")
    if dims:
        embedder.check_widths(dims)
    data = data.merged()
    sides = {"query": data.queries, "target": data.candidates}
    encoded: dict[tuple[str, str], Encoded] = {}
    for mode in modes:
        for side, items in sides.items():
            report = None if progress is None else partial(progress, f"{mode} {side}")
            encoded[mode, side] = embedder.encode_items(items, mode, progress=report)

    def table(width: int | None, count: int, step: float | None = None) -> dict[str, Cell]:
        def cut(rows: torch.Tensor) -> torch.Tensor:
            return truncated(rows if step is None else to_int8(rows, step), width)

        query, target = ({mode: cut(encoded[mode, side].embeddings) for mode in modes} for side in ("query", "target"))
        return mutual_table(query, target, data.correct, gains=data.gains, lists=data.pools, top_k=count)

    cells = table(None, top_k)
    cost = {}
    for mode in modes:
        cost[mode] = {f"{side}_tokens": encoded[mode, side].mean_tokens for side in sides}
        cost[mode] |= {f"{side}_seconds": encoded[mode, side].seconds / len(sides[side]) for side in sides}
    gen = {side: encoded["gen", side] for side in sides if "gen" in modes}
    budget, sensitivity = None, None
    if {"disc", "gen"} <= set(modes):
        queries = replace(encoded["gen", "query"], disc=encoded["disc", "query"].embeddings)
        given: dict[str, Any] = {"queries": queries, "targets": encoded["disc", "target"].embeddings}
        budget = budget_curve(embedder, data, **given)
        sensitivity = rewrite_sensitivity(embedder, data, **given)
    others: dict[int | str, dict[str, Cell]] = {width: table(width, 0) for width in dims}
    if int8_step is not None:
        others["int8"] = table(None, 0, int8_step)
    pool = next(iter(cells.values())).ranking.pool
    return MutualResult(
        cells=cells,
        cost=cost,
        missing_gen={side: one.missing_gen for side, one in gen.items()},
        format_errors={side: one.format_errors for side, one in gen.items()},
        n_queries=len(data.queries),
        n_candidates=len(data.candidates),
        mean_pool=pool.double().mean().item(),
        examples=_examples(data, cells, gen, n_examples),
        dims={width: {name: cell.metrics for name, cell in found.items()} for width, found in others.items()},
        budget=budget,
        sensitivity=sensitivity,
    )


def _examples(data: RetrievalSet, cells: Mapping[str, Cell], gen: Mapping[str, Encoded], count: int) -> list[dict]:
    """``count`` evenly spaced queries: what was asked, rewritten and retrieved (in the last, the richest, cell)."""
    shown = list(cells)[-1]
    ranking = cells[shown].ranking
    total = len(data.queries)
    picked = sorted({i * total // max(1, min(count, total)) for i in range(min(count, total))})
    examples = []
    for i in picked:
        right = set(data.correct[i])
        retrieved = [
            _side(data.candidates[c], gen.get("target"), c) | {"score": s, "correct": c in right}
            for c, s in zip(ranking.top[i].tolist(), ranking.top_scores[i].tolist(), strict=True)
            if c >= 0
        ]
        examples.append(
            {
                "query": _side(data.queries[i], gen.get("query"), i),
                "answers": [_side(data.candidates[c], None, c) for c in data.correct[i][:3]],
                "cell": shown,
                "ranks": {name: int(cell.ranking.best[i]) for name, cell in cells.items()},
                "retrieved": retrieved,
            }
        )
    return examples


def _side(side: Any, generated: Encoded | None, row: int) -> dict[str, Any]:
    from rime_fast.eval.thumbnails import thumbnails

    return {
        "row": row,
        "id": side.id,
        "text": side.text,
        "images": thumbnails(side),
        "rewrite": None if generated is None or generated.rewrites is None else generated.rewrites[row],
    }
