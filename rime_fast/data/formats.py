"""The formats of training data: which one a row is in, how it becomes a Pair, and back.

FORMATS holds the published sets (published.py, under their own field names) and ours, rime-jsonl; docs/data.md has the
schemas. Every parser collects all that is wrong with its row as (field, problem) and never opens an image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rime_fast.data import published
from rime_fast.data.images import ImageRoot
from rime_fast.data.records import DataError, Pair, Problem, Side, kind_of, side_from_json, side_to_json
from rime_fast.data.sources import open_rows, write_rows
from rime_fast.data.texts import Problems, is_number, reject_unusable_side, text_of, unknown_keys


class Fields(NamedTuple):
    """What messages call the parts of a side."""

    text: str
    rewrite: str
    images: str
    video: str


@dataclass(frozen=True)
class Format:
    """One layout of rows. parse: row, image root, problems -> Pair. query, target, negative: the fields of each side.
    rewrites: whether its rows have them."""

    parse: Callable[[dict[str, Any], ImageRoot, Problems], Pair]
    query: Fields
    target: Fields
    negative: Fields
    rewrites: bool


def _own(side: str) -> Fields:
    return Fields(f"{side}.text", f"{side}.rewrite", f"{side}.images", f"{side}.video")


def _turns(side: str) -> Fields:
    at = f"{side}.conversations"
    return Fields(f"{at}[0].value", f"{at}[1].value", f"{side}.image", f"{side}.video")


def _flat(text: str, image: str, video: str = "video") -> Fields:
    return Fields(text, text, image, video)


def _parse_own(raw: dict[str, Any], root: ImageRoot, problems: Problems) -> Pair:
    known = ("query", "target", "targets", "negatives", "scores", "mined_scores", "id", "dataset")
    unknown_keys(raw, known, "", problems)
    named = {"query": side_from_json(raw.get("query"), "query", root, problems)}
    if raw.get("targets") is None:
        named["target"] = side_from_json(raw.get("target"), "target", root, problems)
        answers = ["target"]
    else:
        if raw.get("target") is not None:
            problems.append(("targets", "given beside `target`; use one of the two"))
        named |= _side_list(raw, "targets", root, problems)
        answers = [name for name in named if name != "query"]
        if not answers:
            problems.append(("targets", "is empty; expected one right answer or more"))
    negatives = _side_list(raw, "negatives", root, problems)
    for where, side in (named | negatives).items():
        reject_unusable_side(side, where, problems)
    identifier = raw.get("id")
    if identifier is not None and (not isinstance(identifier, (str, int)) or isinstance(identifier, bool)):
        problems.append(("id", f"is {kind_of(identifier)}; expected text or a whole number"))
        identifier = None
    sides = [named[name] for name in answers] or [Side()]
    return Pair(
        named["query"],
        sides[0],
        list(negatives.values()),
        None if identifier is None else str(identifier),
        text_of(raw, "dataset", problems) or None,
        sides[1:],
        _scores(raw, "scores", len(negatives), problems),
        _scores(raw, "mined_scores", len(negatives), problems),
    )


def _side_list(raw: dict[str, Any], key: str, root: ImageRoot, problems: Problems) -> dict[str, Side]:
    """name in messages -> side"""
    found = raw.get(key) or []
    if not isinstance(found, (list, tuple)):
        problems.append((key, f"is {kind_of(found)}; expected a list of sides"))
        return {}
    return {f"{key}[{i}]": side_from_json(side, f"{key}[{i}]", root, problems) for i, side in enumerate(found)}


def _scores(raw: dict[str, Any], key: str, negatives: int, problems: Problems) -> list[float] | None:
    found = raw.get(key)
    if found is None:
        return None
    numbers = isinstance(found, (list, tuple)) and all(map(is_number, found))
    if not numbers or len(found) != 1 + negatives:
        shown = f"{len(found)} values" if isinstance(found, (list, tuple)) else kind_of(found)
        expected = f"1 + {negatives} finite numbers, the target's first, then the negatives'"
        problems.append((key, f"is {shown}; expected {expected}"))
        return None
    return [float(x) for x in found]


_SFT = Format(published.parse_sft, _turns("qry"), _turns("pos"), _own("negatives"), True)
_HOUND = ("conversations[0].value", "conversations[1].value")

FORMATS: dict[str, Format] = {
    "rime-sft": _SFT,
    "ume-r1-sft": _SFT,
    "rime-rl": Format(
        published.parse_rl,
        _flat("qry_text", "qry_image", "qry_video"),
        _flat("pos_text", "pos_image", "pos_video"),
        _own("negatives"),
        False,
    ),
    "rime-jsonl": Format(_parse_own, _own("query"), _own("target"), _own("negatives[{0}]"), True),
    "mmeb": Format(
        published.parse_mmeb,
        _flat("qry", "qry_image_path"),
        _flat("pos_text", "pos_image_path"),
        _flat("neg_text", "neg_image_path"),
        False,
    ),
    "colpali": Format(published.parse_colpali, _flat("query", "-"), _flat("-", "image"), _own("-"), False),
    "visrag": Format(published.parse_visrag, _flat("query", "-"), _flat("-", "image"), _own("-"), False),
    "llava-hound": Format(published.parse_llava_hound, _flat(_HOUND[0], "-"), _flat(_HOUND[1], "-"), _own("-"), False),
    "llava-hound-video": Format(
        published.parse_llava_hound_video, _flat(_HOUND[1], "-"), _flat("-", "-"), _own("-"), False
    ),
}


def detect_format(raw: Any) -> str | None:
    """The format of a row by its keys, None if it is none of ours."""
    if not isinstance(raw, dict):
        return None
    if "qry_image_path" in raw or "pos_image_path" in raw:
        return "mmeb"
    if "qry" in raw or "pos" in raw:
        return "ume-r1-sft" if "dataset_name" in raw else "rime-sft"
    if "qry_text" in raw or "pos_text" in raw:
        return "rime-rl"
    if "image_filename" in raw and "query" in raw:
        return "colpali"
    if "image" in raw and "query" in raw and "target" not in raw:
        return "visrag"
    if "conversations" in raw and "video" in raw:
        return "llava-hound"
    return "rime-jsonl" if "query" in raw or "target" in raw else None


def parse_row(raw: Any, *, root: str | Path | ImageRoot = "", file_format: str | None = None) -> tuple[Pair, Problems]:
    """Read one decoded row as a Pair, and say what is wrong with it: (field, problem) for each find.

    ``root``: what relative image paths start from (a folder confines nothing; see ImageRoot). ``file_format``: one of
    FORMATS, None to detect it.
    """
    problems: Problems = []
    name = file_format or detect_format(raw)
    known_format(name)
    if name is None or not isinstance(raw, dict):
        keys = f"an object with keys {sorted(map(str, raw))}" if isinstance(raw, dict) else kind_of(raw)
        problems.append(("", f"is {keys}; expected a row of {', '.join(FORMATS)}"))
        return Pair(Side(), Side()), problems
    place = root if isinstance(root, ImageRoot) else ImageRoot(os.fspath(root), outside=True)
    return FORMATS[name].parse(raw, place, problems), problems


def known_format(name: str | None) -> None:
    """Refuse a name that is none of FORMATS by a ValueError."""
    if name is not None and name not in FORMATS:
        raise ValueError(f"file_format is {name!r}; expected one of {', '.join(FORMATS)}")


def read_pairs(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    file_format: str | None = None,
    allow_outside: bool = False,
    allow_urls: bool = False,
) -> Iterator[Pair]:
    """Stream the pairs of any file that ``open_rows`` opens, in any of FORMATS. Raises DataError at the first bad row.

    ``image_root``: folder of relative image paths (default: the file's own). ``allow_outside``, ``allow_urls``: see
    ImageRoot.
    """
    rows = open_rows(path)
    root = ImageRoot(rows.folder if image_root is None else os.fspath(image_root), allow_outside, allow_urls)
    if rows.problem is not None:
        raise DataError(rows.problem)
    for row in rows.between(0, len(rows)):
        found: Problems = [("", row.error)] if row.error else []
        if not row.error:
            pair, found = parse_row(row.value, root=root, file_format=file_format)
        if found:
            raise DataError([Problem(rows.name, row.number, field, problem) for field, problem in found])
        yield pair


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as rows of our own, in the form that the path's ending names (see ``write_rows``); images that are
    no paths can be written as Parquet only."""
    parquet = Path(path).suffix == ".parquet"
    write_rows(path, (pair_to_json(pair, open_images=parquet) for pair in pairs))


def pair_to_json(pair: Pair, *, open_images: bool = False) -> dict[str, Any]:
    """Make a row of our own format of a pair. Images must be paths, unless ``open_images`` (they become ``{"bytes",
    "path"}``)."""
    sides = [side_to_json(side, open_images=open_images) for side in (pair.query, pair.target, *pair.positives)]
    raw: dict[str, Any] = {"query": sides[0]}
    raw |= {"targets": sides[1:]} if pair.positives else {"target": sides[1]}
    if pair.negatives:
        raw["negatives"] = [side_to_json(side, open_images=open_images) for side in pair.negatives]
    optional = ("scores", "mined_scores", "id", "dataset")
    return raw | {key: value for key in optional if (value := getattr(pair, key)) is not None}
