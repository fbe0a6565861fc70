"""Rows as a table, the way kernel people read it: time, ratio to the floor, rate, memory, error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rime_fast.bench.harness import FLOOR, PARTS, Row, Skipped

COLUMNS = ("ms", "p20", "p80", "x floor", "TFLOP/s", "GB/s", "MiB", "error", "first s")


def print_rows(rows: Sequence[Row], skipped: Sequence[Skipped] = (), title: str = "") -> None:
    """One line a row, the cases apart; what was skipped comes after, with the reason."""
    console = Console() if sys.stdout.isatty() else Console(width=150, highlight=False)
    table = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("case", no_wrap=True, overflow="ellipsis", max_width=48)
    table.add_column("impl", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    parts = [row for row in rows if row.bench.endswith(PARTS)]
    rows = [row for row in rows if not row.bench.endswith(PARTS)]
    for row in rows:
        key = f"{row.bench} {row.case}"
        if last not in (None, key):
            table.add_section()
        style = "bold" if row.impl.startswith("ours") else "dim" if row.impl == FLOOR else ""
        table.add_row(key if key != last else "", row.impl, *_cells(row), style=style)
        last = key
    console.print(table)
    for case in dict.fromkeys((row.bench, row.case) for row in parts):
        console.print(_breakdown([row for row in parts if (row.bench, row.case) == case]))
    for row in rows:
        if row.note:
            console.print(Text(f"{row.bench} {row.case} {row.impl}: {row.note}"))
    for one in skipped:
        console.print(Text(f"skipped: {one.bench} {one.case} {one.impl}: {one.reason}", style="yellow"))


def _breakdown(rows: Sequence[Row]) -> Table:
    """One case: an implementation a line, a part of the step a column."""
    names = list(dict.fromkeys(row.impl.rsplit("/", 1)[1] for row in rows))
    title = f"{rows[0].bench.removesuffix(PARTS)} {rows[0].case}: milliseconds of each part"
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("impl")
    for name in names:
        table.add_column(name, justify="right")
    for impl in dict.fromkeys(row.impl.rsplit("/", 1)[0] for row in rows):
        found = {row.impl.rsplit("/", 1)[1]: row.median_ms for row in rows if row.impl.rsplit("/", 1)[0] == impl}
        table.add_row(impl, *(f"{found[name]:.1f}" if name in found else "-" for name in names))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    values = (
        (row.median_ms, ".2f"),
        (row.p20_ms, ".2f"),
        (row.p80_ms, ".2f"),
        (row.ratio_to_floor, ".2f"),
        (row.tflops, ".3g"),
        (row.gbytes_s, ".3g"),
        (row.peak_mib, ".1f"),
        (row.error_fp64, ".1e"),
        (row.first_call_s, ".2f"),
    )
    return tuple("-" if value is None else format(value, spec) for value, spec in values)
