"""What a side is, whatever file it lies in: names by content, for caches and for telling equal items."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rime_fast.data.archives import MEMBER
from rime_fast.data.cache import file_key
from rime_fast.data.formats import detect_format, known_format, pair_to_json, parse_row
from rime_fast.data.images import MAX_PIXELS, ImageRoot, ImageSource, content_digest
from rime_fast.data.records import DataError, Pair, Problem, Side
from rime_fast.data.row_check import CheckRules, check_pair
from rime_fast.data.rows import RowSource
from rime_fast.data.sources import open_rows
from rime_fast.data.video import Video
from rime_fast.prepare.ledger import Ledger

_KEPT_AT_ONCE = 1000


class ImageDigests:
    """Digests of encoded images (``content_digest``). Those of files are remembered, and kept in ``ledger`` (by path,
    size and time of the last change), so that a run that goes on need not read them all again."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self._known: dict[str, str] = {}
        self._ledger, self._new = ledger, list[dict[str, str]]()

    def __call__(self, source: ImageSource) -> str:
        if not isinstance(source, (str, os.PathLike)):
            return content_digest(source)
        name = os.fspath(source)
        if name not in self._known:
            self._known[name] = self._kept(name)
        return self._known[name]

    def _kept(self, name: str) -> str:
        try:
            size, changed = file_key(name.split(MEMBER)[0])
        except OSError:  # a URL, or a file that is missing
            return content_digest(name)
        key = digest([os.path.abspath(name), size, changed])
        if self._ledger is None:
            return content_digest(name)
        if key in self._ledger:
            return self._ledger[key]["digest"]
        found = content_digest(name)
        self._new.append({"key": key, "digest": found})
        if len(self._new) >= _KEPT_AT_ONCE:
            self.keep()
        return found

    def keep(self) -> None:
        """Write what is new to the ledger."""
        if self._ledger is not None and self._new:
            self._ledger.append(self._new[0]["key"], self._new)
            self._new = []

    def video(self, video: Video) -> list[Any]:
        """Digest a video: a file by its bytes, of frames theirs, of a folder the frames' in order of their names."""
        if not isinstance(video.source, str):
            return [video.fps, *map(self, video.source)]
        if not os.path.isdir(video.source):
            return [video.fps, self(video.source)]
        names = sorted(os.listdir(video.source))
        return [video.fps, *(self(os.path.join(video.source, name)) for name in names)]

    def parts(self, side: Side) -> list[list[Any]]:
        """Give the side as plain data, its pictures by their digests. Raises ValueError for a missing file."""
        look: dict[str, Any] = {"text": str, "image": self, "video": self.video}
        return [[kind, look[kind](value)] for _, (kind, value) in side.joined]


def digest(value: Any) -> str:
    """Name plain data: sha256 of its canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def plain(text: str) -> str:
    """Fold a text for comparing: compatibility forms, case and white space folded."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Reading:
    """Reads the rows of a source."""

    rows: RowSource
    root: ImageRoot
    file_format: str | None = None
    max_pixels: int = MAX_PIXELS

    def pair(self, index: int) -> tuple[Pair, Any]:
        """Read the row as a pair, and as it stands. Raises DataError naming file and row."""
        raw = self.rows.read(index)
        if isinstance(raw, Pair):
            return raw, raw
        pair, problems = parse_row(raw, root=self.root, file_format=self.file_format)
        if problems:
            raise self.error(index, *problems)
        return pair, raw

    def error(self, index: int, *problems: tuple[str, str]) -> DataError:
        number = self.rows.number(index)
        return DataError([Problem(self.rows.name, number, field, problem) for field, problem in problems])

    def pairs(self) -> Iterator[tuple[int, Pair | DataError]]:
        """Read every row, or say what is wrong with it. Raises DataError for a list that breaks off."""
        if self.rows.problem is not None:
            raise DataError(self.rows.problem)
        rules = CheckRules(rewrites=False, max_pixels=self.max_pixels)
        for index in range(len(self.rows)):
            try:
                pair, raw = self.pair(index)
                name = self.file_format or (detect_format(raw) if isinstance(raw, dict) else None)
                if problems := check_pair(pair, rules, name or "rime-jsonl"):
                    raise self.error(index, *problems)
                yield index, pair
            except DataError as error:
                yield index, error

    def row(self, pair: Pair, raw: Any, *, parquet: bool) -> dict[str, Any]:
        """Make the pair a row of our own, to change and write. A row of our own stays as it is (in Parquet pictures
        become ``{"bytes", "path"}``); paths of other formats are seen from the image root where they lie in it."""
        own = isinstance(raw, dict) and (self.file_format or detect_format(raw)) == "rime-jsonl"
        if own and not parquet:
            return copy.deepcopy(_present(raw))
        row = pair_to_json(pair, open_images=parquet)
        sides = [row["query"], *row.get("targets", [row.get("target")]), *row.get("negatives", ())]
        for side in sides:
            for holder in (side, *side.get("content", ())):
                for key in ("image", "images", "video"):
                    if key in holder:
                        holder[key] = self._inside(holder[key])
        return row

    def _inside(self, source: Any) -> Any:
        if isinstance(source, list):
            return [self._inside(one) for one in source]
        if isinstance(source, dict):
            return {**source, "path": self._inside(source["path"])}
        home = os.path.join(self.root.path, "")
        return source.removeprefix(home) if isinstance(source, str) and self.root.path else source

    def writable(self, index: int, pair: Pair, output: Path) -> None:
        """Raise DataError where the row holds pictures that a file of JSON cannot."""
        sides = [pair.query, pair.target, *pair.positives, *pair.negatives]
        media = [source for side in sides for source in side.images]
        for video in (video for side in sides for video in side.videos):
            media += [video.source] if isinstance(video.source, str) else video.source
        if output.suffix != ".parquet" and not all(isinstance(one, (str, os.PathLike)) for one in media):
            raise self.error(index, ("", f"holds pictures, which {output.name} cannot; name the output .parquet"))


def open_reading(
    source: Any,
    *,
    image_root: str | None = None,
    file_format: str | None = None,
    allow_outside: bool = False,
    allow_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Reading:
    """Open rows of anything that ``open_rows`` opens, with the image root of ``PairDataset``. max_pixels: of one
    image."""
    known_format(file_format)
    rows = open_rows(source)
    own = not isinstance(source, (str, os.PathLike)) and image_root is None
    folder = rows.folder if image_root is None else os.path.abspath(image_root)
    return Reading(rows, ImageRoot(folder, allow_outside or own, allow_urls), file_format, max_pixels)


def output_path(source: Any, output: str | Path) -> Path:
    """Give the output's path. Raises ValueError where it is the source, a folder or of no known kind."""
    path = Path(output)
    if isinstance(source, (str, os.PathLike)) and path.resolve() == Path(source).resolve():
        raise ValueError(f"output is {path}, the data itself; expected another name")
    if path.is_dir() or path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"output is {path}; expected the name of a .jsonl, .json or .parquet file")
    return path


def refuse_other(output: Path, job: str, overwrite: bool) -> None:
    """Raise ValueError for an output that is there and is not this job's (its report tells), without ``overwrite``."""
    if output.exists() and not overwrite and report_of(output).get("job") != job:
        raise ValueError(f"output is {output}, which is there already and was made otherwise; overwrite replaces it")


def report_path(output: Path) -> Path:
    """Say where the report on an output lies."""
    return output.with_name(f"{output.name}.report.json")


def report_of(output: Path) -> dict[str, Any]:
    """Read the report on an output; {} where there is none."""
    try:
        found = json.loads(report_path(output).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _present(value: Any) -> Any:
    """Without the nulls with which columns fill gaps."""
    if isinstance(value, dict):
        return {key: _present(one) for key, one in value.items() if one is not None}
    return [_present(one) for one in value] if isinstance(value, (list, tuple)) else value
