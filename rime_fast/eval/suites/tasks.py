"""What a suite is made of: tasks, their data, and the collector that parsers fill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from rime_fast.data.records import Side
from rime_fast.eval.suites.protocol import Protocol

MISSING = 20  # names of missing files kept in the notes; the count is exact


@dataclass
class TaskData:
    """One task, ready to embed and rank.

    candidates: each embedded once, in the order of first appearance; names: their official keys, all different.
    correct[i]: rows of ``candidates`` that are right for query i ([]: none is known; it scores 0). gains: their
    relevance (None: 1 each). pools[i]: the rows query i is ranked against, none twice (None: all candidates). A right
    candidate outside its query's pool counts as never found. categories: a name per query, for tasks that report one.
    notes: what was odd about the data, counts and lists by name; {} where nothing was.
    """

    queries: list[Side]
    candidates: list[Side]
    names: list[str]
    correct: list[list[int]]
    gains: list[list[float]] | None = None
    pools: list[list[int]] | None = None
    categories: list[str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def first(self, count: int) -> TaskData:
        """Take the first ``count`` queries with all candidates: fewer candidates would make the task easier."""
        return replace(
            self,
            queries=self.queries[:count],
            correct=self.correct[:count],
            gains=None if self.gains is None else self.gains[:count],
            pools=None if self.pools is None else self.pools[:count],
            categories=None if self.categories is None else self.categories[:count],
        )


@dataclass(frozen=True)
class Task:
    """One task of a suite. ``load`` reads it; nothing is read before that.

    metric: the name of its main score (metrics.py). expected_queries: rows of the published set, None where unknown.
    group: its group within the modality. in_domain: whether the published models trained on it (MMEB's images).
    needs: what it reads, for people. exported: its name in a leaderboard file.
    """

    name: str
    modality: str
    group: str
    metric: str
    expected_queries: int | None
    reader: Callable[[], TaskData] = field(repr=False)
    in_domain: bool | None = None
    needs: str = ""
    exported: str = ""

    def load(self) -> TaskData:
        """Read queries, candidates and judgements. Raises ValueError or DataError naming files that are not there."""
        return self.reader()


@dataclass(frozen=True)
class Suite:
    """Tasks by name, under one protocol, with the rule that makes overall scores of task scores."""

    name: str
    root: str
    protocol: Protocol
    tasks: dict[str, Task]
    aggregate: Callable[[Mapping[str, TaskScore]], dict[str, float]] = field(repr=False)
    whole: dict[str, Task] = field(default_factory=dict, repr=False)  # before a selection

    def select(self, tasks: Sequence[str] = (), groups: Sequence[str] = ()) -> Suite:
        """The suite with these tasks, or with those of these groups ("image", "image.CLS"); all where none is named.

        Raises ValueError for a name that is neither.
        """
        known = {f"{t.modality}.{t.group}" for t in self.tasks.values()} | {t.modality for t in self.tasks.values()}
        for kind, given, valid in (("tasks", tasks, set(self.tasks)), ("groups", groups, known)):
            if unknown := [name for name in given if name not in valid]:
                raise ValueError(f"{kind} names {unknown[0]!r}; expected some of {', '.join(sorted(valid))}")
        if not tasks and not groups:
            return self
        chosen = {
            name: task
            for name, task in self.tasks.items()
            if name in tasks or task.modality in groups or f"{task.modality}.{task.group}" in groups
        }
        return replace(self, tasks=chosen, whole=self.whole or self.tasks)


@dataclass(frozen=True)
class TaskScore:
    """A task's main score, and the mean by category where it has categories."""

    score: float
    categories: dict[str, float] = field(default_factory=dict)


class Collector:
    """Gathers one task: candidates by name (the first one of a name is kept), queries with names of what is right."""

    def __init__(self, protocol: Protocol, *, lists: bool) -> None:
        self.protocol = protocol
        self.candidates: list[Side] = []
        self.rows: dict[str, int] = {}
        self.texts: list[str] = []  # as the parser gave them: protocols may make equal what differs
        self.queries: list[Side] = []
        self.correct: list[list[str]] = []
        self.gains: list[list[float]] = []
        self.pools: list[list[int]] | None = [] if lists else None
        self.categories: list[str] = []
        self.notes: dict[str, Any] = {}

    def count(self, note: str, by: int = 1) -> None:
        """Add to a note's count; nothing for 0."""
        if by:
            self.notes[note] = self.notes.get(note, 0) + by

    def missing(self, note: str, name: str) -> None:
        """Note a missing file or folder: an exact count, and the first names."""
        self.count(note)
        names = self.notes.setdefault(f"{note}_names", [])
        if len(names) < MISSING:
            names.append(name)

    def candidate(self, name: str, text: str, **media: Any) -> int:
        """Find the row of the candidate called ``name``, made if it is new; ``media`` as for ``Protocol.side``."""
        row = self.rows.get(name)
        if row is None:
            row = self.rows[name] = len(self.candidates)
            self.candidates.append(self.protocol.side(text, id=name, **media))
            self.texts.append(text)
        elif self.texts[row] != text:
            self.count("texts_of_one_name_that_differ")
        return row

    def query(
        self,
        text: str,
        correct: Iterable[str],
        *,
        pool: Sequence[int] | None = None,
        gains: Sequence[float] | None = None,
        category: str = "",
        **media: Any,
    ) -> None:
        """Add a query. correct: names; they may belong to candidates that come later."""
        names = list(correct)
        self.queries.append(self.protocol.side(text, id=str(len(self.queries)), **media))
        self.correct.append(names)
        self.gains.append([1.0] * len(names) if gains is None else [float(g) for g in gains])
        self.categories.append(category)
        if self.pools is not None:
            unique = list(dict.fromkeys(pool or ()))
            self.count("repeated_names_in_lists", len(pool or ()) - len(unique))
            self.pools.append(unique)

    def data(self) -> TaskData:
        """Give everything gathered. Raises ValueError where there is no query or no candidate."""
        if not self.queries or not self.candidates:
            raise ValueError(
                f"{len(self.queries)} queries and {len(self.candidates)} candidates; expected some of both"
            )
        correct, gains = [], []
        for i, (names, weights) in enumerate(zip(self.correct, self.gains, strict=True)):
            best: dict[int, float] = {}
            for name, weight in zip(names, weights, strict=True):
                if (row := self.rows.get(name)) is None:
                    self.count("right_names_without_candidate")
                else:
                    best[row] = max(weight, best.get(row, weight))
            correct.append(list(best))
            gains.append(list(best.values()))
            self.count("queries_without_right_candidate", int(not best))
            if self.pools is not None:
                self.count("right_candidates_outside_their_list", len(best.keys() - set(self.pools[i])))
        graded = any(gain != 1.0 for own in gains for gain in own)
        return TaskData(
            self.queries,
            self.candidates,
            list(self.rows),
            correct,
            gains if graded else None,
            self.pools,
            self.categories if any(self.categories) else None,
            self.notes,
        )


def table(name: str) -> Any:
    """One of the JSON tables beside this file."""
    return json.loads(files("rime_fast.eval.suites").joinpath(f"tables/{name}").read_text(encoding="utf-8"))


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN for none."""
    given = list(values)
    return sum(given) / len(given) if given else float("nan")


def group_means(groups: Mapping[str, Sequence[str]], scores: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Average scores by group, as (group, mean of its members' scores) for each group all of whose members have one."""
    for group, members in groups.items():
        if members and all(member in scores for member in members):
            yield group, mean(scores[member] for member in members)
