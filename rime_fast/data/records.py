"""The records every other module speaks: a side (query or target), a pair, and the errors of data.

A side holds references to its images, not pixels: they are opened when a batch is made (``load_image``).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import numpy as np
from PIL import Image, ImageOps

# A path, an open image, an [H, W, 3] uint8 array, or what `datasets` stores for an undecoded image.
ImageSource = Union[str, "os.PathLike[str]", Image.Image, np.ndarray, dict[str, Any]]

_ORIENTATION = 0x0112  # EXIF tag


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

    text: the task text, without placeholders for vision. images / video: sources in order; ``video`` is a list of
    frames, or None. rewrite: the plain rewrite (with template ``cot``: the whole response before ``<gen_emb>``), None
    where there is none. fps: frames per second of ``video``, None for the collator's default.
    """

    text: str = ""
    images: list[ImageSource] = field(default_factory=list)
    video: list[ImageSource] | None = None
    rewrite: str | None = None
    id: str | None = None
    fps: float | None = None

    @property
    def name(self) -> str:
        """How messages call this side."""
        if self.id is not None:
            return f"side {self.id!r}"
        return f"side with text {self.text[:60]!r}" + (f" and {len(self.images)} image(s)" if self.images else "")


@dataclass
class Pair:
    """A query, its target and, optionally, explicit hard negatives (other targets)."""

    query: Side
    target: Side
    negatives: list[Side] = field(default_factory=list)
    id: str | None = None
    dataset: str | None = None


def load_image(source: ImageSource) -> Image.Image:
    """Open one image, fully read, turned upright where its EXIF says so.

    Raises ValueError naming the source when it is missing, broken or of an unknown kind.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3):
            raise ValueError(f"image array is {source.dtype} {source.shape}; expected uint8 [H, W] or [H, W, 3]")
        return Image.fromarray(source)
    with _opened(source) as image:
        image.load()
        return ImageOps.exif_transpose(image) if "exif" in image.info else image


def image_size(source: ImageSource) -> tuple[int, int]:
    """Height and width of the upright image; of a file only the head is read. Raises as ``load_image``."""
    if isinstance(source, (Image.Image, np.ndarray)):
        image = load_image(source)
        return image.height, image.width
    with _opened(source) as image:
        turned = "exif" in image.info and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The image of a path, or of a dict with bytes or a path; its own errors become ValueErrors with its name."""
    opened, name = source, str(source)
    if isinstance(source, dict):
        name = str(source.get("path") or "image bytes")
        opened = io.BytesIO(source["bytes"]) if source.get("bytes") is not None else source.get("path")
    if not isinstance(opened, (str, os.PathLike, io.BytesIO)) or opened == "":
        raise ValueError(f"image is {type(source).__name__}; expected a path, a PIL image, an array or bytes")
    try:
        with Image.open(opened) as image:
            yield image
    except FileNotFoundError:
        raise ValueError(f"missing image: {name}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"broken image: {name} ({error})") from None


def resolve_image(source: ImageSource, root: str | Path) -> ImageSource:
    """A relative path seen from ``root``; anything else as it is."""
    if isinstance(source, str):
        return source if os.path.isabs(source) else os.path.join(root, source)
    return source


def stable_hash(side: Side) -> int:
    """A 63-bit number equal for equal items, on every machine and run: of ``id`` where there is one, else of the text
    and the images. Used to mask false negatives, so two different items must not share it: an image counts by its
    path, or by its pixels where it has none."""
    digest = hashlib.blake2b(digest_size=8)
    if side.id is not None:
        digest.update(b"id\0" + side.id.encode("utf-8", "surrogatepass"))
        return int.from_bytes(digest.digest(), "big") >> 1
    text = side.text.encode("utf-8", "surrogatepass")
    digest.update(f"text {len(text)}\0".encode() + text)
    for source in (*side.images, *(side.video or ())):
        digest.update(b"\0image\0")
        if isinstance(source, dict):
            source = source.get("path") or load_image(source)
        if isinstance(source, np.ndarray):
            digest.update(f"{source.shape}".encode() + np.ascontiguousarray(source).tobytes())
        elif isinstance(source, Image.Image):
            digest.update(f"{source.mode}{source.size}".encode() + source.tobytes())
        else:
            digest.update(os.fsencode(source))
    return int.from_bytes(digest.digest(), "big") >> 1


# --- the JSON form of a side (the `rime-jsonl` schema, docs/data.md) -------------------------------------------------

SIDE_KEYS = ("text", "image", "images", "video", "fps", "rewrite", "id")


def side_from_json(raw: Any, where: str, root: str | Path, problems: list[tuple[str, str]]) -> Side:
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
        fps=_typed(raw, "fps", (int, float), where, problems),
    )
    key = "image" if raw.get("image") is not None else "images"
    side.images = image_list(raw.get(key), f"{where}.{key}", root, problems)
    side.video = image_list(raw.get("video"), f"{where}.video", root, problems) or None
    if side.fps is not None and not side.fps > 0:
        problems.append((f"{where}.fps", f"is {side.fps}; expected a positive number of frames per second"))
        side.fps = None
    if len(problems) == before and not (side.text or side.images or side.video):
        problems.append((where, "is empty: no text, no image, no video"))
    return side


def image_list(raw: Any, where: str, root: str | Path, problems: list[tuple[str, str]]) -> list[ImageSource]:
    """A source or a list of them; "" and null mean none."""
    sources = raw if isinstance(raw, (list, tuple)) else [raw]
    found: list[ImageSource] = []
    for i, source in enumerate(sources):
        if source is None or (isinstance(source, str) and not source):
            continue
        if not isinstance(source, (str, os.PathLike, Image.Image, np.ndarray)) and not _is_image_dict(source):
            at = f"{where}[{i}]" if isinstance(raw, (list, tuple)) else where
            problems.append((at, f"is {kind_of(source)}; expected the path of an image"))
            continue
        found.append(resolve_image(source, root))
    return found


def side_to_json(side: Side) -> dict[str, Any]:
    """The inverse of ``side_from_json`` for a side whose images are paths. Raises ValueError for open images."""
    raw: dict[str, Any] = {"text": side.text}
    for key, sources in (("images", side.images), ("video", side.video)):
        if sources:
            if not all(isinstance(source, (str, os.PathLike)) for source in sources):
                raise ValueError(f"{side.name}: {key} holds open images; only paths can be written as JSON")
            raw[key] = [os.fspath(source) for source in sources]  # type: ignore[arg-type]
    raw |= {key: value for key in ("rewrite", "id", "fps") if (value := getattr(side, key)) is not None}
    return raw


def _is_image_dict(source: Any) -> bool:
    return isinstance(source, dict) and bool(source.keys() & {"bytes", "path"}) and any(source.values())


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
