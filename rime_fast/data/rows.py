"""What a source of rows is, and the rows of a JSON list or a JSONL file one at a time: neither form is ever held whole
in memory. Which of the two a file is, is read from its first character, not its name.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rime_fast.data.records import DataError, Problem

_CHUNK = 1 << 22  # characters read at a time
_BLANK = " \t\r\n\ufeff"


class Row(NamedTuple):
    """One row of a JSON file. number: from 1 (JSONL: the line). start, stop: its bytes in the file. value: the decoded
    row, None with error."""

    number: int
    start: int
    stop: int
    value: Any
    error: str | None = None


class RowSource:
    """Rows by number, as ``open_rows`` gives them. Pickles, so it serves dataloader workers.

    name: what messages call it. folder: what relative image paths start from. problem: what ends the source early, of
    a list that breaks off.
    """

    name: str = "dataset"
    folder: str = ""
    problem: Problem | None = None

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} has no length")

    def read(self, index: int) -> Any:
        """The decoded row (or Pair). Raises DataError where it cannot be read."""
        raise TypeError(f"{type(self).__name__} has no rows")

    def number(self, index: int) -> int:
        """What messages call the row: counted from 1, in JSONL the line."""
        return index + 1

    def between(self, start: int, stop: int) -> Iterator[Row]:
        """Give rows in order; one that cannot be read has an ``error``."""
        for index in range(start, min(stop, len(self))):
            try:
                yield Row(self.number(index), 0, 0, self.read(index))
            except DataError as error:
                yield Row(self.number(index), 0, 0, None, "; ".join(p.problem for p in error.problems) or str(error))

    def sizes(self) -> np.ndarray | None:
        """A measure of each row's length [n] that costs nothing to know; None where there is none."""
        return None

    def locality(self, indices: np.ndarray) -> np.ndarray | None:
        """Say which rows are read together, by a number per row that they share; None where that gains nothing."""
        return None

    def key(self) -> Any:
        """What the rows depend on (files, sizes, times), for caches; None where it cannot be told."""
        return None


def decode_line(text: bytes) -> tuple[Any, str | None]:
    """Decode one line: (value, None) or (None, what is wrong with the line)."""
    try:
        return json.loads(text), None
    except json.JSONDecodeError as broken:
        return None, f"is not JSON: {broken.msg} (column {broken.colno})"
    except UnicodeDecodeError as broken:
        return None, f"is not UTF-8 (byte {broken.start} of the line)"
    except ValueError:  # Python's own limit, of 4,300
        return None, "holds a number of too many digits"
    except RecursionError:
        return None, "is nested too deeply"


def starts_list(path: str | Path) -> bool:
    """Whether the file is one JSON list (else JSONL). Raises DataError for one that is missing, empty or UTF-16."""
    path = Path(path)
    if not path.is_file():
        raise DataError(Problem(str(path), 0, "", "no such file"))
    with path.open("rb") as stream:
        head = stream.read(4096)
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(Problem(str(path), 0, "", "is UTF-16; expected UTF-8"))
        while head and not (rest := head.lstrip(b"\xef\xbb\xbf \t\r\n")):
            head = stream.read(1 << 20)
    if not head:
        raise DataError(Problem(str(path), 0, "", "is empty"))
    return rest.startswith(b"[")


def iter_rows(path: str | Path) -> Iterator[Row]:
    """Read all rows in order. A JSONL line that is no JSON comes as a Row with ``error``; a list that breaks off or
    holds no JSON raises DataError with the line, since nothing after that point can be trusted."""
    path = Path(path)
    return _iter_list(path) if starts_list(path) else _iter_lines(path)


def read_row(path: str | Path, start: int, stop: int) -> Any:
    """Read the row at these bytes, as ``iter_rows`` reported them."""
    with open(path, "rb") as stream:
        stream.seek(start)
        return json.loads(stream.read(stop - start))


def _iter_lines(path: Path) -> Iterator[Row]:
    start = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            stop = start + len(line)
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                value, error = decode_line(text)
                yield Row(number, stop - len(text), stop, value, error)
            start = stop


def _iter_list(path: Path) -> Iterator[Row]:
    """Rows of one big list, decoded from a sliding buffer."""
    decoder = json.JSONDecoder()
    with path.open("r", encoding="utf-8", newline="") as stream:
        buffer, at, done = "", 0, False  # at: where in `buffer` the next thing starts
        offset, lines = 0, 1  # bytes and lines of everything before `buffer`

        def fail(message: str, position: int) -> DataError:
            line = lines + buffer.count("\n", 0, position)
            return DataError(Problem(str(path), 0, f"line {line}", f"is not a JSON list of rows: {message}"))

        def more() -> None:
            nonlocal buffer, at, done, offset, lines
            used, rest = buffer[:at], buffer[at:]
            offset += len(used.encode())
            lines += used.count("\n")
            try:
                # A row longer than the buffer: read as much again, so that the retries stay few.
                fresh = stream.read(max(_CHUNK, len(rest)))
            except UnicodeDecodeError as broken:
                raise fail(f"not UTF-8 ({broken.reason})", len(buffer)) from None
            buffer, at, done = rest + fresh, 0, not fresh

        def skip_blank() -> str:
            nonlocal at
            while True:
                while at < len(buffer) and buffer[at] in _BLANK:
                    at += 1
                if at < len(buffer) or done:
                    return buffer[at : at + 1]
                more()

        skip_blank()
        at += 1  # the opening bracket
        counted, counted_bytes = at, len(buffer[:at].encode())
        number, first = 0, True
        while (sign := skip_blank()) != "]":
            if not first:
                if sign != ",":
                    raise fail("expected a comma or the closing bracket" if sign else "it breaks off", at)
                at += 1
                skip_blank()
            while True:
                try:
                    value, end = decoder.raw_decode(buffer, at)
                    # A number at the very end of the buffer may go on in the next chunk.
                    if end < len(buffer) or done:
                        break
                except json.JSONDecodeError as broken:
                    if done:
                        raise fail(broken.msg, broken.pos) from None
                except ValueError:  # see decode_line
                    raise fail("a number of too many digits", at) from None
                except RecursionError:
                    raise fail("nested too deeply", at) from None
                more()
                counted, counted_bytes = 0, 0
            if at < counted:
                counted, counted_bytes = 0, 0
            number, first = number + 1, False
            start = counted_bytes + len(buffer[counted:at].encode())
            stop = start + len(buffer[at:end].encode())
            counted, counted_bytes, at = end, stop, end
            yield Row(number, offset + start, offset + stop, value)
        at += 1
        if skip_blank():
            raise fail("more follows its closing bracket", at)
