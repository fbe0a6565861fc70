"""Published training sets as they lie on a disk: their fields to a Pair.

Sets with rewrites: RIME-Train's and UME-R1's. Sets of plain pairs: MMEB-train, colpali_train_set, VisRAG's in-domain
data, LLaVA-Hound's videos. docs/data.md has each schema.
"""

from __future__ import annotations

import os
from typing import Any

from rime_fast.data.archives import MEMBER, has_member
from rime_fast.data.images import ImageRoot, ImageSource
from rime_fast.data.records import Pair, Side, image_list, kind_of, video_source
from rime_fast.data.texts import Problems, parse_assistant, parse_human, text_of, unknown_keys

EMPTY = "this side is empty: no text, no image, no video"


def parse_sft(raw: dict[str, Any], root: ImageRoot, problems: Problems) -> Pair:
    """Read a row of RIME-SFT or UME-R1 SFT: ``{qry, pos}``, each two turns with images or frames beside them."""
    unknown_keys(raw, ("qry", "pos", "dataset_name"), "", problems)
    query, target = (_conversation_side(raw.get(key), key, root, problems) for key in ("qry", "pos"))
    return Pair(query, target, dataset=text_of(raw, "dataset_name", problems) or None)


def _conversation_side(raw: Any, where: str, root: ImageRoot, problems: Problems) -> Side:
    known = ("conversations", "image", "video")
    if not isinstance(raw, dict):
        problems.append((where, f"is {kind_of(raw)}; expected an object with keys {', '.join(known)}"))
        return Side()
    before = len(problems)
    unknown_keys(raw, known, f"{where}.", problems)
    side = Side(
        images=image_list(raw.get("image"), f"{where}.image", root, problems),
        video=video_source(raw.get("video"), f"{where}.video", root, problems),
    )
    values = _two_turns(raw.get("conversations"), f"{where}.conversations", problems)
    if values is None:
        return side
    first, second = (f"{where}.conversations[{i}].value" for i in range(2))
    if values[0] is not None:
        side.text = parse_human(values[0], len(side.images), len(side.videos), first, problems)
    if values[1] is not None:
        side.rewrite = parse_assistant(values[1], second, problems)
    if len(problems) == before and side.empty:
        problems.append((where, "is empty: no text, no image, no video"))
    return side


def _two_turns(turns: Any, at: str, problems: Problems) -> list[str | None] | None:
    """The texts of a human's and a model's turn; None for one that is no text, or in place of both."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        problems.append((at, f"is {kind_of(turns)}; expected a list of two turns"))
        return None
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        problems.append((at, f"has turns from {speakers}; expected ['human', 'gpt']"))
        return None
    values: list[str | None] = []
    for i, turn in enumerate(turns):
        unknown_keys(turn, ("from", "value"), f"{at}[{i}].", problems)
        value = turn.get("value")
        if not isinstance(value, str):
            problems.append((f"{at}[{i}].value", f"is {kind_of(value)}; expected text"))
        values.append(value if isinstance(value, str) else None)
    return values


def parse_rl(raw: dict[str, Any], root: ImageRoot, problems: Problems) -> Pair:
    """Read a row of RIME-RL: flat, without rewrites."""
    known = ("qry_text", "qry_image", "qry_video", "pos_text", "pos_image", "pos_video", "dataset", "solution")
    unknown_keys(raw, known, "", problems)
    sides = []
    for key in ("qry", "pos"):
        before = len(problems)
        side = Side(
            images=image_list(raw.get(f"{key}_image"), f"{key}_image", root, problems),
            video=video_source(raw.get(f"{key}_video"), f"{key}_video", root, problems),
        )
        text = text_of(raw, f"{key}_text", problems)
        side.text = parse_human(text, len(side.images), len(side.videos), f"{key}_text", problems)
        sides.append(side)
        if len(problems) == before and side.empty:
            problems.append((f"{key}_text", EMPTY))
    return Pair(sides[0], sides[1], dataset=text_of(raw, "dataset", problems) or None)


# --- plain pairs -----------------------------------------------------------------------------------------------------


def parse_mmeb(raw: dict[str, Any], root: ImageRoot, problems: Problems) -> Pair:
    """Read a row of MMEB-train: texts with ``<|image_1|>`` in them, image paths, sometimes one hard negative."""
    known = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    unknown_keys(raw, known, "", problems)
    sides = []
    for text_key, image_key in (known[:2], known[2:4], known[4:]):
        path = text_of(raw, image_key, problems)
        zipped = _zipped(path, root) if path else None
        images: list[ImageSource] = [zipped] if zipped else image_list(path, image_key, root, problems)
        text = parse_human(text_of(raw, text_key, problems), len(images), 0, text_key, problems).strip("\n")
        sides.append(Side(text, images))
    for side, where in zip(sides[:2], (known[0], known[2]), strict=True):
        if side.empty and not any(field.startswith(where[:3]) for field, _ in problems):
            problems.append((where, EMPTY))
    return Pair(sides[0], sides[1], [] if sides[2].empty else [sides[2]])


def _zipped(path: str, root: ImageRoot) -> str | None:
    """The place of an image that still lies in ``images_zip/SUBSET.zip``, beside the subset's folder or in it; None
    where the file is there, or no such archive. A member is named by the whole path or by an end of it."""
    if os.path.isabs(path) or os.path.isfile(os.path.join(root.path, path)):
        return None
    parts = os.path.normpath(path).split(os.sep)
    for folder in ("images_zip", os.path.join(os.pardir, "images_zip"), ""):
        for i, part in enumerate(parts[:-1]):
            archive = os.path.abspath(os.path.join(root.path, folder, f"{part}.zip"))
            if part == os.pardir or not os.path.isfile(archive):
                continue
            members = ["/".join(parts[start:]) for start in range(i + 2)]
            try:
                found = next((member for member in members if has_member(archive, member)), None)
            except OSError:
                found = members[0]  # reading it says what is wrong with the archive
            if found is not None:
                return f"{archive}{MEMBER}{found}"
    return None


def parse_colpali(raw: dict[str, Any], root: ImageRoot, problems: Problems) -> Pair:
    """Read a row of vidore/colpali_train_set: a question and the page that answers it."""
    return _text_to_image(raw, "colpali_train_set", root, problems)


def parse_visrag(raw: dict[str, Any], root: ImageRoot, problems: Problems) -> Pair:
    """Read a row of openbmb/VisRAG-Ret-Train-In-domain-data: as above; ``source`` names one of its sets."""
    unknown_keys(raw, ("query", "image", "source"), "", problems)
    return _text_to_image(raw, text_of(raw, "source", problems) or None, root, problems)


def _text_to_image(raw: dict[str, Any], dataset: str | None, root: ImageRoot, problems: Problems) -> Pair:
    before = len(problems)
    query = Side(parse_human(text_of(raw, "query", problems), 0, 0, "query", problems))
    target = Side(images=image_list(raw.get("image"), "image", root, problems))
    if len(problems) == before:
        problems += [(key, EMPTY) for key, side in (("query", query), ("image", target)) if side.empty]
    return Pair(query, target, dataset=dataset)


def parse_llava_hound(raw: dict[str, Any], root: ImageRoot, problems: Problems) -> Pair:
    """Read a row of LLaVA-Hound's instructions: a video (a folder of frames under the image root, or a file) and two
    turns."""
    unknown_keys(raw, ("id", "video", "conversations"), "", problems)
    before = len(problems)
    query = Side(video=video_source(raw.get("video"), "video", root, problems))
    values = _two_turns(raw.get("conversations"), "conversations", problems)
    target = Side()
    if values is not None and None not in values:
        fields = [f"conversations[{i}].value" for i in range(2)]
        query.text = parse_human(values[0] or "", 0, len(query.videos), fields[0], problems).strip("\n")
        target.text = parse_human(values[1] or "", 0, 0, fields[1], problems)
    if len(problems) == before:
        wrong = (("video", not query.videos), ("conversations[1].value", target.empty))
        problems += [(key, EMPTY) for key, empty in wrong if empty]
    return Pair(query, target, id=None if raw.get("id") is None else str(raw["id"]))


def parse_llava_hound_video(raw: dict[str, Any], root: ImageRoot, problems: Problems) -> Pair:
    """Read the same rows the other way round: the description finds the video."""
    pair = parse_llava_hound(raw, root, problems)
    return Pair(pair.target, Side(video=pair.query.video), id=pair.id)
