"""The records every other module speaks: a side (query or target), a pair, and the errors of data.

A side holds references to its images, not pixels: they are opened when a batch is made (``load_image``).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFile

from rime_fast.data.images import ImageRoot, ImageSource, hash_image, stored_image
from rime_fast.data.images import image_size as image_size
from rime_fast.data.images import load_image as load_image
from rime_fast.data.video import Video, VideoSource, hash_video, is_video_file

# One piece of an interleaved side, in order: ("text", str), ("image", ImageSource) or ("video", Video).
Part = tuple[Literal["text", "image", "video"], Any]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one row. ``row`` counts from 1 (in JSONL: the line number); 0 means the whole file."""

    file: str
    row: int
    field: str
    problem: str

    def __str__(self) -> str:
        where = f"{self.file}, row {self.row}" if self.row else self.file
        return f"{where}, {self.field}: {self.problem}" if self.field else f"{where}: {self.problem}"


class DataError(ValueError):
    """Data that cannot be used; ``problems`` names each file, row and field (empty when made from a message, as a
    DataLoader does with what its workers raise)."""

    def __init__(self, problems: Sequence[Problem] | Problem | str) -> None:
        if isinstance(problems, str):
            self.problems = []
            super().__init__(problems)
            return
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        shown = [str(problem) for problem in self.problems[:20]]
        if len(self.problems) > len(shown):
            shown.append(f"... and {len(self.problems) - len(shown)} more")
        super().__init__("\n".join(shown))

    def __reduce__(self) -> tuple[type[DataError], tuple[Any]]:
        return type(self), (self.problems or str(self),)  # the default would lose the problems


@dataclass
class Side:
    """One query or one target.

    text: the task text, without placeholders for vision. images: sources in order. video: a list of frames, the path
    of a video file or of a folder of frames, or None. rewrite: the plain rewrite (with template ``cot``: the whole
    response before ``<gen_emb>``), None where there is none. fps: frames per second of ``video``, None for the
    collator's default.

    content: where text, images and videos alternate, or there are several videos: the parts in order; ``text`` and
    ``images`` then are those of the parts, and ``video`` is None.
    """

    text: str = ""
    images: list[ImageSource] = field(default_factory=list)
    video: VideoSource | None = None
    rewrite: str | None = None
    id: str | None = None
    fps: float | None = None
    content: list[Part] | None = None

    def __post_init__(self) -> None:
        if self.content is not None:
            self.text = "".join(value for kind, value in self.content if kind == "text")
            self.images = [value for kind, value in self.content if kind == "image"]
            self.video = self.fps = None

    @property
    def videos(self) -> list[Video]:
        """All videos, in order."""
        if self.content is not None:
            return [value for kind, value in self.content if kind == "video"]
        return [Video(self.video, self.fps)] if self.video else []

    @property
    def parts(self) -> list[Part]:
        """Everything that stands in the prompt, in order: ``content``, else images, video, text."""
        if self.content is not None:
            return self.content
        vision: list[Part] = [("image", source) for source in self.images]
        return [*vision, *(("video", video) for video in self.videos), ("text", self.text)]

    @property
    def joined(self) -> list[tuple[int, Part]]:
        """The parts as the prompt shows them, each with its place in ``parts``: texts that meet are one, which stands
        at the first of them, and empty ones are none."""
        found: list[tuple[int, Part]] = []
        for i, (kind, value) in enumerate(self.parts):
            if kind == "text" and found and found[-1][1][0] == "text":
                at, (_, before) = found[-1]
                found[-1] = at, ("text", before + value)
            elif kind != "text" or value:
                found.append((i, (kind, value)))
        return found

    @property
    def empty(self) -> bool:
        return not (self.text or self.images or self.videos)

    @property
    def name(self) -> str:
        """How messages call this side."""
        if self.id is not None:
            return f"side {self.id!r}"
        return f"side with text {self.text[:60]!r}" + (f" and {len(self.images)} image(s)" if self.images else "")


@dataclass
class Pair:
    """A query and its target.

    negatives: explicit hard negatives (other targets). positives: further right answers; ``visit`` trains on one after
    the other. scores: 1 + len(negatives) logits of a teacher, the target's first. mined_scores: in the same order, the
    cosines that the negatives were chosen by. drawn: (set, block of the global batch) where a mixture drew the pair.
    """

    query: Side
    target: Side
    negatives: list[Side] = field(default_factory=list)
    id: str | None = None
    dataset: str | None = None
    positives: list[Side] = field(default_factory=list)
    scores: list[float] | None = None
    mined_scores: list[float] | None = None
    drawn: tuple[int, int] | None = None

    def visit(self, number: int) -> Pair:
        """The pair with its ``number``-th right answer (counted round) as the target. A teacher's score belongs to the
        first, so the others come without."""
        answers = [self.target, *self.positives]
        at = number % len(answers)
        if at == 0:
            return self
        others = answers[:at] + answers[at + 1 :]
        return replace(self, target=answers[at], positives=others, scores=None, mined_scores=None)

    def with_negatives(self, most: int) -> Pair:
        """The pair with at most its first ``most`` hard negatives."""
        if len(self.negatives) <= most:
            return self

        def cut(scores: list[float] | None) -> list[float] | None:
            return None if scores is None else scores[: most + 1]

        kept = self.negatives[:most]
        return replace(self, negatives=kept, scores=cut(self.scores), mined_scores=cut(self.mined_scores))


def stable_hash(side: Side) -> int:
    """A 63-bit number equal for equal items, on every machine and run: of ``id`` where there is one, else of the text
    and the images. Used to mask false negatives, so two different items must not share it: an image counts by its
    bytes or pixels where they are there, else by its path."""
    return content_hash(side) if side.id is None else _number(b"id\0" + side.id.encode("utf-8", "surrogatepass"))


def content_hash(side: Side) -> int:
    """The ``stable_hash`` of a side without its id: equal for equal text, images and videos in the same order, whether
    they are given one by one or as ``content``."""
    digest = hashlib.blake2b(digest_size=8)
    text = side.text.encode("utf-8", "surrogatepass")
    digest.update(f"text {len(text)}\0".encode() + text)
    parts = [part for _, part in side.joined]
    order = [kind for kind, _ in parts]
    if order != sorted(order, key=("image", "video", "text").index) or order.count("text") > 1:
        lengths = [(kind, len(value) if kind == "text" else 0) for kind, value in parts]
        digest.update(f"\0content {lengths}".encode())
    for source in side.images:
        digest.update(b"\0image\0")
        hash_image(source, digest)
    for video in side.videos:
        hash_video(video, digest)
    return int.from_bytes(digest.digest(), "big") >> 1


def pair_hash(pair: Pair) -> int:
    """A 63-bit number that tells a pair from others by everything that training reads of it, cheaply: an image by its
    path, or by its size and a few of its bytes or pixels where they are there; none is decoded."""
    targets = [pair.target, *pair.positives]
    told: list[Any] = [pair.dataset, pair.scores, pair.mined_scores, len(targets)]
    for side in (pair.query, *targets, *pair.negatives):
        parts = [(kind, value if kind == "text" else _glance(value)) for kind, value in side.parts]
        told.append((side.id, side.rewrite, parts))
    return _number(repr(told).encode("utf-8", "surrogatepass"))


def _glance(source: Any) -> Any:
    if isinstance(source, Video):
        found = source.source
        return source.fps, _glance(found) if isinstance(found, str) else [_glance(frame) for frame in found]
    if isinstance(source, dict):
        held = source.get("bytes")
        return (len(held), _number(held[:4096])) if isinstance(held, bytes) else source.get("path")
    if isinstance(source, np.ndarray):
        return str(source.dtype), source.shape, _number(source.reshape(-1)[:4096].tobytes())
    if isinstance(source, ImageFile.ImageFile):  # its pixels may not have been read yet
        return source.mode, source.size, getattr(source, "filename", "")
    if isinstance(source, Image.Image):
        return source.mode, source.size, _number(source.resize((16, 16), Image.Resampling.NEAREST).tobytes())
    return os.fspath(source)


def _number(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


# --- the JSON form of a side (the `rime-jsonl` schema, docs/data.md) -------------------------------------------------

SIDE_KEYS = ("text", "image", "images", "video", "fps", "content", "rewrite", "id")
PART_KEYS = ("text", "image", "video", "fps")


def side_from_json(raw: Any, where: str, root: str | Path | ImageRoot, problems: list[tuple[str, str]]) -> Side:
    """Read one side. Adds (field, problem) to ``problems`` for everything wrong; the side returned is then partial.

    A missing key and null mean the same, so that rows of a `datasets.Dataset` (which fills gaps with null) read alike.
    """
    if not isinstance(raw, dict):
        problems.append((where, f"is {kind_of(raw)}; expected an object with keys {', '.join(SIDE_KEYS)}"))
        return Side()
    before = len(problems)
    for key in raw:
        if key not in SIDE_KEYS:
            problems.append((f"{where}.{key}", f"unknown key; known: {', '.join(SIDE_KEYS)}"))
    if raw.get("image") is not None and raw.get("images") is not None:
        problems.append((f"{where}.images", "given beside `image`; use one of the two"))
    side = Side(
        text=_typed(raw, "text", str, where, problems) or "",
        rewrite=_typed(raw, "rewrite", str, where, problems),
        id=_identifier(raw, where, problems),
        fps=_rate(raw, where, problems),
    )
    key = "image" if raw.get("image") is not None else "images"
    side.images = image_list(raw.get(key), f"{where}.{key}", root, problems)
    side.video = video_source(raw.get("video"), f"{where}.video", root, problems)
    if raw.get("content") is not None:
        if not side.empty or side.fps is not None:
            problems.append((f"{where}.content", "given beside text, images, video or fps; it holds them all"))
        parts = _content(raw["content"], f"{where}.content", root, problems)
        side = Side(rewrite=side.rewrite, id=side.id, content=parts)
    if len(problems) == before and side.empty:
        problems.append((where, "is empty: no text, no image, no video"))
    return side


def _content(raw: Any, where: str, root: str | Path | ImageRoot, problems: list[tuple[str, str]]) -> list[Part]:
    """Interleaved parts: each an object with one of text, image, video (and fps beside a video)."""
    if not isinstance(raw, (list, tuple)):
        problems.append((where, f"is {kind_of(raw)}; expected a list of parts"))
        return []
    parts: list[Part] = []
    for i, entry in enumerate(raw):
        at = f"{where}[{i}]"
        held = [key for key in PART_KEYS[:3] if isinstance(entry, dict) and entry.get(key) is not None]
        if len(held) != 1:
            problems.append((at, "expected an object with one of text, image, video"))
            continue
        problems += [(f"{at}.{key}", f"unknown key; known: {', '.join(PART_KEYS)}") for key in entry.keys() - PART_KEYS]
        (kind,) = held
        if kind != "video" and entry.get("fps") is not None:
            problems.append((f"{at}.fps", "is the rate of a video; there is none here"))
        if kind == "text":
            parts.append(("text", _typed(entry, "text", str, at, problems) or ""))
        elif kind == "image":
            found = image_list(entry["image"], f"{at}.image", root, problems)
            parts += [("image", source) for source in found]
        else:
            source = video_source(entry["video"], f"{at}.video", root, problems)
            if source:
                parts.append(("video", Video(source, _rate(entry, at, problems))))
    return parts


def _rate(raw: dict[str, Any], where: str, problems: list[tuple[str, str]]) -> float | None:
    fps = _typed(raw, "fps", (int, float), where, problems)
    if fps is not None and not 0 < fps <= sys.float_info.max:
        problems.append((f"{where}.fps", f"is {str(fps)[:60]}; expected a positive number of frames per second"))
        return None
    return fps


def image_list(
    raw: Any, where: str, root: str | Path | ImageRoot, problems: list[tuple[str, str]]
) -> list[ImageSource]:
    """Read a source or a list of them as a list; "" and null mean none."""
    sources = raw if isinstance(raw, (list, tuple)) else [raw]
    found: list[ImageSource] = []
    for i, source in enumerate(sources):
        if source is None or (isinstance(source, str) and not source):
            continue
        at = f"{where}[{i}]" if isinstance(raw, (list, tuple)) else where
        if not isinstance(source, (str, os.PathLike, Image.Image, np.ndarray)) and not _is_image_dict(source):
            problems.append((at, f"is {kind_of(source)}; expected the path of an image"))
            continue
        try:
            found.append(_rooted(root).resolve(source))
        except ValueError as error:
            problems.append((at, str(error)))
    return found


def video_source(
    raw: Any, where: str, root: str | Path | ImageRoot, problems: list[tuple[str, str]]
) -> VideoSource | None:
    """Read what a row gives as its video: a list of frames, or a path: of a video file (by its ending), of a folder of
    frames, or of a single frame."""
    if isinstance(raw, (list, tuple)) and len(raw) == 1 and isinstance(raw[0], str) and is_video_file(raw[0]):
        raw = raw[0]
    found = image_list(raw, where, root, problems)
    whole = isinstance(raw, (str, os.PathLike)) and bool(found)
    if whole and (is_video_file(os.fspath(raw)) or not os.path.splitext(os.fspath(raw))[1]):
        return str(found[0])
    return found or None


def _rooted(root: str | Path | ImageRoot) -> ImageRoot:
    return root if isinstance(root, ImageRoot) else ImageRoot(os.fspath(root), outside=True)


def side_to_json(side: Side, *, open_images: bool = False) -> dict[str, Any]:
    """The inverse of ``side_from_json`` for a side whose images are paths. Raises ValueError for open images, unless
    ``open_images``: then each image is ``{"bytes", "path"}``, as `datasets` stores it."""

    def paths(key: str, sources: Sequence[ImageSource]) -> list[Any]:
        if open_images:
            return [stored_image(source) for source in sources]
        if not all(isinstance(source, (str, os.PathLike)) for source in sources):
            raise ValueError(f"{side.name}: {key} holds open images; only paths can be written as JSON")
        return [os.fspath(source) for source in sources]  # type: ignore[arg-type]

    def video(source: VideoSource) -> Any:
        return source if isinstance(source, str) else paths("video", source)

    raw: dict[str, Any] = {}
    if side.content is not None:
        raw["content"] = []
        for kind, value in side.content:
            if kind == "video":
                rate = {} if value.fps is None else {"fps": value.fps}
                raw["content"].append({"video": video(value.source), **rate})
            else:
                raw["content"].append({kind: value if kind == "text" else paths("content", [value])[0]})
    else:
        raw["text"] = side.text
        raw |= {"images": paths("images", side.images)} if side.images else {}
        raw |= {"video": video(side.video)} if side.video else {}
    raw |= {key: value for key in ("rewrite", "id", "fps") if (value := getattr(side, key)) is not None}
    return raw


def _is_image_dict(source: Any) -> bool:
    return isinstance(source, dict) and any(source.get(key) is not None for key in ("bytes", "path"))


def _identifier(raw: dict[str, Any], where: str, problems: list[tuple[str, str]]) -> str | None:
    value = _typed(raw, "id", (str, int), where, problems)
    return None if value is None else str(value)


def _typed(raw: dict[str, Any], key: str, kinds: Any, where: str, problems: list[tuple[str, str]]) -> Any:
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = {str: "text", (str, int): "text or a whole number", (int, float): "a number"}[kinds]
        problems.append((f"{where}.{key}" if where else key, f"is {kind_of(value)}; expected {expected}"))
        return None
    return value


def kind_of(value: Any) -> str:
    """What a decoded JSON value is, in a message's words."""
    names = {str: "text", int: "a number", float: "a number", bool: "true/false", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
