"""The ablation as one picture: hit@1 of every cell with its spread over seeds, and accuracy against decoded tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rime_fast.eval.plots import CELLS, COLOURS

LABELS = {
    "sft": "joint training",
    "refine": "+ Refine-RL",
    "no_cma": "without CMA",
    "cot": "chain of thought",
    "control": "control text",
}


def plot_ablation(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG. Bars are means over seeds, whiskers standard deviations, dots the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    bars, cost = figure.subplots(1, 2, width_ratios=(2.2, 1))
    width = 0.8 / len(LABELS)
    for i, (key, label) in enumerate(LABELS.items()):
        found = [report[key][pair] for pair in CELLS]
        at = [n + (i - (len(LABELS) - 1) / 2) * width for n in range(len(CELLS))]
        means, spread = [one["mean"] for one in found], [one["std"] for one in found]
        bars.bar(at, means, width * 0.92, yerr=spread, capsize=2, color=COLOURS[i], alpha=0.75, label=label)
        for x, one in zip(at, found, strict=True):
            bars.plot([x] * len(one["values"]), one["values"], ".", color="black", markersize=3)
        tokens = report["rewrite_tokens"][key]["mean"]
        cost.errorbar(tokens, means[-1], yerr=spread[-1], fmt="o", capsize=2, color=COLOURS[i], label=label)
    bars.set_xticks(range(len(CELLS)), CELLS)
    title = f"hit@1 of 100, {report['n_test']} queries of unseen scans, {len(report['seeds'])} seeds"
    bars.set_title(title, fontsize=10)
    bars.legend(frameon=False, fontsize=8)
    cost.set_title("gen-gen against decoded tokens a query", fontsize=10)
    cost.set_xlabel("tokens")
    cost.set_xlim(0, 1.1 * max(one["mean"] for one in report["rewrite_tokens"].values()))
    for axes in (bars, cost):
        axes.set_ylim(0, 1.05)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
