"""The file formats of training data: which one a row is in, and how it becomes a Pair.

rime-sft, ume-r1-sft, rime-rl: the published sets' own field names. rime-jsonl: ours (docs/data.md has the schemas).
Every parser collects all that is wrong with its row as (field, problem) and never opens an image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rime_fast.data.records import (
    DataError,
    Pair,
    Problem,
    Side,
    image_list,
    kind_of,
    side_from_json,
    side_to_json,
)
from rime_fast.data.rows import iter_rows
from rime_fast.data.templates import CONTROL
from rime_fast.model.tokens import DISC_TOKEN, GEN_TOKEN, REWRITE_CLOSE, REWRITE_OPEN

Problems = list[tuple[str, str]]

# A placeholder as the published sets write it: `<image>`, a bare Qwen one, MMEB's `<|image_1|>`; and its newline.
_PLACEHOLDER = re.compile(
    r"(?:<\|vision_start\|>)?(?:<(image|video)>|<\|(image|video)_(?:pad|\d+)\|>)(?:<\|vision_end\|>)?\n?"
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def strip_placeholders(text: str, images: int, videos: int, where: str, problems: Problems) -> str:
    """The task text without placeholders; their number must be that of the side's images and videos, or zero."""
    found = [match.group(1) or match.group(2) for match in _PLACEHOLDER.finditer(text)]
    if found:
        for kind, given in (("image", images), ("video", videos)):
            if found.count(kind) != given:
                problems.append((where, f"has {found.count(kind)} {kind} placeholder(s) for {given} {kind}(s)"))
        text = _PLACEHOLDER.sub("", text)
    return text


def parse_assistant(value: str, where: str, problems: Problems) -> str | None:
    """A gpt turn's plain rewrite: without ``<gen_emb>``, which must stand once, at its end, and without the
    ``<rewrite>`` tags, which may be missing. A chain of thought stays as it is."""
    count = value.count(GEN_TOKEN)
    if count != 1:
        problems.append((where, f"{'missing' if not count else f'{count} times'} {GEN_TOKEN}; expected it once"))
        return None
    body, _, after = value.partition(GEN_TOKEN)
    if after.replace("<|im_end|>", "").strip():
        problems.append((where, f"goes on after {GEN_TOKEN}: {after.strip()[:40]!r}"))
    body = body.strip()
    if body.startswith(REWRITE_OPEN) and body.endswith(REWRITE_CLOSE):
        body = body[len(REWRITE_OPEN) : len(body) - len(REWRITE_CLOSE)].strip()
    if not body:
        problems.append((where, "empty rewrite"))
        return None
    _reject_unusable(body, where, problems)
    return body


def parse_human(value: str, images: int, videos: int, where: str, problems: Problems) -> str:
    """A human turn's task text: without placeholders, and cut at ``<disc_emb>`` (what follows is the set's own
    instruction; the template brings its own)."""
    if value.count(DISC_TOKEN) > 1:
        problems.append((where, f"{value.count(DISC_TOKEN)} times {DISC_TOKEN}; expected it once"))
    text, found, _ = value.partition(DISC_TOKEN)
    text = strip_placeholders(text, images, videos, where, problems)
    if found:
        text = text.removesuffix("\n")
    _reject_unusable(text, where, problems)
    return text


def _reject_unusable(text: str, where: str, problems: Problems) -> None:
    if match := CONTROL.search(text):
        problems.append((where, f"holds {match.group()!r}, which the model would take for a control token"))
    if _LONE_SURROGATE.search(text):
        problems.append((where, "holds half a surrogate pair, which is no text"))


def _unknown_keys(raw: dict[str, Any], known: tuple[str, ...], prefix: str, problems: Problems) -> None:
    problems.extend((f"{prefix}{key}", f"unknown key; known: {', '.join(known)}") for key in raw if key not in known)


def _conversation_side(raw: Any, where: str, root: str, problems: Problems) -> Side:
    """One side of RIME-SFT or UME-R1 SFT: two turns, and images or frames beside them."""
    known = ("conversations", "image", "video")
    if not isinstance(raw, dict):
        problems.append((where, f"is {kind_of(raw)}; expected an object with keys {', '.join(known)}"))
        return Side()
    before = len(problems)
    _unknown_keys(raw, known, f"{where}.", problems)
    side = Side(
        images=image_list(raw.get("image"), f"{where}.image", root, problems),
        video=image_list(raw.get("video"), f"{where}.video", root, problems) or None,
    )
    turns = raw.get("conversations")
    at = f"{where}.conversations"
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        problems.append((at, f"is {kind_of(turns)}; expected a list of two turns"))
        return side
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        problems.append((at, f"has turns from {speakers}; expected ['human', 'gpt']"))
        return side
    for i, turn in enumerate(turns):
        field = f"{at}[{i}].value"
        _unknown_keys(turn, ("from", "value"), f"{at}[{i}].", problems)
        if not isinstance(turn.get("value"), str):
            problems.append((field, f"is {kind_of(turn.get('value'))}; expected text"))
        elif i == 0:
            side.text = parse_human(turn["value"], len(side.images), int(bool(side.video)), field, problems)
        else:
            side.rewrite = parse_assistant(turn["value"], field, problems)
    if len(problems) == before and not (side.text or side.images or side.video):
        problems.append((where, "is empty: no text, no image, no video"))
    return side


def _parse_sft(raw: dict[str, Any], root: str, problems: Problems) -> Pair:
    _unknown_keys(raw, ("qry", "pos", "dataset_name"), "", problems)
    query, target = (_conversation_side(raw.get(key), key, root, problems) for key in ("qry", "pos"))
    return Pair(query, target, dataset=_text(raw, "dataset_name", problems) or None)


def _parse_rl(raw: dict[str, Any], root: str, problems: Problems) -> Pair:
    known = ("qry_text", "qry_image", "qry_video", "pos_text", "pos_image", "pos_video", "dataset", "solution")
    _unknown_keys(raw, known, "", problems)
    sides = []
    for key in ("qry", "pos"):
        before = len(problems)
        images = image_list(raw.get(f"{key}_image"), f"{key}_image", root, problems)
        video = image_list(raw.get(f"{key}_video"), f"{key}_video", root, problems) or None
        text = parse_human(_text(raw, f"{key}_text", problems), len(images), int(bool(video)), f"{key}_text", problems)
        sides.append(Side(text=text, images=images, video=video))
        if len(problems) == before and not (text or images or video):
            problems.append((f"{key}_text", "this side is empty: no text, no image, no video"))
    return Pair(sides[0], sides[1], dataset=_text(raw, "dataset", problems) or None)


def _parse_own(raw: dict[str, Any], root: str, problems: Problems) -> Pair:
    _unknown_keys(raw, ("query", "target", "negatives", "id", "dataset"), "", problems)
    query, target = (side_from_json(raw.get(key), key, root, problems) for key in ("query", "target"))
    negatives = raw.get("negatives") or []
    if not isinstance(negatives, list):
        problems.append(("negatives", f"is {kind_of(negatives)}; expected a list of sides"))
        negatives = []
    sides = [side_from_json(side, f"negatives[{i}]", root, problems) for i, side in enumerate(negatives)]
    names = [("query", query), ("target", target), *((f"negatives[{i}]", side) for i, side in enumerate(sides))]
    for where, side in names:
        _reject_unusable(side.text, f"{where}.text", problems)
        if side.rewrite is not None:
            _reject_unusable(side.rewrite, f"{where}.rewrite", problems)
            if not side.rewrite.strip():
                problems.append((f"{where}.rewrite", "empty rewrite"))
    identifier = raw.get("id")
    if identifier is not None and (not isinstance(identifier, (str, int)) or isinstance(identifier, bool)):
        problems.append(("id", f"is {kind_of(identifier)}; expected text or a whole number"))
        identifier = None
    return Pair(
        query, target, sides, None if identifier is None else str(identifier), _text(raw, "dataset", problems) or None
    )


def _text(raw: dict[str, Any], key: str, problems: Problems) -> str:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        problems.append((key, f"is {kind_of(value)}; expected text"))
    return value if isinstance(value, str) else ""


FORMATS: dict[str, Callable[[dict[str, Any], str, Problems], Pair]] = {
    "rime-sft": _parse_sft,
    "ume-r1-sft": _parse_sft,
    "rime-rl": _parse_rl,
    "rime-jsonl": _parse_own,
}


def detect_format(raw: Any) -> str | None:
    """The format of a row by its keys, None if it is none of ours."""
    if not isinstance(raw, dict):
        return None
    if "qry" in raw or "pos" in raw:
        return "ume-r1-sft" if "dataset_name" in raw else "rime-sft"
    if "qry_text" in raw or "pos_text" in raw:
        return "rime-rl"
    return "rime-jsonl" if "query" in raw or "target" in raw else None


def parse_row(raw: Any, *, root: str | Path = "", file_format: str | None = None) -> tuple[Pair, Problems]:
    """One decoded row as a Pair, and what is wrong with it: (field, problem) for each find.

    ``root``: folder that relative image paths start from. ``file_format``: one of FORMATS, None to detect it.
    """
    problems: Problems = []
    name = file_format or detect_format(raw)
    if name is not None and name not in FORMATS:
        raise ValueError(f"file_format is {name!r}; expected one of {', '.join(FORMATS)}")
    if name is None or not isinstance(raw, dict):
        keys = f"an object with keys {sorted(raw)}" if isinstance(raw, dict) else kind_of(raw)
        problems.append(("", f"is {keys}; expected a row of {', '.join(FORMATS)}"))
        return Pair(Side(), Side()), problems
    return FORMATS[name](raw, os.fspath(root), problems), problems


def read_pairs(
    path: str | Path, *, image_root: str | Path | None = None, file_format: str | None = None
) -> Iterator[Pair]:
    """Stream the pairs of a file in any of FORMATS. Raises DataError at the first bad row.

    ``image_root``: folder of relative image paths (default: the file's own).
    """
    root = Path(path).parent if image_root is None else image_root
    for row in iter_rows(path):
        found: Problems = [("", row.error)] if row.error else []
        if not row.error:
            pair, found = parse_row(row.value, root=root, file_format=file_format)
        if found:
            raise DataError([Problem(str(path), row.number, field, problem) for field, problem in found])
        yield pair


def pair_to_json(pair: Pair) -> dict[str, Any]:
    """A row of our own JSONL. Images must be paths."""
    raw: dict[str, Any] = {"query": side_to_json(pair.query), "target": side_to_json(pair.target)}
    if pair.negatives:
        raw["negatives"] = [side_to_json(side) for side in pair.negatives]
    return raw | {key: value for key in ("id", "dataset") if (value := getattr(pair, key)) is not None}
