"""Map-style datasets of pairs, read row by row when asked for; and the way a trainer opens what its user gave it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from rime_fast.data.check import Progress, check_source
from rime_fast.data.formats import known_format, parse_row
from rime_fast.data.images import ImageRoot
from rime_fast.data.records import DataError, Pair, Problem
from rime_fast.data.row_check import CheckReport, CheckRules
from rime_fast.data.sources import open_rows


class PairDataset(Dataset[Pair]):
    """Pairs of a file, a list, or any other source of rows; images stay unopened.

    source: whatever ``open_rows`` opens (of a file only the places of its rows are kept in memory); its rows are Pair,
    or rows of a format of formats.py, such as a `datasets.Dataset` with the columns of our JSONL. image_root: folder of
    relative image paths (default: the file's own, else the working directory); those of a Pair are left as they are.
    allow_outside, allow_urls: see ImageRoot; rows of an object that the caller made may name any path unless
    ``image_root`` is given. rows: indices [n] to keep (None: all). max_rows: of an iterable, how many are read.

    ``tokens``: [len] of each pair, where a check has counted or estimated them, else None. ``hashes``: [len], the
    ``pair_hash`` of each, likewise. ``by_name()``: its parts by the data set that each row names, where a check has
    looked.

    Items raise DataError naming file, row and field when a row is bad. Pickles, so it serves dataloader workers.
    """

    tokens: np.ndarray | None = None
    hashes: np.ndarray | None = None
    _names: tuple[list[str], np.ndarray] | None = None

    def __init__(
        self,
        source: Any,
        *,
        image_root: str | Path | None = None,
        file_format: str | None = None,
        allow_outside: bool = False,
        allow_urls: bool = False,
        rows: np.ndarray | None = None,
        name: str = "dataset",
        max_rows: int | None = None,
    ) -> None:
        known_format(file_format)
        self.file_format = file_format
        self.source = open_rows(source, name=name, max_rows=max_rows)
        if self.source.problem is not None and rows is None:
            raise DataError(self.source.problem)
        self.rows = rows
        self.name = self.source.name
        own = not isinstance(source, (str, os.PathLike)) and image_root is None
        folder = self.source.folder if image_root is None else os.fspath(image_root)
        self.root = ImageRoot(os.path.abspath(folder) if folder else "", allow_outside or own, allow_urls)

    def __len__(self) -> int:
        return len(self.source) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        place = self._place(index)
        row = self.source.read(place)
        if isinstance(row, Pair):
            return row
        pair, problems = parse_row(row, root=self.root, file_format=self.file_format)
        if problems:
            number = self.source.number(place)
            raise DataError([Problem(self.name, number, where, problem) for where, problem in problems])
        return pair

    def _place(self, index: int) -> int:
        index = range(len(self))[int(index)]  # negative counts from the end; IndexError beyond
        return index if self.rows is None else int(self.rows[index])

    def row_number(self, index: int) -> int:
        """What messages call an item's row: counted from 1 in its source, in JSONL the line."""
        return self.source.number(self._place(index))

    def keep(self, chosen: np.ndarray) -> None:
        """Leave only these of the present items, in this order."""
        self.rows = chosen if self.rows is None else self.rows[chosen]
        self.tokens = None if self.tokens is None else self.tokens[chosen]
        self.hashes = None if self.hashes is None else self.hashes[chosen]
        self._names = None if self._names is None else (self._names[0], self._names[1][chosen])

    def by_name(self) -> dict[str, PairDataset]:
        """Split the data into one dataset for each name that the rows give as their data set. Raises ValueError where
        rows give none, or were not looked at (``open_pairs``)."""
        if self._names is None:
            raise ValueError(f"{self.name} was not checked; its rows' data sets are not known")
        names, codes = self._names
        parts = {}
        for code in np.unique(codes).tolist():
            if not names[code]:
                row = self.source.number(int(np.flatnonzero(codes == code)[0]))
                raise ValueError(f"{self.name}, row {row} names no data set")
            parts[names[code]] = copy.copy(self)
            parts[names[code]].keep(np.flatnonzero(codes == code))
        return parts


def open_pairs(
    source: Any,
    *,
    name: str = "dataset",
    rules: CheckRules | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    image_root: str | Path | None = None,
    file_format: str | None = None,
    allow_outside: bool = False,
    allow_urls: bool = False,
    max_rows: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[PairDataset, CheckReport]:
    """Check everything in ``source`` (see PairDataset) and return the good pairs with the report.

    The check is done once per node and kept (check.py). on_bad_row: "stop" raises DataError with the list of every bad
    row, "skip" leaves them out (the report counts them). A source without a good row raises DataError either way.
    name: what messages call a source without a path.
    """
    if on_bad_row not in ("stop", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; expected 'stop' or 'skip'")
    options: dict[str, Any] = {"allow_outside": allow_outside, "allow_urls": allow_urls, "file_format": file_format}
    every = np.zeros(0, dtype=np.int64)  # a list that breaks off is the report's to tell
    dataset = PairDataset(source, name=name, image_root=image_root, rows=every, max_rows=max_rows, **options)
    verdict = check_source(
        dataset.source,
        rules or CheckRules(),
        dataset.root,
        file_format=file_format,
        workers=workers,
        progress=progress,
    )
    report = verdict.report
    whole_file = [problem for problem in report.problems if problem.row == 0]
    if report.problems and (on_bad_row == "stop" or whole_file):
        raise DataError(whole_file or report.problems)
    dataset.rows, dataset.tokens, dataset.hashes = None, verdict.tokens, verdict.hashes
    dataset._names = verdict.names, verdict.dataset
    if len(verdict.bad):
        dataset.keep(np.delete(np.arange(len(dataset.source)), verdict.bad))
    if not len(dataset):
        raise DataError([*report.problems[:20], Problem(report.file, 0, "", f"none of {report.rows} rows is good")])
    return dataset, report
