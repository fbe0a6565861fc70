"""Figures of a benchmark run, from its JSON alone: roofline, ratios to the floor, memory, growth, parts of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lib.stored import Stored, load
from rime_fast.bench.ceiling import BENCH as CEILING
from rime_fast.bench.harness import FLOOR, PARTS, Row
from rime_fast.eval.plots import COLOURS, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROWTH = "_growth"  # how the bench of rows measured against one size ends
OTHERS = "#9aa3ad"  # peers' bars; ours have colours


def plot_file(source: Path, folder: Path) -> list[Path]:
    """Write NAME_roofline.png and so on of ``source`` (NAME.json) into ``folder``; those without rows are left out."""
    stored = load(source)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        figure = draw(stored)
        if figure is not None:
            path = folder / f"{source.stem}_{name}.png"
            figure.savefig(path, metadata={"Software": None})
            written.append(path)
    return written


# --- the figures -----------------------------------------------------------------------------------------------------


def roofline(stored: Stored) -> Figure | None:
    """Every row with FLOP and bytes of its task, under the copy's and the products' measured speeds."""
    ceilings = [row for row in stored.rows if row.bench == CEILING]
    band = max((row.gbytes_s for row in ceilings if row.gbytes_s), default=None)
    peaks: dict[str, float] = {}  # a floor may be a better shape for the library than the ceiling's square
    for row in stored.rows:
        if row.tflops and (row.bench == CEILING or row.impl == FLOOR):
            dtype = str(row.shape.get("dtype"))
            peaks[dtype] = max(row.tflops, peaks.get(dtype, 0.0))
    points = [row for row in stored.rows if row.tflops and row.gbytes_s and row.bench != CEILING and row.impl != FLOOR]
    if band is None or not peaks or not points:
        return None
    figure, (axes,) = _panels(1, 8.2, 4.8)
    intensity = [_intensity(row) for row in points]
    knees = [1e3 * peak / band for peak in peaks.values()]
    low, high = min(*intensity, *knees) / 3, max(*intensity, *knees) * 3
    for i, (dtype, peak) in enumerate(peaks.items()):
        axes.plot(
            [low, knees[i], high],
            [low * band / 1e3, peak, peak],
            color=INK,
            linewidth=1.3,
            linestyle=("-", "--", ":")[i % 3],
            label=f"{dtype}: {peak:.3g} TFLOP/s, {band:.0f} GB/s",
        )
    for i, bench in enumerate(dict.fromkeys(row.bench for row in points)):
        for mine in (True, False):
            some = [row for row in points if row.bench == bench and _ours(row) is mine]
            if some:
                axes.scatter(
                    [_intensity(row) for row in some],
                    [row.tflops for row in some],
                    s=34 if mine else 18,
                    zorder=3,
                    marker="o" if mine else "x",
                    color=COLOURS[i % len(COLOURS)],
                    label=f"{bench}, {'ours' if mine else 'peers'}",
                )
    _log_axes(axes)
    _style(axes, f"Roofline, {_where(stored)}", "FLOP per byte that the task needs", "TFLOP/s")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def floor_ratios(stored: Stored) -> Figure | None:
    """A panel a case: every implementation's time over its floor's."""
    rows = [row for row in stored.rows if row.ratio_to_floor is not None and row.impl != FLOOR]
    return _bars(stored, rows, lambda row: row.ratio_to_floor, "time over the floor (bare matrix products)", 1.0)


def memory(stored: Stored) -> Figure | None:
    """A panel a case: peak memory beyond what was there before the call."""
    rows = [row for row in stored.rows if row.peak_mib and row.bench != CEILING and not row.bench.endswith(GROWTH)]
    return _bars(stored, rows, lambda row: row.peak_mib, "peak memory of a call, MiB", None)


def growth(stored: Stored) -> Figure | None:
    """Time and memory against the size that varies, with fitted slopes, both axes logarithmic."""
    curves = {
        f"{bench} against {name}": (name, rows)
        for bench in dict.fromkeys(row.bench for row in stored.rows if row.bench.endswith(GROWTH))
        for name, rows in _varied([row for row in stored.rows if row.bench == bench]).items()
    }
    if not curves:
        return None
    figure, panels = _panels(2 * len(curves), 5.2, 3.6, columns=2)
    for i, (title, (name, rows)) in enumerate(curves.items()):
        for axes, unit, value in (
            (panels[2 * i], "ms", lambda row: row.median_ms),
            (panels[2 * i + 1], "MiB", lambda row: row.peak_mib),
        ):
            for j, impl in enumerate(dict.fromkeys(row.impl for row in rows)):
                found = [(float(row.shape[name]), value(row)) for row in rows if row.impl == impl]
                points = sorted((x, y) for x, y in found if y and y >= 0.05)  # less is the allocator's noise
                if points:
                    _curve(axes, points, impl, COLOURS[j % len(COLOURS)])
            _log_axes(axes)
            _style(axes, title.replace(GROWTH, ""), name, unit)
            if axes.lines:
                axes.legend(frameon=False, fontsize=8)
            else:
                axes.set_visible(False)
    return figure


def step_parts(stored: Stored) -> Figure | None:
    """Where a step's time goes: one stacked bar an implementation, a panel a case."""
    rows = [row for row in stored.rows if row.bench.endswith(PARTS)]
    cases = list(dict.fromkeys((row.bench, row.case) for row in rows))
    if not cases:
        return None
    names = list(dict.fromkeys(row.impl.rsplit("/", 1)[1] for row in rows))
    figure, panels = _panels(len(cases), 8.2, 1.9)
    for axes, (bench, case) in zip(panels, cases, strict=True):
        own = [row for row in rows if (row.bench, row.case) == (bench, case)]
        impls = list(dict.fromkeys(row.impl.rsplit("/", 1)[0] for row in own))[::-1]
        for i, name in enumerate(names):
            left = [sum(_part(own, impl, before) for before in names[:i]) for impl in impls]
            width = [_part(own, impl, name) for impl in impls]
            axes.barh(impls, width, left=left, height=0.62, color=_colour(i, name), label=name)
        _style(axes, f"{bench.removesuffix(PARTS)}: {case}", "ms", "")
    panels[0].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


FIGURES: dict[str, Callable[[Stored], Figure | None]] = {
    "roofline": roofline,
    "floor_ratios": floor_ratios,
    "memory": memory,
    "growth": growth,
    "step_parts": step_parts,
}


# --- parts of figures ------------------------------------------------------------------------------------------------


def fitted_slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares of log y over log x; NaN for fewer than two sizes."""
    if len({x for x, _ in points}) < 2:
        return math.nan
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def _curve(axes: Axes, points: Sequence[tuple[float, float]], impl: str, colour: str) -> None:
    slope = fitted_slope(points)
    label = impl if math.isnan(slope) else f"{impl}: slope {slope:.2f}"
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6, label=label)


def _varied(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The numeric sizes that take several values while all others stay -> the rows along each.

    Other sizes are held at those of the most rows; a bench that grows several sizes in turn gives a curve for each.
    """
    names = {name for row in rows for name, value in row.shape.items() if isinstance(value, (int, float))}
    found: dict[str, list[Row]] = {}
    for name in sorted(names):
        lines: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            rest = tuple(sorted((key, str(value)) for key, value in row.shape.items() if key != name))
            lines.setdefault(rest, []).append(row)
        longest = max(lines.values(), key=lambda line: len({row.shape.get(name) for row in line}))
        if len({row.shape.get(name) for row in longest}) > 1:
            found[name] = longest
    return found


def _bars(
    stored: Stored, rows: Sequence[Row], value: Callable[[Row], float | None], label: str, line: float | None
) -> Figure | None:
    rows = [row for row in rows if not row.bench.endswith(PARTS)]
    cases = list(dict.fromkeys((row.bench, row.case) for row in rows))
    if not cases:
        return None
    most = max(sum((row.bench, row.case) == case for row in rows) for case in cases)
    figure, panels = _panels(len(cases), 5.4, 0.75 + 0.24 * most, columns=2)
    for axes, (bench, case) in zip(panels, cases, strict=True):
        own = [row for row in rows if (row.bench, row.case) == (bench, case)][::-1]
        values = [float(value(row) or 0.0) for row in own]
        colours = [COLOURS[0] if _ours(row) else OTHERS for row in own]
        bars = axes.barh([row.impl for row in own], values, color=colours, height=0.66)
        axes.bar_label(bars, [f"{one:.3g}" for one in values], padding=3, fontsize=7.5, color=INK)
        axes.set_xlim(0, 1.18 * max(*values, line or 0.0))
        if line is not None:
            axes.axvline(line, color=INK, linewidth=1, linestyle="--")
        _style(axes, f"{bench}: {case}", "", "")
    figure.supxlabel(f"{label}; {_where(stored)}", fontsize=9, color=INK)
    return figure


def _panels(count: int, width: float, height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    """Axes in reading order; sizes in inches, of one panel."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.4), dpi=130, layout="constrained", facecolor="white")
    return figure, [figure.add_subplot(lines, columns, place + 1) for place in range(count)]


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=9.5, color=INK, fontweight="bold", loc="left")
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(FAINT)


def _log_axes(axes: Axes) -> None:
    """Both logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _where(stored: Stored) -> str:
    environment = stored.environment
    return f"{environment.get('device')}, torch {environment.get('torch')}, commit {environment.get('commit')}"


def _ours(row: Row) -> bool:
    return row.impl.startswith("ours")


def _intensity(row: Row) -> float:
    return 1e3 * (row.tflops or math.nan) / (row.gbytes_s or math.nan)


def _part(rows: Sequence[Row], impl: str, name: str) -> float:
    return next((row.median_ms for row in rows if row.impl == f"{impl}/{name}"), 0.0)


def _colour(i: int, name: str) -> str:
    return FAINT if name == "other" else COLOURS[i % len(COLOURS)]
