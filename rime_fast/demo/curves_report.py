"""From the curves' cells to one report and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rime_fast.demo.ablation_report import summary

LABELS = {
    "anchors_sft": "ours, anchors of the start",
    "anchors_policy": "ours, anchors of the policy",
    "ume_r1": "UME-R1's reward",
}
MEASURES = {"hit@1": "gen-gen hit@1", "query_tokens": "decoded tokens a query"}


def summarise(panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """{"curves": {panel: {reward: curve}}, "n_seeds"} from each panel's cells.

    A curve has ``steps``; for each of hit@1 and query_tokens ``mean`` and ``std`` over seeds (of a sample), per step,
    and ``seeds``: {seed: values}; ``gain``, hit@1 of the last step less that of step 0, as {mean, std, values}; and
    ``seconds`` of training a seed. Raises ValueError where seeds were measured at different steps.
    """
    curves: dict[str, dict[str, Any]] = {}
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, cells in panels.items():
        for cell in cells:
            groups.setdefault((name, cell["reward"]), []).append(cell)
    for (name, reward), group in groups.items():
        steps = [point["step"] for point in group[0]["points"]]
        if any([point["step"] for point in cell["points"]] != steps for cell in group):
            raise ValueError(f"{name}, {reward}: the seeds were measured at different steps")
        curve: dict[str, Any] = {"steps": steps}
        for measure in MEASURES:
            rows = {cell["seed"]: [point[measure] for point in cell["points"]] for cell in group}
            columns = [summary(values) for values in zip(*rows.values(), strict=True)]
            curve[measure] = {
                "mean": [column["mean"] for column in columns],
                "std": [column["std"] for column in columns],
                "seeds": {str(seed): values for seed, values in rows.items()},
            }
        hits = curve["hit@1"]["seeds"].values()
        curve["gain"] = summary([values[-1] - values[0] for values in hits])
        curve["seconds"] = summary([cell["seconds"] for cell in group])
        curves.setdefault(name, {})[reward] = curve
    return {"curves": curves, "n_seeds": max(len(group) for group in groups.values())}


def plot_curves(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG: a row for each panel, hit@1 on the left and tokens on the right; thin lines are seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rime_fast.eval.plots import COLOURS

    curves = report["curves"]
    figure = Figure(figsize=(10, 3.4 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(curves), len(MEASURES), squeeze=False)
    for row, (panel, rewards) in zip(grid, curves.items(), strict=True):
        for axes, (name, title) in zip(row, MEASURES.items(), strict=True):
            for reward, curve in rewards.items():
                colour = COLOURS[list(LABELS).index(reward)]
                for values in curve[name]["seeds"].values():
                    axes.plot(curve["steps"], values, color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(curve["steps"], curve[name]["mean"], "o-", color=colour, markersize=3, label=LABELS[reward])
            axes.set_title(f"{panel}: {title}", fontsize=10)
            axes.set_xlabel("Refine-RL step")
            axes.spines[["top", "right"]].set_visible(False)
        row[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
