"""Map-style datasets of pairs, read row by row when asked for; and the way a trainer opens what its user gave it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from rime_fast.data.check import CheckReport, CheckRules, GoodRows, check_pair, check_rows
from rime_fast.data.formats import detect_format, parse_row
from rime_fast.data.records import DataError, Pair, Problem
from rime_fast.data.rows import iter_rows, read_row


class PairDataset(Dataset[Pair]):
    """Pairs of a file, a list, or any map-style dataset of rows; images stay unopened.

    source: a path in any format of formats.py (only the places of its rows are kept in memory); or a sequence of Pair
    or of rows, such as a list of dicts or a `datasets.Dataset` with the columns of our JSONL (``query``, ``target``,
    ...) or of a published set. image_root: folder of relative image paths (default: the file's own, else the working
    directory). rows: for a file, the byte spans [n, 2] of its rows; else indices [n] to keep (None: all).

    Items raise DataError naming file, row and field when a row is bad. Pickles, so it serves dataloader workers.
    """

    def __init__(
        self,
        source: Any,
        *,
        image_root: str | Path | None = None,
        file_format: str | None = None,
        rows: np.ndarray | None = None,
        name: str = "dataset",
    ) -> None:
        self.file_format = file_format
        self.path: str | None = None
        self.rows = rows
        if isinstance(source, (str, Path)):
            self.name = os.fspath(source)
            # rows and images are read later: a change of the working directory in between must not matter
            self.path = os.path.abspath(source)
            self.root = os.path.abspath(Path(source).parent if image_root is None else image_root)
            if rows is None:
                self.rows = _spans(self.path)
            return
        if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
            kind = type(source).__name__
            raise TypeError(f"{name} is {kind}; expected a path, a list of Pair or a map-style dataset")
        self.source = source
        self.name = name
        self.root = "" if image_root is None else os.fspath(image_root)

    def __len__(self) -> int:
        return len(self.source) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        index = range(len(self))[int(index)]  # negative counts from the end; IndexError beyond
        if self.path is not None:
            assert self.rows is not None
            row = read_row(self.path, int(self.rows[index, 0]), int(self.rows[index, 1]))
        else:
            row = self.source[index if self.rows is None else int(self.rows[index])]
        if isinstance(row, Pair):
            return row
        pair, problems = parse_row(row, root=self.root, file_format=self.file_format)
        if problems:
            number = index if self.rows is None or self.path is not None else int(self.rows[index])
            raise DataError([Problem(self.name, number + 1, where, problem) for where, problem in problems])
        return pair


def _spans(path: str) -> np.ndarray:
    found = GoodRows()
    for row in iter_rows(path):
        if row.error:
            raise DataError(Problem(path, row.number, "", row.error))
        found.append(row.start, row.stop)
    return found.spans()


def open_pairs(
    source: Any,
    *,
    name: str = "dataset",
    rules: CheckRules | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    image_root: str | Path | None = None,
    file_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[PairDataset, CheckReport]:
    """Check everything in ``source`` (see PairDataset), in one pass, and return the good pairs with the report.

    on_bad_row: "stop" raises DataError with the list of every bad row, "skip" leaves them out (the report counts
    them). A source without a good row raises DataError either way. name: what messages call a source without a path.
    """
    if on_bad_row not in ("stop", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; expected 'stop' or 'skip'")
    rules = rules or CheckRules()
    options: dict[str, Any] = {"image_root": image_root, "file_format": file_format}
    if isinstance(source, (str, Path)):
        report = CheckReport(os.fspath(source))
        good = GoodRows()
        for start, stop, _ in check_rows(source, report, rules, progress=progress, **options):
            good.append(start, stop)
        dataset = PairDataset(source, rows=good.spans(), **options)
    else:
        dataset = PairDataset(source, name=name, **options)
        report, kept = _check_items(dataset, rules, progress)
        if len(kept) < len(dataset):
            dataset.rows = np.array(kept, dtype=np.int64)
    whole_file = [problem for problem in report.problems if problem.row == 0]
    if report.problems and (on_bad_row == "stop" or whole_file):
        raise DataError(whole_file or report.problems)
    if not len(dataset):
        raise DataError([*report.problems[:20], Problem(report.file, 0, "", f"none of {report.rows} rows is good")])
    return dataset, report


def _check_items(
    dataset: PairDataset, rules: CheckRules, progress: Callable[[int, int], None] | None
) -> tuple[CheckReport, Sequence[int]]:
    report = CheckReport(dataset.name)
    kept = []
    for i in range(len(dataset)):
        report.rows += 1
        row = dataset.source[i]
        name = "rime-jsonl"
        problems: list[tuple[str, str]] = []
        if isinstance(row, Pair):
            pair = row
        else:
            name = dataset.file_format or detect_format(row) or name
            pair, problems = parse_row(row, root=dataset.root, file_format=dataset.file_format)
        report.formats[name] += 1
        problems = problems or check_pair(pair, rules, name)
        report.problems += [Problem(report.file, i + 1, where, problem) for where, problem in problems]
        if not problems:
            kept.append(i)
        if progress is not None:
            progress(report.rows, 0)
    return report, kept
