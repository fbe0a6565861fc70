"""Two result files beside each other: what got worse, whatever the clock and the load.

Times are compared as ratios taken inside one run where both files have them (to the floor; in a step benchmark without
one, to the plain recipe), which hold on one kind of processor. Else as medians, and only when both files come from one
kind of machine. Memory is compared between devices of one kind, errors always.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.lib.stored import Stored, load
from rime_fast.bench.harness import Row

PLAIN = "plain"  # how the name of a step benchmark's stock recipe begins
LEAST_MIB = 4.0  # a change of memory below this is the allocator's
LEAST_ERROR, ERROR_FACTOR = 1e-7, 2.0

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    """One figure of (bench, case, impl), before and after; factor > 1: worse."""

    bench: str
    case: str
    impl: str
    figure: str
    before: float
    after: float

    @property
    def factor(self) -> float:
        return self.after / self.before if self.before else float("inf")

    @property
    def ours(self) -> bool:
        """Whether the row is our code; a slower peer is news, not a regression."""
        return self.impl.startswith("ours")


@dataclass
class Comparison:
    """Rows by what became of them. without: rows whose times cannot be compared across these machines."""

    worse: list[Change] = field(default_factory=list)
    better: list[Change] = field(default_factory=list)
    same: int = 0
    gone: list[Key] = field(default_factory=list)
    new: list[Key] = field(default_factory=list)
    without: list[Key] = field(default_factory=list)


def compare_files(before: Path, after: Path, threshold: float = 0.1) -> Comparison:
    """threshold: the relative change of a time or of memory that counts; an error counts when it has doubled."""
    old, new = load(before), load(after)
    old_rows, new_rows = ({(row.bench, row.case, row.impl): row for row in one.rows} for one in (old, new))
    found = Comparison(
        gone=[key for key in old_rows if key not in new_rows], new=[key for key in new_rows if key not in old_rows]
    )
    for key in (key for key in old_rows if key in new_rows):
        time = _time(old, old_rows[key], new, new_rows[key])
        if time is None:
            found.without.append(key)
        figures = [*([time] if time else []), *_rest(old, old_rows[key], new, new_rows[key])]
        for name, earlier, later in figures:
            _sort(found, Change(*key, name, earlier, later), threshold)
    found.worse.sort(key=lambda change: (not change.ours, -change.factor))
    found.better.sort(key=lambda change: change.factor)
    return found


def _time(old: Stored, a: Row, new: Stored, b: Row) -> tuple[str, float, float] | None:
    if a.ratio_to_floor is not None and b.ratio_to_floor is not None:
        return "x floor", a.ratio_to_floor, b.ratio_to_floor
    bases = [_plain(stored, row) for stored, row in ((old, a), (new, b))]
    if bases[0] is not None and bases[1] is not None:
        return f"x {bases[0].impl}", a.median_ms / bases[0].median_ms, b.median_ms / bases[1].median_ms
    if all(old.environment.get(key) == new.environment.get(key) for key in ("device", "threads")):
        return "ms", a.median_ms, b.median_ms
    return None


def _plain(stored: Stored, row: Row) -> Row | None:
    """The stock recipe's row of the same case; None for that row itself."""
    others = stored.case(row.bench, row.case).values()
    return next((one for one in others if one.impl.startswith(PLAIN) and one.impl != row.impl), None)


def _rest(old: Stored, a: Row, new: Stored, b: Row) -> Iterator[tuple[str, float, float]]:
    same_kind = ("cuda" in old.environment) == ("cuda" in new.environment)
    if same_kind and a.peak_mib is not None and b.peak_mib is not None and abs(b.peak_mib - a.peak_mib) >= LEAST_MIB:
        yield "MiB", a.peak_mib, b.peak_mib
    if a.error_fp64 is not None and b.error_fp64 is not None and max(a.error_fp64, b.error_fp64) >= LEAST_ERROR:
        yield "error", a.error_fp64, b.error_fp64


def _sort(found: Comparison, change: Change, threshold: float) -> None:
    limit = ERROR_FACTOR if change.figure == "error" else 1 + threshold
    if change.factor > limit or change.after != change.after:  # NaN is worse
        found.worse.append(change)
    elif change.factor < 1 / limit:
        found.better.append(change)
    else:
        found.same += 1


def print_comparison(found: Comparison) -> None:
    """Tables of what got worse and better, and counts of the rest."""
    console = Console(width=140, highlight=False)
    for title, changes in (("worse", found.worse), ("better", found.better)):
        if not changes:
            continue
        table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
        for name in ("bench", "case", "impl", "figure"):
            table.add_column(name)
        for name in ("before", "after", "factor"):
            table.add_column(name, justify="right")
        for one in changes:
            style = "bold" if one.ours else "dim"
            cells = [format(value, ".3g") for value in (one.before, one.after, one.factor)]
            table.add_row(one.bench, one.case, one.impl, one.figure, *cells, style=style)
        console.print(table)
    ours = sum(change.ours for change in found.worse)
    console.print(
        f"{len(found.worse)} worse ({ours} ours), {len(found.better)} better, {found.same} unchanged; "
        f"{len(found.gone)} rows gone, {len(found.new)} new, {len(found.without)} without a comparable time"
    )
    for key in found.gone:
        console.print(f"gone: {' '.join(key)}")
