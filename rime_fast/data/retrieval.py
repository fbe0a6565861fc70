"""Retrieval sets for evaluation: queries, candidates, and which candidates are right."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rime_fast.data.cache import replacing
from rime_fast.data.images import MAX_PIXELS, ImageRoot
from rime_fast.data.records import DataError, Pair, Problem, Side, content_hash, kind_of, side_from_json, side_to_json
from rime_fast.data.row_check import CheckRules, check_pair
from rime_fast.data.rows import iter_rows
from rime_fast.data.sources import dump_row
from rime_fast.data.texts import Problems, is_number, reject_unusable, task_texts, unknown_keys


@dataclass
class RetrievalSet:
    """Queries, candidates, and which of them are right. correct[i]: indices into ``candidates`` that are right for
    query i. pools[i]: the candidates query i is ranked against (None: all of them). gains[i]: relevance of each of
    correct[i] for nDCG (None: 1 each)."""

    queries: list[Side]
    candidates: list[Side]
    correct: list[list[int]]
    pools: list[list[int]] | None = None
    gains: list[list[float]] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for label, given in (("correct", self.correct), ("pools", self.pools), ("gains", self.gains)):
            if given is not None and len(given) != len(self.queries):
                raise ValueError(f"{label} has {len(given)} entries for {len(self.queries)} queries")
        for i, right in enumerate(self.correct):
            if not right:
                raise ValueError(f"correct[{i}] is empty; every query needs a right candidate")
            pool = range(len(self.candidates)) if self.pools is None else set(self.pools[i])
            for label, named in (("correct", right), ("pools", [] if self.pools is None else self.pools[i])):
                if len(set(named)) < len(named):
                    raise ValueError(f"{label}[{i}] names candidate {_twice(named)} twice")
            if lost := [index for index in right if index not in pool]:
                raise ValueError(f"correct[{i}] names candidate {lost[0]}, which is not among its candidates")
            if self.gains is not None and len(self.gains[i]) != len(right):
                raise ValueError(f"gains[{i}] has {len(self.gains[i])} entries for {len(right)} right candidates")

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        image_root: str | Path | None = None,
        allow_outside: bool = False,
        images: Literal["decode", "head", "skip"] = "skip",
        max_pixels: int = MAX_PIXELS,
    ) -> RetrievalSet:
        """Read either form of docs/data.md. Raises DataError naming file, row and field of everything wrong.

        One JSON object ``{"name", "candidates": [side], "queries": [{"query": side, "correct": index or list,
        "candidates": [index], "gains": [number]}]}``; or JSONL (MMEB-style) with one query a line and its candidates
        inline: ``{"query": side, "candidates": [side], "correct": index or list}``. Equal candidates become one.
        allow_outside: see ImageRoot. images: how far each is read here ("head": as far
        as its size, "decode": whole), so that none is missing once embedding has begun. max_pixels: of one image.
        """
        path = Path(path)
        folder = os.fspath(path.parent if image_root is None else image_root)
        root = ImageRoot(folder, allow_outside)
        rows = iter_rows(path)
        whole = _whole_object(path)
        found = _read_inline(rows, path, root) if whole is None else _read_shared(whole, path, root)
        rules = CheckRules(rewrites=False, images=images, max_pixels=max_pixels)
        if problems := list(found.problems(str(path), rules)):
            raise DataError(problems)
        return found.merged()

    def problems(self, file: str, rules: CheckRules) -> Iterator[Problem]:
        """What is wrong with the sides: of query i as row i + 1, of candidates as row 0."""
        sides = [(i + 1, "query", side) for i, side in enumerate(self.queries)]
        sides += [(0, f"candidates[{i}]", side) for i, side in enumerate(self.candidates)]
        for row, name, side in sides:
            found: Problems = []
            for at, text in task_texts(side, name):
                reject_unusable(text, at, found)
            other = check_pair(Pair(side, Side(text="-")), rules)
            found += [(where.replace("query", name, 1), problem) for where, problem in other]
            yield from (Problem(file, row, where, problem) for where, problem in found)

    def merged(self) -> RetrievalSet:
        """The set with equal candidates (by id or by content, and what is equal to an equal one) as one, the first of
        them, so that none of them is a wrong answer for a query whose right answer is another. Of gains the largest
        stays."""
        named: dict[tuple[str, Any], int] = {}
        equal = list(range(len(self.candidates)))  # an earlier equal candidate, else itself

        def first(at: int) -> int:
            while equal[at] != at:
                equal[at] = at = equal[equal[at]]
            return at

        for i, side in enumerate(self.candidates):
            for name in [("content", content_hash(side)), *([("id", side.id)] if side.id is not None else [])]:
                one, other = sorted((first(i), first(named.setdefault(name, i))))
                equal[other] = one
        rows = [i for i, at in enumerate(equal) if i == at]
        if len(rows) == len(self.candidates):
            return self
        place = {row: i for i, row in enumerate(rows)}
        kept, to = [self.candidates[row] for row in rows], [place[first(i)] for i in range(len(equal))]
        correct, gains = [], []
        for i, right in enumerate(self.correct):
            best: dict[int, float] = {}
            for index, gain in zip(right, self.gains[i] if self.gains else [1.0] * len(right), strict=True):
                best[to[index]] = max(gain, best.get(to[index], gain))
            correct.append(list(best))
            gains.append(list(best.values()))
        pools = None if self.pools is None else [list(dict.fromkeys(to[j] for j in pool)) for pool in self.pools]
        return RetrievalSet(self.queries, kept, correct, pools, gains if self.gains else None, self.name)

    def save(self, path: str | Path) -> None:
        """Write the one-object form. Images must be paths."""
        queries: list[dict[str, Any]] = []
        for i, side in enumerate(self.queries):
            entry: dict[str, Any] = {"query": side_to_json(side), "correct": self.correct[i]}
            entry |= {"candidates": self.pools[i]} if self.pools is not None else {}
            entry |= {"gains": self.gains[i]} if self.gains is not None else {}
            queries.append(entry)
        whole = {"name": self.name, "candidates": [side_to_json(side) for side in self.candidates], "queries": queries}
        with replacing(path) as stream:
            stream.write(dump_row(whole))


def is_retrieval_set(path: str | Path) -> bool:
    """Whether a file is in one of the two forms of a retrieval set, by its first row."""
    row = next(iter(iter_rows(path)), None)
    if row is None:
        return False
    if row.error is not None:
        return _whole_object(Path(path)) is not None
    return isinstance(row.value, dict) and bool(row.value.keys() & {"queries", "candidates"})


def count_queries(path: str | Path) -> int:
    """How many queries a file in either form has, good or bad; 0 where it cannot be told."""
    whole = _whole_object(Path(path))
    if whole is not None:
        return len(whole["queries"]) if isinstance(whole["queries"], list) else 0
    try:
        return sum(1 for _ in iter_rows(path))
    except DataError:
        return 0


def _whole_object(path: Path) -> dict[str, Any] | None:
    """The file as one object with ``queries``; None for JSONL and anything else."""
    try:
        whole = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None  # several lines
    return whole if isinstance(whole, dict) and "queries" in whole else None


def _read_shared(whole: dict[str, Any], path: Path, root: ImageRoot) -> RetrievalSet:
    problems: list[Problem] = []

    def take(row: int, found: Problems) -> None:
        problems.extend(Problem(str(path), row, field, problem) for field, problem in found)

    found: Problems = [
        (key, "unknown key; known: name, candidates, queries")
        for key in whole
        if key not in ("name", "candidates", "queries")
    ]
    for key in ("candidates", "queries"):
        if not isinstance(whole.get(key), list) or not whole[key]:
            found.append((key, f"is {kind_of(whole.get(key))}; expected a list that is not empty"))
    take(0, found)
    if problems:
        raise DataError(problems)
    found = []
    candidates = [side_from_json(raw, f"candidates[{i}]", root, found) for i, raw in enumerate(whole["candidates"])]
    take(0, found)
    queries, correct, pools, gains = [], [], [], []
    for i, raw in enumerate(whole["queries"]):
        found = []
        if not isinstance(raw, dict):
            take(i + 1, [("queries", f"is {kind_of(raw)}; expected an object")])
            continue
        known = ("query", "correct", "candidates", "gains")
        unknown_keys(raw, known, "", found)
        queries.append(side_from_json(raw.get("query"), "query", root, found))
        pool = _indices(raw.get("candidates"), len(candidates), "candidates", found) if "candidates" in raw else None
        right = _indices(raw.get("correct"), len(candidates), "correct", found)
        if pool is not None and (lost := set(right) - set(pool)):
            found.append(("correct", f"names candidate {min(lost)}, which is not among this query's candidates"))
        weights = raw.get("gains", [1.0] * len(right))
        numbers = isinstance(weights, list) and all(is_number(gain) and gain >= 0 for gain in weights)
        if not numbers or len(weights) != len(right) or (right and not any(weights)):
            expected = f"expected one number for each of {len(right)} right candidates, >= 0 and not all 0"
            found.append(("gains", f"{expected}; got {str(weights)[:60]}"))
        correct.append(right)
        pools.append(pool)
        gains.append(weights)
        take(i + 1, found)
    if problems:
        raise DataError(problems)
    everything = list(range(len(candidates)))
    return RetrievalSet(
        queries,
        candidates,
        correct,
        None if all(pool is None for pool in pools) else [everything if pool is None else pool for pool in pools],
        gains if any("gains" in raw for raw in whole["queries"]) else None,
        str(whole.get("name") or path.stem),
    )


def _read_inline(rows: Any, path: Path, root: ImageRoot) -> RetrievalSet:
    problems: list[Problem] = []
    queries, correct, pools = [], [], []
    candidates: list[Side] = []
    seen: dict[str, int] = {}
    for row in rows:
        found: Problems = [("", row.error)] if row.error else []
        raw = row.value
        if not found and (not isinstance(raw, dict) or not isinstance(raw.get("candidates"), list)):
            found.append(("candidates", "expected an object with query, candidates (a list of sides) and correct"))
        if not found:
            known = ("query", "candidates", "correct")
            unknown_keys(raw, known, "", found)
            queries.append(side_from_json(raw.get("query"), "query", root, found))
            pool = []
            for i, entry in enumerate(raw["candidates"]):
                key = json.dumps(entry, sort_keys=True)
                if key not in seen:
                    seen[key] = len(candidates)
                    candidates.append(side_from_json(entry, f"candidates[{i}]", root, found))
                pool.append(seen[key])
            right = _indices(raw.get("correct"), len(pool), "correct", found)
            correct.append(list(dict.fromkeys(pool[i] for i in right)))
            pools.append(list(dict.fromkeys(pool)))
        problems.extend(Problem(str(path), row.number, field, problem) for field, problem in found)
    if not problems and not queries:
        problems.append(Problem(str(path), 0, "", "is empty"))
    if problems:
        raise DataError(problems)
    return RetrievalSet(queries, candidates, correct, pools, None, path.stem)


def _indices(raw: Any, limit: int, where: str, problems: Problems) -> list[int]:
    values = raw if isinstance(raw, list) else [raw]
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < limit for v in values):
        problems.append((where, f"is {str(raw)[:60]}; expected indices from 0 to {limit - 1}"))
        return []
    if len(set(values)) < len(values):
        problems.append((where, f"names candidate {_twice(values)} twice"))
    return values


def _twice(values: list[int]) -> int:
    return next(value for i, value in enumerate(values) if value in values[:i])
