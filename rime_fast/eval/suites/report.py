"""The report of a suite: what write_report takes, made of a SuiteResult."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rime_fast.eval import plots
from rime_fast.eval.budget import mean_curve
from rime_fast.eval.suites.result import SuiteResult, TaskResult

COLLAPSED = 0.95  # mean cosine from which on an encoder is called collapsed
HEADLINES = ("all", "AVG-D")  # the overall score's name, by suite


def suite_report(result: SuiteResult, title: str | None = None) -> dict[str, Any]:
    """A report of overall scores, tasks, costs and data notes; see ``rime_fast.eval.report``."""
    tasks = list(result.tasks.values())
    return {
        "title": title or f"{result.suite}: {result.model or 'a model'}",
        "lead": f"Protocol {result.protocol['name']}. A cell is query mode, then target mode; scores are in percent.",
        "facts": {
            "model": result.model,
            "suite": result.suite,
            "protocol": result.protocol["name"],
            "ties": result.ties,
            "tasks": len(tasks),
            "queries": sum(task.n_queries for task in tasks),
            "candidates": sum(task.n_candidates for task in tasks),
            "device": result.device,
        },
        "warnings": list(_warnings(result)),
        "figures": list(_figures(result)),
        "tables": [
            table for table in (_groups(result), _tasks(result), _cost(result), _dims(result), _notes(result)) if table
        ],
        "extra": {"summary": result.to_dict()},
    }


def headline(result: SuiteResult, cell: str) -> float | None:
    """The overall score of a pairing, where all tasks ran."""
    return next((result.overall[cell][name] for name in HEADLINES if name in result.overall.get(cell, {})), None)


def _warnings(result: SuiteResult) -> Iterator[str]:
    if result.limit is not None:
        yield f"Partial: the first {result.limit} queries of each task. These scores stand beside no others."
    elif result.partial:
        yield f"{len(result.tasks)} of {len(result.known)} tasks: there is no overall score."
    for mode, cost in result.cost().items():
        if cost["missing_gen"]:
            yield f"{cost['missing_gen']:,.0f} generations never reached <gen_emb>; their last state stood in ({mode})."
    for task in result.tasks.values():
        for mode, sides in task.cosine.items():
            for side, value in sides.items():
                if value > COLLAPSED and _several(task, side):
                    yield f"{task.name}: {mode} embeddings of {side} items are nearly one (mean cosine {value:.3f})."
        if "page_set" in task.notes:
            yield f"{task.name}: {task.notes['page_set']}."


def _several(task: TaskResult, side: str) -> bool:
    return (task.n_queries if side == "query" else task.n_candidates) > 4


def _figures(result: SuiteResult) -> Iterator[dict[str, Any]]:
    cells = {cell: value for cell in result.cells if (value := headline(result, cell)) is not None}
    if len(cells) == 4:
        image = plots.mutual_heat_maps({"overall": {cell: {"score": v} for cell, v in cells.items()}}, metric="score")
        spoken = "; ".join(f"{cell} {value:.3f}" for cell, value in cells.items())
        yield {"title": "Overall", "image": image, "alt": f"overall score of each pairing: {spoken}", "width": 360}
    groups = {
        group: {cell: result.overall[cell][group] for cell in result.cells if group in result.overall[cell]}
        for group in dict.fromkeys(name for cell in result.cells for name in result.overall[cell])
    }
    if not groups:
        groups = {name: {cell: task.score(cell) for cell in result.cells} for name, task in result.tasks.items()}
    spoken = "; ".join(f"{group} {max(values.values()):.3f}" for group, values in groups.items())
    image = plots.group_bars(groups)
    yield {"title": "By group", "image": image, "alt": f"best score of each group: {spoken}", "width": 640}
    if curves := [task.budget for task in result.tasks.values() if task.budget is not None]:
        curve = mean_curve(curves)
        drawn = {"mean over tasks": curve.to_dict()}
        yield {
            "title": "What decoding some queries gives",
            "image": plots.budget_panels(drawn),
            "narrow": plots.budget_panels(drawn, narrow=True),
            "alt": "score by share of queries that decode: " + ", ".join(f"{score:.3f}" for score in curve.scores),
            "width": 900,
            "note": "Against disc targets. In each task the queries whose first two places lie closest go to mode gen "
            f"first; ringed: furthest above queries taken at random (dotted). {curve.line().capitalize()}.",
        }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _groups(result: SuiteResult) -> dict[str, Any] | None:
    columns = list(result.overall)
    groups = list(dict.fromkeys(name for column in columns for name in result.overall[column]))
    rows = [[group, *(_percent(result.overall[column].get(group)) for column in columns)] for group in groups]
    note = "The oracle takes, for each query, the better of disc-disc and gen-gen." if "oracle" in columns else ""
    return {"title": "Groups", "columns": ["group", *columns], "rows": rows, "note": note} if rows else None


def _tasks(result: SuiteResult) -> dict[str, Any]:
    columns = ["task", "metric", "queries", "candidates", *result.cells]
    both = len(result.modes) > 1
    columns += ["oracle"] if both else []
    rows = []
    for task in result.tasks.values():
        scores = [_percent(task.score(cell)) for cell in result.cells] + ([_percent(task.oracle)] if both else [])
        tied = max(score.tied for score in task.cells.values())
        rows.append([task.name, task.metric, task.n_queries, task.n_candidates, *scores, _percent(tied)])
    note = f"Ties: {result.ties}. Tied: the share of queries whose first place is shared, at the worst pairing."
    return {"title": "Tasks", "columns": [*columns, "tied"], "rows": rows, "note": note}


def _cost(result: SuiteResult) -> dict[str, Any]:
    columns = ["mode", "tokens / query", "tokens / target", "s / query", "s / target", "no <gen_emb>", "broken form"]
    keys = ("query_tokens", "target_tokens", "query_seconds", "target_seconds", "missing_gen", "format_errors")
    rows = [[mode, *(float(cost[key]) for key in keys)] for mode, cost in result.cost().items()]
    note = "Means over all items of all tasks. Where both modes ran, disc's seconds end with the prefill they share."
    return {"title": "Cost", "columns": columns, "rows": rows, "note": note}


def _dims(result: SuiteResult) -> dict[str, Any] | None:
    """Scores of truncated embeddings: overall where there is one, else the mean over tasks."""
    if not (dims := sorted({dim for task in result.tasks.values() for dim in task.dims})):
        return None
    rows = []
    for dim in dims:
        means = [sum(t.dims.get(dim, {c: t.score(c)})[c] for t in result.tasks.values()) for c in result.cells]
        rows.append([dim, *(_percent(value / len(result.tasks)) for value in means)])
    width = max(task.width for task in result.tasks.values())
    means = [sum(t.score(cell) for t in result.tasks.values()) / len(result.tasks) for cell in result.cells]
    rows.append([width, *(_percent(value) for value in means)])
    note = "Mean over tasks; rows are cut to so many numbers and normalised again."
    return {"title": "Width", "columns": ["numbers", *result.cells], "rows": rows, "note": note}


def _notes(result: SuiteResult) -> dict[str, Any] | None:
    rows = [[name, "; ".join(_note(*note) for note in task.notes.items())] for name, task in result.tasks.items()]
    rows = [row for row in rows if row[1]]
    return {"title": "Data notes", "columns": ["task", "what was odd about its data"], "rows": rows} if rows else None


def _note(name: str, value: Any) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value
    return f"{name.replace('_', ' ')}: {shown}"
