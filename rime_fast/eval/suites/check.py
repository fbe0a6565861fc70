"""Whether a suite's files are all there, before anything is embedded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rime_fast.eval.suites.tasks import MISSING, Suite, Task, TaskData


@dataclass
class TaskCheck:
    """What ``check_suite`` found of one task. gaps: what is missing, in sentences; [] where nothing is."""

    name: str
    queries: int = 0
    expected: int | None = None
    candidates: int = 0
    gaps: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def check_suite(suite: Suite) -> Iterator[TaskCheck]:
    """Read every task's tables, count rows, look for every picture and frame. Nothing is embedded or decoded."""
    for task in suite.tasks.values():
        found = TaskCheck(task.name, expected=task.expected_queries)
        try:
            data = task.load()
        except (ValueError, KeyError, TypeError, OSError) as error:
            found.gaps.append(_sentence(error))
        else:
            found.queries, found.candidates, found.notes = len(data.queries), len(data.candidates), data.notes
            found.gaps += _missing(data)
            if task.expected_queries not in (None, found.queries):
                found.gaps.append(f"{found.queries:,} queries; the published set has {task.expected_queries:,}")
        yield found


def gaps(task: Task) -> list[str]:
    """Say what is missing for embedding a task; a smaller set than the published one is no gap here."""
    try:
        return _missing(task.load())
    except (ValueError, KeyError, TypeError, OSError) as error:
        return [_sentence(error)]


def _sentence(error: Exception) -> str:
    return f"a row has no column {error}" if isinstance(error, KeyError) else str(error)


def _missing(data: TaskData) -> list[str]:
    found = []
    for note, what in (("missing_frames", "videos have no frames"), ("missing_subsets", "subsets are missing")):
        if count := data.notes.get(note):
            found.append(f"{count:,} {what}: {_named(data.notes[f'{note}_names'], count)}")
    files = dict.fromkeys(path for side in (*data.queries, *data.candidates) for path in _paths(side.images))
    absent = [path for path in files if not os.path.exists(path)]
    if absent:
        found.append(f"{len(absent):,} pictures are missing: {_named(absent, len(absent))}")
    return found


def _paths(sources: Iterable[Any]) -> Iterator[str]:
    return (source for source in sources if isinstance(source, str))


def _named(names: list[str], count: int) -> str:
    shown = names[: min(3, MISSING)]
    return ", ".join(shown) + (", ..." if count > len(shown) else "")
