"""The validation pass: every bad row by file, row and field, before a run trips over it.

``check_file`` streams a file; ``check_pair`` is the test of one pair, for rows that come from elsewhere. What counts as
bad: what no parser can read (formats.py), a missing or broken image, an empty or missing rewrite (where training needs
it), absurd length.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rime_fast.data.formats import Problems, detect_format, parse_row
from rime_fast.data.records import DataError, ImageSource, Pair, Problem, Side, image_size, load_image
from rime_fast.data.rows import iter_rows

# [ours] Far above anything a real row holds, far below what would exhaust memory unnoticed.
MAX_CHARACTERS = 200_000
MAX_IMAGES = 64
MAX_FRAMES = 1024

# Where the parts of a side stand in each format, for messages.
_OWN = {"text": "{0}.text", "rewrite": "{0}.rewrite", "images": "{0}.images", "video": "{0}.video"}
_SFT = {
    "text": "{0}.conversations[0].value",
    "rewrite": "{0}.conversations[1].value",
    "images": "{0}.image",
    "video": "{0}.video",
}
_RL = {"text": "{0}_text", "rewrite": "{0}_text", "images": "{0}_image", "video": "{0}_video"}
_FIELDS = {"rime-sft": _SFT, "ume-r1-sft": _SFT, "rime-rl": _RL}


@dataclass(frozen=True)
class CheckRules:
    """What a row must satisfy.

    rewrites: both sides need one (None: unless the format is rime-rl). images: "decode" reads every image whole,
    "head" only as far as its size, "skip" not at all. measure: a function from sides to their lengths in tokens
    (``Collator.measure``), used with max_length.
    """

    rewrites: bool | None = None
    images: Literal["decode", "head", "skip"] = "head"
    max_characters: int = MAX_CHARACTERS
    max_images: int = MAX_IMAGES
    max_frames: int = MAX_FRAMES
    max_length: int | None = None
    measure: Callable[[list[Side]], list[int]] | None = None

    def __post_init__(self) -> None:
        if self.images not in ("decode", "head", "skip"):
            raise ValueError(f"images is {self.images!r}; expected 'decode', 'head' or 'skip'")


@dataclass
class CheckReport:
    """What a check found. rows: all rows seen. formats: how many rows of each format."""

    file: str
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)

    @property
    def bad_rows(self) -> int:
        return len({problem.row for problem in self.problems if problem.row})

    @property
    def good_rows(self) -> int:
        return self.rows - self.bad_rows

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_if_bad(self) -> None:
        """Raises DataError with the list of problems, if there are any."""
        if self.problems:
            raise DataError(self.problems)

    def summary(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items())) or "no rows"
        return f"{self.file}: {self.good_rows} of {self.rows} rows are good ({kinds}), {self.bad_rows} bad"

    def to_json(self) -> dict[str, Any]:
        """Plain data: file, rows, good_rows, bad_rows, formats, problems (a list of file, row, field, problem)."""
        counts = {"file": self.file, "rows": self.rows, "good_rows": self.good_rows, "bad_rows": self.bad_rows}
        return {**counts, "formats": dict(self.formats), "problems": [vars(problem) for problem in self.problems]}


def check_pair(pair: Pair, rules: CheckRules, file_format: str = "rime-jsonl") -> Problems:
    """What is wrong with a pair that parsed: (field, problem), fields named as ``file_format`` names them."""
    names = _FIELDS.get(file_format, _OWN)
    ends = ("qry", "pos") if file_format in _FIELDS else ("query", "target")
    needed = rules.rewrites if rules.rewrites is not None else file_format != "rime-rl"
    found: Problems = []
    sides = [(ends[0], pair.query, needed), (ends[1], pair.target, needed)]
    sides += [(f"negatives[{i}]", side, False) for i, side in enumerate(pair.negatives)]
    for prefix, side, wants_rewrite in sides:
        where = {part: name.format(prefix) for part, name in names.items()}
        before = len(found)
        if wants_rewrite and not (side.rewrite or "").strip():
            found.append((where["rewrite"], "empty rewrite" if side.rewrite is not None else "missing rewrite"))
        for part, text in (("text", side.text), ("rewrite", side.rewrite or "")):
            if len(text) > rules.max_characters:
                found.append((where[part], f"{len(text)} characters; more than {rules.max_characters} are absurd"))
        for part, sources, most in (
            ("images", side.images, rules.max_images),
            ("video", side.video or [], rules.max_frames),
        ):
            if len(sources) > most:
                found.append((where[part], f"{len(sources)} images; more than {most} are absurd"))
            elif rules.images != "skip":
                for i, source in enumerate(sources):
                    if problem := _image_problem(source, rules.images == "decode"):
                        found.append((f"{where[part]}[{i}]", problem))
        if len(found) == before and rules.measure is not None and rules.max_length is not None:
            found += _length_problem(side, rules, prefix)
    return found


def _image_problem(source: ImageSource, decode: bool) -> str | None:
    try:
        if decode:
            load_image(source)
        height, width = image_size(source)
    except ValueError as error:
        return str(error)
    if max(height, width) > 200 * min(height, width):
        return f"image is {width} x {height}; Qwen's resizing takes at most 1 : 200"
    return None


def _length_problem(side: Side, rules: CheckRules, prefix: str) -> Problems:
    assert rules.measure is not None
    # A side without a rewrite trains as its prompt alone; the stand-in costs a few tokens at most.
    complete = side if side.rewrite else replace(side, rewrite=".")
    try:
        (tokens,) = rules.measure([complete])
    except ValueError as error:
        return [(prefix, str(error))]
    return [(prefix, f"{tokens} tokens; max_length is {rules.max_length}")] if tokens > (rules.max_length or 0) else []


def check_rows(
    path: str | Path,
    report: CheckReport,
    rules: CheckRules,
    *,
    image_root: str | Path | None = None,
    file_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, int, Any]]:
    """The good rows of a file, one by one, as (first byte, byte after the last, decoded row); ``report`` fills up.

    ``progress`` is called with the number of rows and bytes done, at every row. A file that is no JSON at all adds
    one problem (with row 0) and ends the pass.
    """
    root = Path(path).parent if image_root is None else image_root
    try:
        for row in iter_rows(path):
            report.rows += 1
            found: Problems = [("", row.error)] if row.error else []
            if not found:
                name = file_format or detect_format(row.value)
                pair, found = parse_row(row.value, root=root, file_format=file_format)
                if name is not None:
                    report.formats[name] += 1
                    # Images are looked at even where another field is bad: one pass should tell everything.
                    seen = {where for where, _ in found}
                    more = check_pair(pair, rules, name)
                    found += [item for item in more if not any(_covers(where, item[0]) for where in seen)]
            report.problems += [Problem(report.file, row.number, where, problem) for where, problem in found]
            if not found:
                yield row.start, row.stop, row.value
            if progress is not None:
                progress(report.rows, row.stop)
    except DataError as error:
        report.problems += error.problems


def _covers(where: str, other: str) -> bool:
    """Whether a problem at ``where`` makes one at ``other`` a mere consequence."""
    return where == "" or other == where or other.startswith((f"{where}.", f"{where}["))


def check_file(
    path: str | Path,
    rules: CheckRules | None = None,
    *,
    image_root: str | Path | None = None,
    file_format: str | None = None,
    write_good: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check a training file of any format of formats.py and return the report; nothing is raised for bad data.

    write_good: also write the good rows there, unchanged (JSONL; a list where the name ends in ".json"). Relative
    image paths then still count from ``image_root``, by default the folder of ``path``.
    """
    report = CheckReport(str(path))
    rows = check_rows(
        path, report, rules or CheckRules(), image_root=image_root, file_format=file_format, progress=progress
    )
    if write_good is None:
        for _ in rows:
            pass
        return report
    if Path(write_good).resolve() == Path(path).resolve():
        raise ValueError(f"write_good is {write_good}, the file being checked; expected another name")
    with _replacing(Path(write_good)) as stream:
        as_list = Path(write_good).suffix == ".json"
        stream.write("[\n" if as_list else "")
        for i, (_, _, value) in enumerate(rows):
            stream.write((",\n" if as_list and i else "") + _dumps(value))
            stream.write("" if as_list else "\n")
        stream.write("\n]\n" if as_list else "")
    return report


def _dumps(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or text.encode("utf-8", "ignore").decode() == text else json.dumps(value)


@contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A text file that takes its name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            yield stream
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class GoodRows:
    """Byte spans [n, 2] of rows, collected while a file is checked; grows in blocks."""

    def __init__(self) -> None:
        self._spans = np.empty((1024, 2), dtype=np.int64)
        self.count = 0

    def append(self, start: int, stop: int) -> None:
        if self.count == len(self._spans):
            self._spans = np.concatenate([self._spans, np.empty_like(self._spans)])
        self._spans[self.count] = start, stop
        self.count += 1

    def spans(self) -> np.ndarray:
        return self._spans[: self.count].copy()
