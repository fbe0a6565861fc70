"""Rows of a JSON list or a JSONL file by number: their places in the file are found once, then each is read alone."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from rime_fast.data.cache import cached_array, file_key
from rime_fast.data.records import DataError, Problem
from rime_fast.data.rows import Row, RowSource, decode_line, iter_rows, starts_list

_CHUNK = 1 << 24
_CACHED_FROM = 1 << 22  # bytes of a file whose places are worth keeping
_BLANK = np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8)


class JsonRows(RowSource):
    """The rows of a JSON list or JSONL file by number. spans: [n, 2] int64, first byte of each row and the one after
    its last. Of a JSONL file only the line ends are looked for, so a line may turn out to be no JSON when it is read; a
    list has been decoded whole."""

    def __init__(self, path: str) -> None:
        self.name = path
        # rows are read later: a change of the working directory in between must not matter
        self.path = os.path.abspath(path)
        self.folder = os.path.dirname(self.path)
        self.is_list = starts_list(path)
        size, changed = file_key(path)
        if not self.is_list:
            find = lambda: _line_spans(self.path)  # noqa: E731
            key = ("lines", 1, self.path, size, changed)
            self.spans = cached_array(key, find) if size >= _CACHED_FROM else find()
        else:
            key = ("list", 1, self.path, size, changed)
            try:
                self.spans = cached_array(key, self._list_spans) if size >= _CACHED_FROM else self._list_spans()
            except _BrokenList as broken:
                self.spans, self.problem = broken.spans, broken.problem
        self._counted = (0, 0)
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self.spans)

    def key(self) -> Any:
        return [[self.path, *file_key(self.path)]]

    def read(self, index: int) -> Any:
        value, error = decode_line(self._bytes(index))
        if error:
            raise DataError(Problem(self.name, self.number(index), "", error))
        return value

    def between(self, start: int, stop: int) -> Iterator[Row]:
        number = self.number(start) if start < min(stop, len(self)) else 0
        last = int(self.spans[start, 0]) if number else 0
        for index in range(start, min(stop, len(self))):
            first, end = self.spans[index].tolist()
            raw = self._bytes(index)
            if not self.is_list:
                # lines between two rows are blank, so the newlines of the gap count
                number += self._newlines(last, first) if first - last > 1 else 0
                last = first
            else:
                number = index + 1
            yield Row(number, first, end, *decode_line(raw))

    def number(self, index: int) -> int:
        if self.is_list:
            return index + 1
        at, count = self._counted
        first = int(self.spans[index, 0])
        if first < at:
            at, count = 0, 0
        count += self._newlines(at, first)
        self._counted = (first, count)
        return count + 1

    def sizes(self) -> np.ndarray:
        return (self.spans[:, 1] - self.spans[:, 0]).astype(np.int64)

    def _bytes(self, index: int) -> bytes:
        first, end = self.spans[index].tolist()
        if self._file is None or self._file[0] != os.getpid():
            self._file = os.getpid(), open(self.path, "rb", buffering=0)  # noqa: SIM115 (kept open)
        return os.pread(self._file[1].fileno(), end - first, first)

    def _newlines(self, start: int, stop: int) -> int:
        count = 0
        with open(self.path, "rb") as stream:
            stream.seek(start)
            while start < stop and (read := stream.read(min(_CHUNK, stop - start))):
                count += read.count(b"\n")
                start += len(read)
        return count

    def _list_spans(self) -> np.ndarray:
        spans: list[int] = []
        try:
            for row in iter_rows(self.path):
                spans += (row.start, row.stop)
        except DataError as error:
            (found,) = error.problems
            problem = Problem(self.name, found.row, found.field, found.problem)
            raise _BrokenList(np.array(spans, dtype=np.int64).reshape(-1, 2), problem) from None
        return np.array(spans, dtype=np.int64).reshape(-1, 2)


class _BrokenList(Exception):
    def __init__(self, spans: np.ndarray, problem: Problem) -> None:
        super().__init__(str(problem))
        self.spans, self.problem = spans, problem


def _line_spans(path: str) -> np.ndarray:
    """The lines of a file that are not blank, without a byte order mark."""
    ends = []
    offset, tail = 0, b""
    with open(path, "rb") as stream:
        while read := stream.read(_CHUNK):
            ends.append(np.flatnonzero(np.frombuffer(read, dtype=np.uint8) == ord("\n")) + (offset + 1))
            offset += len(read)
            tail = read[-1:]
        if tail != b"\n":
            ends.append(np.array([offset]))
        stops = np.concatenate(ends)
        starts = np.concatenate([[0], stops[:-1]])
        stream.seek(0)
        if stream.read(3) == codecs.BOM_UTF8:
            starts[0] = 3
        spans = np.stack([starts, stops], axis=1).astype(np.int64)
        blank = []
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        suspects = np.flatnonzero(np.isin(mapped[np.minimum(starts, offset - 1)], _BLANK) | (starts >= stops))
        for index in suspects.tolist():
            first, end = spans[index].tolist()
            if not mapped[first:end].tobytes().strip():
                blank.append(index)
    return np.delete(spans, blank, axis=0) if blank else spans
