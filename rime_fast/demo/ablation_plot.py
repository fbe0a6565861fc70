"""The ablation as one picture: what Refine-RL makes of a noisy teacher beside its controls, and what each part does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rime_fast.demo.ablation_report import CONTROLS
from rime_fast.eval.plots import CELLS, COLOURS

PARTS = {"clean": "joint training", "no_cma": "without CMA", "cot": "chain of thought", "control": "control text"}
ARM_LABELS = {
    "sft": "noisy teacher",
    "refine": "+ Refine-RL",
    "anchors_policy": "+ anchors of the policy",
    "ume_r1": "+ UME-R1's reward",
    "random": "+ random reward",
    "format_only": "+ format reward",
    "length_only": "+ length reward",
    "more_sft": "+ more joint training",
    "best_of_8": "best of 8 samples",
    "whole": "whole rewrites alone",
}


def plot_ablation(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG. Bars are means over seeds, whiskers standard deviations, dots the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    arms, bars = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for place, key in enumerate(ARM_LABELS):
        one = report[key]["gen-gen"]
        colour = COLOURS[2] if key in ("refine", "anchors_policy", "ume_r1") else COLOURS[0 if key == "sft" else 6]
        shade = 0.4 if key in CONTROLS else 0.75
        arms.barh(place, one["mean"], 0.75, xerr=one["std"], capsize=2, color=colour, alpha=shade)
        arms.plot(one["values"], [place] * len(one["values"]), ".", color="black", markersize=3)
    arms.set_yticks(range(len(ARM_LABELS)), ARM_LABELS.values(), fontsize=9)
    arms.invert_yaxis()
    arms.set_xlim(0, 1.05)
    seeds, queries = len(report["seeds"]), report["n_test"]
    arms.set_title(f"gen-gen hit@1 of 100; {queries} queries of unseen scans, {seeds} seeds", fontsize=10)
    width = 0.8 / len(PARTS)
    for i, (key, label) in enumerate(PARTS.items()):
        found = [report[key][pair] for pair in CELLS]
        at = [n + (i - (len(PARTS) - 1) / 2) * width for n in range(len(CELLS))]
        means, spread = [one["mean"] for one in found], [one["std"] for one in found]
        tokens = report["rewrite_tokens"][key]["mean"]
        text = f"{label}, {tokens:.0f} tokens"
        bars.bar(at, means, width * 0.92, yerr=spread, capsize=2, color=COLOURS[i], alpha=0.75, label=text)
        for x, one in zip(at, found, strict=True):
            bars.plot([x] * len(one["values"]), one["values"], ".", color="black", markersize=3)
    bars.set_xticks(range(len(CELLS)), CELLS)
    bars.set_ylim(0, 1.05)
    bars.set_title("hit@1 by query mode and target mode, clean teacher", fontsize=10)
    bars.legend(frameon=False, fontsize=8)
    for axes in (arms, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
