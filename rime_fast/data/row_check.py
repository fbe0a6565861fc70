"""What counts as a bad row, before a run trips over it: what no parser can read (formats.py), a missing or broken
image, an empty or missing rewrite (where training needs it), absurd length.

``check_pair`` looks at one pair, ``check_row`` at one row of a source; check.py at whole files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rime_fast.data.formats import FORMATS, detect_format, parse_row
from rime_fast.data.images import MAX_PIXELS, ImageRoot, ImageSource, image_size, load_image
from rime_fast.data.records import DataError, Pair, Problem, Side, kind_of
from rime_fast.data.rows import Row
from rime_fast.data.texts import Problems, reject_unusable_side
from rime_fast.data.video import FrameSampling, Video, load_frames, plan_frames

# [ours] Far above anything a real row holds, far below what would exhaust memory unnoticed.
MAX_CHARACTERS = 200_000
MAX_IMAGES = 64
MAX_FRAMES = 1024
# Stand-ins where nothing measures tokens: characters a token, pixels a token (Qwen2-VL's 28 x 28).
_CHARACTERS, _PIXELS = 4, 784
_SIDE_FIELDS: tuple[tuple[str, Any, str], ...] = (
    ("text", str, "text"),
    ("images", (list, tuple), "a list of images"),
    ("video", (str, list, tuple, type(None)), "a path or a list of frames"),
    ("rewrite", (str, type(None)), "text"),
    ("id", (str, type(None)), "text"),
)


@dataclass(frozen=True)
class CheckRules:
    """What a row must satisfy.

    rewrites: both sides need one (None: unless the format is rime-rl). images: "decode" reads every image whole,
    "head" only as far as its size, "skip" not at all. measure: a function from sides to their lengths in tokens
    (``Collator.measure``), used with max_length. max_pixels: of one image; a larger one is never decoded.
    """

    rewrites: bool | None = None
    images: Literal["decode", "head", "skip"] = "head"
    max_characters: int = MAX_CHARACTERS
    max_images: int = MAX_IMAGES
    max_frames: int = MAX_FRAMES
    max_length: int | None = None
    measure: Callable[[list[Side]], list[int]] | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.images not in ("decode", "head", "skip"):
            raise ValueError(f"images is {self.images!r}; expected 'decode', 'head' or 'skip'")

    def key(self) -> Any:
        """The rules as plain data, for caches; None where ``measure`` cannot say what it depends on."""
        found: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "measure"}
        if self.measure is not None:
            fingerprint = getattr(getattr(self.measure, "__self__", None), "fingerprint", None)
            if fingerprint is None:
                return None
            found["measure"] = fingerprint()
        return found


@dataclass
class CheckReport:
    """What a check found. rows: all rows looked at; of: rows there are, where only a sample was looked at (else
    None). formats: how many rows of each format."""

    file: str
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    of: int | None = None

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
        sample = "" if self.of is None else f", a sample of {self.of}"
        return f"{self.file}: {self.good_rows} of {self.rows} rows are good ({kinds}), {self.bad_rows} bad{sample}"

    def to_json(self) -> dict[str, Any]:
        """Plain data: file, rows, good_rows, bad_rows, formats, problems (a list of file, row, field, problem)."""
        counts = {"file": self.file, "rows": self.rows, "good_rows": self.good_rows, "bad_rows": self.bad_rows}
        return {**counts, "formats": dict(self.formats), "problems": [vars(problem) for problem in self.problems]}


def check_pair(pair: Pair, rules: CheckRules, file_format: str = "rime-jsonl") -> Problems:
    """Say what is wrong with a pair that parsed: (field, problem), fields named as ``file_format`` names them."""
    return weigh_pair(pair, rules, file_format)[0]


def weigh_pair(pair: Pair, rules: CheckRules, file_format: str) -> tuple[Problems, int]:
    """Check a pair and weigh it: (``check_pair``'s problems, its tokens: measured where the rules
    can, else estimated)."""
    layout = FORMATS[file_format]
    needed = rules.rewrites if rules.rewrites is not None else layout.rewrites
    sides = [(layout.query, pair.query, needed)]
    if pair.positives:
        targets = [pair.target, *pair.positives]
        sides += [(_numbered(layout.target, "target", i), side, needed) for i, side in enumerate(targets)]
    else:
        sides.append((layout.target, pair.target, needed))
    sides += [(_numbered(layout.negative, "", i), side, False) for i, side in enumerate(pair.negatives)]
    found: Problems = []
    tokens = 0
    for fields, side, wants_rewrite in sides:
        before = len(found)
        if wants_rewrite and not (side.rewrite or "").strip():
            found.append((fields.rewrite, "empty rewrite" if side.rewrite is not None else "missing rewrite"))
        for where, text in ((fields.text, side.text), (fields.rewrite, side.rewrite or "")):
            if len(text) > rules.max_characters:
                found.append((where, f"{len(text)} characters; more than {rules.max_characters} are absurd"))
        own = (len(side.text) + len(side.rewrite or "")) // _CHARACTERS + _vision(side, fields, rules, found)
        if len(found) == before and rules.measure is not None and rules.max_length is not None:
            own = _measure(side, rules, fields, found, own)
        tokens += own
    return found, tokens


def _numbered(fields: Any, named: str, number: int) -> Any:
    """The fields of one of several sides: ``targets[1].text`` for ``target.text``."""
    several = [text.replace(named, f"{named}s[{number}]", 1) if named else text.format(number) for text in fields]
    return type(fields)(*several)


def _vision(side: Side, fields: Any, rules: CheckRules, found: Problems) -> int:
    """Tokens of images and videos, estimated; 0 where they are not looked at."""
    videos = side.videos
    frames = sum(len(video.source) for video in videos if not isinstance(video.source, str))
    for where, count, most in (
        (fields.images, len(side.images), rules.max_images),
        (fields.video, frames, rules.max_frames),
    ):
        if count > most:
            found.append((where, f"{count} images; more than {most} are absurd"))
            return 0
    if rules.images == "skip":
        return 0
    pixels = 0
    items = [(f"{fields.images}[{i}]", source) for i, source in enumerate(side.images)]
    if side.content is not None:
        places = [i for i, (kind, _) in enumerate(side.content) if kind == "image"]
        start = fields.images.rpartition(".")[0]
        items = [(f"{start}.content[{i}].image", source) for i, source in zip(places, side.images, strict=True)]
    for video in videos:
        if isinstance(video.source, str):
            pixels += _video_problem(video, fields.video, rules, found)
        else:
            items += [(f"{fields.video}[{i}]", source) for i, source in enumerate(video.source)]
    for where, source in items:
        size = _image_problem(source, rules, where, found)
        pixels += size[0] * size[1]
    return pixels // _PIXELS


def _image_problem(source: ImageSource, rules: CheckRules, where: str, found: Problems) -> tuple[int, int]:
    try:
        if rules.images == "decode":
            load_image(source, max_pixels=rules.max_pixels)
        height, width = image_size(source, max_pixels=rules.max_pixels)
    except ValueError as error:
        found.append((where, str(error)))
        return 0, 0
    if max(height, width) > 200 * min(height, width):
        found.append((where, f"image is {width} x {height}; Qwen's resizing takes at most 1 : 200"))
    return height, width


def _video_problem(video: Video, where: str, rules: CheckRules, found: Problems) -> int:
    look = load_frames if rules.images == "decode" else plan_frames
    try:
        frames = look(video, FrameSampling(), max_pixels=rules.max_pixels)
    except ValueError as error:
        found.append((where, str(error)))
        return 0
    return frames.length * frames.size[0] * frames.size[1] // 2  # two frames make one temporal patch


def _measure(side: Side, rules: CheckRules, fields: Any, found: Problems, otherwise: int) -> int:
    assert rules.measure is not None
    assert rules.max_length is not None
    # A side without a rewrite trains as its prompt alone; the stand-in costs a few tokens at most.
    complete = side if side.rewrite else replace(side, rewrite=".")
    where = fields.text.split(".")[0]
    try:
        (tokens,) = rules.measure([complete])
    except ValueError as error:
        found.append((where, str(error)))
        return otherwise
    if tokens > rules.max_length:
        found.append((where, f"{tokens} tokens; max_length is {rules.max_length}"))
    return tokens


def check_row(
    row: Row, rules: CheckRules, root: ImageRoot, file_format: str | None
) -> tuple[str | None, Problems, int, Pair | None]:
    """Check one row of a source: (its format, what is wrong, tokens, the pair)."""
    if row.error:
        return None, [("", row.error)], 0, None
    problems: Problems = []
    if isinstance(row.value, Pair):
        pair, name = row.value, "rime-jsonl"
        if mistyped := _mistyped(pair):
            return name, mistyped, 0, None
        for where, side in _named_sides(pair):
            reject_unusable_side(side, where, problems)
    else:
        pair, problems = parse_row(row.value, root=root, file_format=file_format)
        name = file_format or detect_format(row.value)  # type: ignore[assignment]
    if name is None:
        return None, problems, 0, None
    # Images are looked at even where another field is bad: one pass should tell everything.
    seen = {where for where, _ in problems}
    more, tokens = weigh_pair(pair, rules, name)
    problems += [item for item in more if not any(_covers(where, item[0]) for where in seen)]
    return name, problems, tokens, pair


def _named_sides(pair: Pair) -> list[tuple[str, Side]]:
    """A pair's sides by the names that our own format gives them."""
    answers = [pair.target, *pair.positives]
    named = [("query", pair.query)]
    named += [("target" if not pair.positives else f"targets[{i}]", side) for i, side in enumerate(answers)]
    return named + [(f"negatives[{i}]", side) for i, side in enumerate(pair.negatives)]


def _mistyped(pair: Pair) -> Problems:
    """What no parser could have made: a pair is the caller's own object, and its fields may hold anything."""
    found: Problems = []
    for where, side in _named_sides(pair):
        if not isinstance(side, Side):
            found.append((where, f"is {kind_of(side)}; expected a Side"))
            continue
        for key, kinds, expected in _SIDE_FIELDS:
            if not isinstance(value := getattr(side, key), kinds):
                found.append((f"{where}.{key}", f"is {kind_of(value)}; expected {expected}"))
    return found


def _covers(where: str, other: str) -> bool:
    """Whether a problem at ``where`` makes one at ``other`` a mere consequence."""
    return where == "" or other == where or other.startswith((f"{where}.", f"{where}["))


def visited(pair: Pair) -> set[str]:
    """The folders and archives that the pair's images and videos lie in."""
    found = set()
    for side in (pair.query, pair.target, *pair.positives, *pair.negatives):
        sources: list[Any] = list(side.images)
        for video in side.videos:
            sources += [video.source] if isinstance(video.source, str) else video.source
        for source in sources:
            path = source.get("path") if isinstance(source, dict) and source.get("bytes") is None else source
            if isinstance(path, (str, os.PathLike)) and "://" not in (text := os.fspath(path)):
                found.add(text.split("::")[0] if "::" in text else os.path.dirname(text))
    return found
