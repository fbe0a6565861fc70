"""The report's figures, drawn on matplotlib's Agg canvas (no display, no global state), as PNG data URIs."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rime_fast.eval.thumbnails import uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too; ordered for contrast on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B", "#882255", "#332288")
CELLS = ("disc-disc", "disc-gen", "gen-disc", "gen-gen")
MARKERS = {"disc-disc": "o", "disc-gen": "^", "gen-disc": "v", "gen-gen": "s"}
INK, FAINT = "#1f2733", "#d9dee5"
SMOOTH_FROM = 40  # points from which on a curve is shown with its running mean


@dataclass
class Panel:
    """One set of axes: ``series`` maps a label to its (x, y) points."""

    title: str
    series: dict[str, tuple[list[float], list[float]]]
    xlabel: str = "step"
    ylabel: str = ""
    log: bool = False
    unit: bool = False  # y from 0 to 1


def line_panels(panels: Sequence[Panel], narrow: bool = False) -> str:
    """Draw all panels, two a row; with ``narrow`` one, for a telephone's width."""
    columns = 1 if narrow else min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(5.2 * columns, 3.3 * rows)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        _style(axes, panel.title, panel.xlabel, panel.ylabel)
        for i, (label, (x, y)) in enumerate(panel.series.items()):
            colour = COLOURS[i % len(COLOURS)]
            dashed = "-" if i < len(COLOURS) else "--"
            if len(y) >= SMOOTH_FROM:
                axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
                axes.plot(x, running_mean(y), dashed, color=colour, linewidth=1.8, label=label)
            else:
                marker = "o" if len(y) < 12 else None
                axes.plot(x, y, dashed, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=label)
        drawn = [value for _, y in panel.series.values() for value in y]
        if panel.log and min(drawn) > 0:
            _log_scale(axes, max(drawn) / min(drawn))
        if panel.unit:
            axes.set_ylim(-0.02, 1.02)
        if len(panel.series) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=1 if len(panel.series) < 7 else 2)
    return _png(figure)


def mutual_heat_maps(
    phases: Mapping[str, Mapping[str, Mapping[str, float]]], narrow: bool = False, metric: str = "hit@1"
) -> str:
    """Draw one map a phase (label -> cells), all on one colour scale from 0 to 1; with ``narrow``
    one below the other."""
    rows, columns = (len(phases), 1) if narrow else (1, len(phases))
    figure = _figure(2.9 * columns + 0.5, 2.9 * rows)
    for place, (label, cells) in enumerate(phases.items(), 1):
        queries = list(dict.fromkeys(name.split("-")[0] for name in cells))
        targets = list(dict.fromkeys(name.split("-")[1] for name in cells))
        values = [[cells[f"{q}-{t}"][metric] for t in targets] for q in queries]
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=1, aspect="equal")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if value > 0.55 else INK
                axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=14, fontweight="bold")
        axes.set_xticks(range(len(targets)), targets, fontsize=10)
        axes.set_yticks(range(len(queries)), queries, fontsize=10)
        axes.set_xlabel("target mode", color=INK, fontsize=9)
        axes.set_ylabel("query mode" if narrow or place == 1 else "", color=INK, fontsize=9)
        axes.set_title(label, fontsize=11, color=INK, fontweight="bold", loc="left")
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    return _png(figure)


def accuracy_against_tokens(points: Sequence[Mapping[str, Any]], narrow: bool = False, metric: str = "hit@1") -> str:
    """Draw points {"label", "group", "tokens", "accuracy", "cell"?}: one colour a group, one marker a cell."""
    figure = _figure(*((4.6, 4.9) if narrow else (7.6, 3.9)))
    axes = figure.add_subplot()
    _style(axes, "", "decoded tokens, query and target together (mean)", metric)
    groups = list(dict.fromkeys(point["group"] for point in points))
    for i, group in enumerate(groups):
        own = sorted((p for p in points if p["group"] == group), key=lambda p: p["tokens"])
        colour = COLOURS[i % len(COLOURS)]
        for point in own:
            marker = MARKERS.get(point.get("cell", ""), "D")
            axes.scatter(point["tokens"], point["accuracy"], color=colour, marker=marker, s=46, zorder=3)
        axes.scatter([], [], color=colour, marker="s", label=group)
    for cell in CELLS:
        if any(point.get("cell") == cell for point in points):
            axes.scatter([], [], color="white", edgecolor=INK, marker=MARKERS[cell], label=f"{cell} (query-target)")
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlim(left=-0.03 * max(1.0, *(point["tokens"] for point in points)))
    if narrow:
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    else:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def budget_panels(curves: Mapping[str, Mapping[str, Any]], narrow: bool = False) -> str:
    """Draw accuracy and decoded tokens against the share of queries that decode: label -> ``BudgetCurve.to_dict()``."""
    figure = _figure(*((4.2, 6.4) if narrow else (9.6, 3.7)))
    score, cost = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    metric = next(iter(curves.values()))["metric"]
    _style(score, metric, "queries that decode, %", "")
    _style(cost, "decoded tokens a query", "queries that decode, %", "")
    for i, (label, curve) in enumerate(curves.items()):
        colour, x, y = COLOURS[i % len(COLOURS)], [100 * share for share in curve["shares"]], curve["scores"]
        score.plot(x, y, "o-", color=colour, linewidth=1.8, markersize=3, label=label)
        score.plot([x[0], x[-1]], [y[0], y[-1]], ":", color=colour, linewidth=1.2)
        cost.plot(x, curve["tokens"], "-", color=colour, linewidth=1.8)
        if (k := curve["knee"]) is not None:
            score.plot(x[k], y[k], "o", markersize=10, markerfacecolor="none", markeredgecolor=colour)
            score.annotate(f"{x[k]:.0f} %", (x[k], y[k]), (8, -12), textcoords="offset points", fontsize=8, color=INK)
    score.plot([], [], ":", color=INK, linewidth=1.2, label="taken at random")
    score.legend(frameon=False, fontsize=8, loc="best")
    return _png(figure)


def group_bars(groups: Mapping[str, Mapping[str, float]], metric: str = "score") -> str:
    """Draw horizontal bars, group -> series -> score from 0 to 1: one colour a series, the first group on top."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    height = 0.8 / max(1, len(series))
    figure = _figure(6.0, 1.2 + len(groups) * max(0.3, 0.17 * len(series)))
    axes = figure.add_subplot()
    _style(axes, "", metric, "")
    for k, name in enumerate(series):
        places = [
            i + (k - (len(series) - 1) / 2) * height for i, values in enumerate(groups.values()) if name in values
        ]
        scores = [values[name] for values in groups.values() if name in values]
        axes.barh(places, scores, height=height * 0.9, color=COLOURS[k % len(COLOURS)], label=name)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(False, axis="y")
    if len(series) > 1:  # above the bars: a narrow screen has no room beside them
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _png(figure)


def running_mean(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Centred mean over a window of ``share`` of the points (at least 3), shorter at the ends; NaN is left out."""
    half = max(1, round(len(values) * share / 2))
    means = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10.5, color=INK, fontweight="bold", loc="left")
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.grid(True, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(FAINT)


def _log_scale(axes: Axes, span: float) -> None:
    """Plain numbers on the axis; 1, 2, 5 of each decade where there are few decades, else the decades alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 300 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _png(figure: Figure) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return uri("image/png", buffer.getvalue())
