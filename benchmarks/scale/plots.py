"""The curves of the scale model, drawn from its JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rime_fast.eval.plots import COLOURS

PANELS = (
    # curve, title, x label, y label, percent, log y
    ("throughput", "joint training: pairs a second and GPU", "GPUs", "pairs / s", False, False),
    ("contrast_share", "contrast with its exchange: share of the step", "GPUs", "share", True, True),
    ("decode_share", "decoding: share of a Refine-RL step (64 GPUs)", "tokens of a rewrite", "share", True, False),
    ("kept_graphs", "kept graphs: seconds against memory (64 GPUs)", "GiB of a GPU", "seconds a step", False, False),
)


def plot_scale(source: Path) -> Path:
    """Draw ``source`` (report.py's JSON) into an SVG beside it; returns its path."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    report = json.loads(source.read_text(encoding="utf-8"))
    path = source.with_suffix(".svg")
    with rc_context({"svg.hashsalt": "rime-fast", "svg.fonttype": "none"}):  # equal data, equal file
        figure = Figure(figsize=(11, 8), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            _panel(axes, report["curves"], *panel)
        figure.suptitle(f"{report['model']['name']} on {report['hardware']['name']}: modelled, not measured")
        figure.savefig(path, metadata={"Date": None})
    return path


def _panel(axes: Any, curves: dict[str, Any], name: str, title: str, x: str, y: str, share: bool, log: bool) -> None:
    colours: dict[str, str] = {}
    for one in curves[name]:
        key = one["label"].split(",")[0] if name != "contrast_share" else one["label"].split(", ")[-1]
        colour = colours.setdefault(key, COLOURS[len(colours) % len(COLOURS)])
        style = "--" if one["dashed"] else "-"
        axes.plot(one["x"], one["y"], style, marker=".", color=colour, label=one["label"])
    if name == "kept_graphs":
        axes.set_xlim(0, 1.5 * curves["hbm_gib"])
        axes.axvline(curves["hbm_gib"], color="grey", linewidth=0.8)
        axes.annotate("the card", (curves["hbm_gib"], axes.get_ylim()[1]), fontsize=7, ha="right", va="top")
    else:
        axes.set_xscale("log", base=2)
        ticks = curves[name][0]["x"]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    if log:
        axes.set_yscale("log")
        axes.axhline(curves["contrast_begins"]["share"], color="grey", linewidth=0.8)
    elif share:
        axes.set_ylim(0, 1)
    else:
        axes.set_ylim(bottom=0)
    if share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
