"""Progress of commands: a rich bar on a terminal; elsewhere one line a stage, and one every half minute of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

Progress = Callable[..., None]
_EVERY = 30.0  # seconds between two lines of a stage


@contextmanager
def bars() -> Iterator[Progress]:
    """Yields ``progress(stage, done, total, note="")``; each new stage gets a bar (or lines) of its own, with the note
    beside it. Writes to stderr."""
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        began: dict[str, tuple[float, int]] = {}
        shown: dict[str, float] = {}

        def line(stage: str, done: int, total: int, note: str = "") -> None:
            now = time.monotonic()
            start, before = began.setdefault(stage, (now, done))
            told = f" ({note})" if note else ""
            if done == total:
                console.print(f"{stage}: {total} items{told}", markup=False, highlight=False, soft_wrap=True)
            elif now - shown.setdefault(stage, now) >= _EVERY and done > before:
                shown[stage] = now
                left = timedelta(seconds=round((total - done) * (now - start) / (done - before)))
                console.print(
                    f"{stage}: {done} of {total}{told}, {left} left", markup=False, highlight=False, soft_wrap=True
                )

        yield line
        return
    tasks = {}
    columns = (
        rich.TextColumn("[bold]{task.description}"),
        rich.BarColumn(bar_width=32),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("ETA"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    with rich.Progress(*columns, console=console) as progress:

        def bar(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                # what a run before has done counts for the bar, not for the time left
                tasks[stage] = progress.add_task(stage, total=total, completed=done, note=note)
            progress.update(tasks[stage], completed=done, note=note)

        yield bar


def quiet() -> None:
    """Turn off transformers' own bars (loading and writing shards): ours are the ones to watch."""
    from transformers.utils import logging

    logging.disable_progress_bar()
