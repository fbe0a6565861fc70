"""An append-only record of finished work: JSON lines by key, whole batches or nothing, safe against ``kill -9``.

A batch's lines are written in one piece, each with the batch's name and size, and synced. What a process that died left
of a batch is the end of its file: readers do not see it, and the next process that owns the file cuts it off and does
that batch again, whole. So no finished batch is lost, none counts twice. One file a shard; all files of the folder are
read, so the number of shards may change from run to run.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Ledger:
    """Keeps entries of a folder by key (text). name: this process's own file; None only reads.

    Only the places of the entries are held in memory. Raises ValueError for a file that is damaged anywhere but at its
    end, and where another process has the own file open.
    """

    def __init__(self, folder: str | Path, name: str | None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[int, int, int]] = {}  # file, first byte, length
        self._files: list[int] = []
        self._own: int | None = None
        path = None if name is None else self.folder / f"{name}.jsonl"
        if path is not None:
            self._own = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise ValueError(f"{path} is being written by another process; give each its own shard") from None
        try:
            for file in sorted(self.folder.glob("*.jsonl")):
                end = self._read(file)
                if file == path and self._own is not None:
                    os.ftruncate(self._own, end)
                    os.lseek(self._own, end, os.SEEK_SET)
                    self._end, self._number = end, len(self._files) - 1
        except ValueError:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> dict[str, Any]:
        file, start, length = self._places[key]
        return json.loads(os.pread(self._files[file], length, start))

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the files back."""
        for file in [*self._files, *([] if self._own is None else [self._own])]:
            os.close(file)
        self._files, self._own, self._places = [], None, {}

    def append(self, batch: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add a finished batch: entries with a ``key`` each."""
        assert self._own is not None, "this ledger only reads"
        mark = {"batch": batch, "of": len(entries)}
        lines = [(json.dumps({**entry, **mark}) + "\n").encode() for entry in entries]
        whole = memoryview(b"".join(lines))
        while whole:
            whole = whole[os.write(self._own, whole) :]
        os.fsync(self._own)
        for entry, line in zip(entries, lines, strict=True):
            self._places.setdefault(entry["key"], (self._number, self._end, len(line)))
            self._end += len(line)

    def _read(self, path: Path) -> int:
        """Take the file's whole batches; where they end."""
        number, done = len(self._files), 0
        self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        batch: list[tuple[str, int, int]] = []
        name: tuple[str, int] | None = None
        size = os.fstat(self._files[-1]).st_size  # another shard may be writing: what comes later is not read
        for start, line in _lines(path, size):
            entry = _entry(line)
            if entry is None:
                if start + len(line) < size:
                    raise ValueError(f"{path} is damaged at byte {start}; delete it to make its entries again")
                break
            if (entry["batch"], entry["of"]) != name:
                if batch:
                    raise ValueError(f"{path} is damaged at byte {start}; delete it to make its entries again")
                name = entry["batch"], entry["of"]
            batch.append((entry["key"], start, len(line)))
            if len(batch) == entry["of"]:
                for key, first, length in batch:
                    self._places.setdefault(key, (number, first, length))
                batch, name, done = [], None, start + len(line)
        return done


def _lines(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    start = 0
    with path.open("rb") as stream:
        while line := stream.readline(size - start):
            yield start, line
            start += len(line)


def _entry(line: bytes) -> dict[str, Any] | None:
    """None for a line that was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
        return found if {"key", "batch", "of"} <= found.keys() else None
    except (ValueError, AttributeError):
        return None
