"""What an evaluation of a suite measured: tables, the files of MMEB's tools, a leaderboard entry."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rime_fast.data.sources import dump_row
from rime_fast.eval.budget import BudgetCurve
from rime_fast.eval.suites.cache import write_text
from rime_fast.eval.suites.score import CellScore
from rime_fast.eval.suites.tasks import Suite, TaskScore, mean

ABSENT = "FILE_N/A"  # as in the leaderboard's own files


@dataclass
class TaskResult:
    """What was measured on one task. cells: pairing ("disc-gen": query and target mode) -> scores. oracle: mean over
    queries of the better one of disc-disc and gen-gen. dims: width -> pairing -> main score. cost: mode -> seconds and
    decoded tokens per query and target, counts. cosine: mode -> mean cosine of two different queries, targets. labels:
    per query its right names and their relevance."""

    name: str
    modality: str
    group: str
    metric: str
    cells: dict[str, CellScore]
    oracle: float | None
    dims: dict[int, dict[str, float]]
    cost: dict[str, dict[str, float]]
    cosine: dict[str, dict[str, float]]
    notes: dict[str, Any]
    n_queries: int
    n_candidates: int
    labels: list[tuple[list[str], list[float] | None]] = field(default_factory=list, repr=False)
    width: int = 0
    budget: BudgetCurve | None = None

    def score(self, cell: str) -> float:
        """The main score of a pairing."""
        return self.cells[cell].metrics[self.metric]

    def metrics(self, cell: str) -> dict[str, float]:
        """The metrics as MMEB's score files have them."""
        return self.cells[cell].metrics | {"num_pred": self.n_queries, "num_data": self.n_queries}


@dataclass
class SuiteResult:
    """What ``evaluate_suite`` measured; ``tasks`` is empty while other processes still make chunks.

    overall: pairing -> group ("image.CLS", "image", "all", ...) -> mean; "oracle" beside the pairings where both modes
    ran. partial: fewer queries or tasks than the suite has. known: task -> (modality, exported name) of all its tasks.
    """

    suite: str
    protocol: dict[str, Any]
    model: str
    modes: list[str]
    ties: str
    partial: bool
    limit: int | None
    version: str
    device: str
    fingerprint: dict[str, Any] = field(default_factory=dict, repr=False)
    known: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    overall: dict[str, dict[str, float]] = field(default_factory=dict)
    overall_dims: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def cells(self) -> list[str]:
        """Names of the pairings."""
        return [f"{q}-{t}" for q in self.modes for t in self.modes]

    def aggregate(self, suite: Suite) -> None:
        """Fill ``overall`` from the tasks."""
        for cell in self.cells:
            scores = {n: TaskScore(t.score(cell), t.cells[cell].categories) for n, t in self.tasks.items()}
            self.overall[cell] = suite.aggregate(scores)
            for dim in sorted({dim for task in self.tasks.values() for dim in task.dims}):
                scores = {n: TaskScore(t.dims.get(dim, {cell: t.score(cell)})[cell]) for n, t in self.tasks.items()}
                self.overall_dims.setdefault(dim, {})[cell] = suite.aggregate(scores)
        oracle = {n: TaskScore(t.oracle) for n, t in self.tasks.items() if t.oracle is not None}
        if oracle:
            self.overall["oracle"] = suite.aggregate(oracle)

    def leaderboard(self, cell: str = "disc-disc", **metadata: Any) -> dict[str, Any]:
        """An entry of the MMEB leaderboard: official task names, ``FILE_N/A`` where a task was not run.

        metadata: model_name, model_backbone, model_size, url, ... Raises ValueError for a limited run, whose scores
        cannot stand beside others, and for a pairing that was not run.
        """
        if self.limit is not None:
            raise ValueError(f"the run was limited to {self.limit} queries a task; a leaderboard needs all of them")
        if cell not in self.cells or not self.tasks:
            raise ValueError(f"cell is {cell!r}; expected one of {', '.join(self.cells)} of a finished run")
        known = dict.fromkeys(("model_name", "model_backbone", "model_release_date", "url"), "")
        facts = {**known, "model_size": 0, "max_length_tokens": 0, "data_source": "Self-Reported"}
        if unknown := metadata.keys() - facts.keys():
            raise ValueError(f"metadata has {sorted(unknown)}; expected some of {', '.join(facts)}")
        facts |= {"model_name": self.model, "embedding_dimension": next(iter(self.tasks.values())).width, **metadata}
        facts |= {"report_generated_date": datetime.now(timezone.utc).isoformat(), "protocol": self.protocol["name"]}
        metrics: dict[str, dict[str, Any]] = {}
        for name, (modality, exported) in self.known.items():
            found = self.tasks[name].metrics(cell) if name in self.tasks else ABSENT
            metrics.setdefault(modality, {})[exported] = found
        return {"metadata": facts, "metrics": metrics}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: what summary.json holds."""
        tasks = {}
        for name, task in self.tasks.items():
            plain = {key: getattr(task, key) for key in _PLAIN}
            plain["budget"] = task.budget and task.budget.to_dict()
            plain["cells"] = {
                cell: {"metrics": s.metrics, "tied_first_places": s.tied, "categories": s.categories}
                for cell, s in task.cells.items()
            }
            tasks[name] = plain
        keys = ("suite", "protocol", "model", "modes", "ties", "partial", "limit", "version", "device", "fingerprint")
        plain = {key: getattr(self, key) for key in keys}
        return plain | {"overall": self.overall, "overall_dims": self.overall_dims, "cost": self.cost(), "tasks": tasks}

    def cost(self) -> dict[str, dict[str, float]]:
        """What each mode cost: mode -> means per item over all tasks' items, and counts over all."""
        found: dict[str, dict[str, float]] = {}
        for mode in self.modes:
            tasks = list(self.tasks.values())
            sums = {key: sum(t.cost[mode][key] for t in tasks) for key in ("missing_gen", "format_errors")}
            for side, size in (("query", "n_queries"), ("target", "n_candidates")):
                total = sum(getattr(t, size) for t in tasks) or 1
                for what in ("tokens", "seconds"):
                    key = f"{side}_{what}"
                    sums[key] = sum(t.cost[mode][key] * getattr(t, size) for t in tasks) / total
            found[mode] = sums
        return found

    def tied(self, cell: str) -> float:
        """Share of queries with a tied first place, over tasks."""
        return mean(task.cells[cell].tied for task in self.tasks.values())

    def table(self) -> str:
        """Groups and overall scores of each pairing, then what each mode cost, as text."""
        if not self.tasks:
            return "chunks are still being made by other processes; the last one to end scores"
        columns = list(self.overall)
        groups = list(dict.fromkeys(group for column in columns for group in self.overall[column]))
        lines = [f"{self.suite}, protocol {self.protocol['name']}, ties {self.ties}" + self._partial()]
        lines.append(f"{'':<26}" + "".join(f"{name:>11}" for name in columns))
        for group in groups:
            values = (self.overall[name].get(group) for name in columns)
            lines.append(f"{group:<26}" + "".join(f"{'' if v is None else f'{100 * v:.2f}':>11}" for v in values))
        if not groups:
            for name, task in self.tasks.items():
                lines.append(f"{name:<26}" + "".join(f"{100 * task.score(c):>11.2f}" for c in self.cells))
        lines.append(f"{'tied first places, %':<26}" + "".join(f"{100 * self.tied(c):>11.1f}" for c in self.cells))
        for mode, cost in self.cost().items():
            lines.append(
                f"{mode}: {cost['query_tokens']:.1f} tokens and {cost['query_seconds']:.4f} s a query, "
                f"{cost['target_tokens']:.1f} tokens and {cost['target_seconds']:.4f} s a target"
                + (f", {cost['missing_gen']:.0f} without <gen_emb>" if mode == "gen" else "")
            )
        return "\n".join(lines)

    def _partial(self) -> str:
        return f", PARTIAL ({self.limit} queries a task)" if self.limit else ", some tasks" if self.partial else ""


_PLAIN = (
    "modality",
    "group",
    "metric",
    "oracle",
    "dims",
    "cost",
    "cosine",
    "notes",
    "n_queries",
    "n_candidates",
    "width",
)


def write_scores(result: SuiteResult, home: Path) -> None:
    """Write summary.json, and each task's files as UME-R1's evaluation names and fills them, by modality."""
    for task in result.tasks.values():
        folder = home / task.modality
        folder.mkdir(parents=True, exist_ok=True)
        for cell, score in task.cells.items():
            stem = f"{task.name}_{cell.replace('-', '_')}"
            write_text(folder / f"{stem}_score.json", json.dumps(task.metrics(cell), indent=4))
            lines = [
                dump_row({"prediction": names, "label": label, "rel_scores": gains})
                for names, (label, gains) in zip(score.predictions, task.labels, strict=True)
            ]
            write_text(folder / f"{stem}_pred.jsonl", "\n".join(lines) + "\n")
    write_text(home / "summary.json", json.dumps(result.to_dict(), indent=1))
