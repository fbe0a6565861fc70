"""Progress of commands that embed: a rich bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rime_fast.eval.mutual import Progress


@contextmanager
def bars() -> Iterator[Progress]:
    """Yields ``progress(stage, done, total)``; each new stage gets a bar (or a line) of its own. Writes to stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:

        def line(stage: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"{stage}: {total} items", markup=False, highlight=False)

        yield line
        return
    tasks = {}
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def bar(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield bar


def quiet() -> None:
    """Turn off transformers' own bars (loading and writing shards): ours are the ones to watch."""
    from transformers.utils import logging

    logging.disable_progress_bar()
