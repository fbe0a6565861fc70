"""From the arms' curves to one report and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rime_fast.demo.ablation_report import summary

LABELS = {
    "refine": "ours, anchors of the start",
    "anchors_policy": "ours, anchors of the policy",
    "ume_r1": "UME-R1's reward",
    "random": "control: random reward",
    "format_only": "control: format alone",
    "length_only": "control: length alone",
    "more_sft": "control: more joint training",
}
REWARDS = ("refine", "anchors_policy", "ume_r1")
MEASURES = ("hit@1", "query_tokens", "seconds")


def summarise(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Make the report {"curves": {arm: curve}, "n_seeds"} from each arm's cells, one a seed.

    A curve has ``steps``; for each of hit@1, query_tokens and seconds (processor time of the training)
    ``mean`` and ``std``
    over seeds (of a sample), per step, and ``seeds``: {seed: values}; and ``gain``, hit@1 of the last step less that of
    step 0, as {mean, std, values}. Raises ValueError where seeds were measured at different steps.
    """
    curves: dict[str, dict[str, Any]] = {}
    for arm, cells in arms.items():
        steps = [point["step"] for point in cells[0]["points"]]
        if any([point["step"] for point in cell["points"]] != steps for cell in cells):
            raise ValueError(f"{arm}: the seeds were measured at different steps")
        curve: dict[str, Any] = {"steps": steps}
        for measure in MEASURES:
            rows = {cell["seed"]: [point[measure] for point in cell["points"]] for cell in cells}
            columns = [summary(values) for values in zip(*rows.values(), strict=True)]
            curve[measure] = {
                "mean": [column["mean"] for column in columns],
                "std": [column["std"] for column in columns],
                "seeds": {str(seed): values for seed, values in rows.items()},
            }
        curve["gain"] = summary([values[-1] - values[0] for values in curve["hit@1"]["seeds"].values()])
        curves[arm] = curve
    return {"curves": curves, "n_seeds": max(len(cells) for cells in arms.values())}


def plot_curves(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG: accuracy against seconds of the three rewards, and against steps of all arms, and the tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rime_fast.eval.plots import COLOURS

    curves = report["curves"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_seconds, by_steps, tokens = figure.subplots(1, 3)

    def draw(axes: Any, arm: str, x: Sequence[float], y: str) -> None:
        colour = COLOURS[list(LABELS).index(arm)]
        style = "-" if arm in REWARDS else "--"
        for values in curves[arm][y]["seeds"].values():
            axes.plot(x, values, style, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(x, curves[arm][y]["mean"], style, marker="o", color=colour, markersize=3, label=LABELS[arm])

    for arm in curves:
        if arm in REWARDS:
            draw(by_seconds, arm, curves[arm]["seconds"]["mean"], "hit@1")
        share = [step / max(curves[arm]["steps"]) for step in curves[arm]["steps"]]
        draw(by_steps, arm, share, "hit@1")
        draw(tokens, arm, share, "query_tokens")
    by_seconds.set_xlabel("processor seconds of Refine-RL, one thread")
    for axes in (by_steps, tokens):
        axes.set_xlabel("share of the arm's training")
    for axes, title in ((by_seconds, "gen-gen hit@1"), (by_steps, "gen-gen hit@1"), (tokens, "decoded tokens a query")):
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    by_seconds.legend(frameon=False, fontsize=8)
    by_steps.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
