"""Texts of published sets: what stands in them beside the text (placeholders, tags, tokens), and what may not."""

from __future__ import annotations

import re
import sys
from typing import Any

from rime_fast.data.records import Side, kind_of
from rime_fast.data.templates import CONTROL, HALF_SURROGATE, TAGS
from rime_fast.model.token_names import DISC_TOKEN, GEN_TOKEN, REWRITE_CLOSE, REWRITE_OPEN

Problems = list[tuple[str, str]]

# A placeholder as the published sets write it: `<image>`, a bare Qwen one, MMEB's `<|image_1|>`; and its newline.
_PLACEHOLDER = re.compile(
    r"(?:<\|vision_start\|>)?(?:<(image|video)>|<\|(image|video)_(?:pad|\d+)\|>)(?:<\|vision_end\|>)?\n?"
)


def strip_placeholders(text: str, images: int, videos: int, where: str, problems: Problems) -> str:
    """Take the placeholders out of a task text; their number must be that of the side's images and videos, or zero."""
    found = [match.group(1) or match.group(2) for match in _PLACEHOLDER.finditer(text)]
    if found:
        for kind, given in (("image", images), ("video", videos)):
            if found.count(kind) != given:
                problems.append((where, f"has {found.count(kind)} {kind} placeholder(s) for {given} {kind}(s)"))
        text = _PLACEHOLDER.sub("", text)
    return text


def parse_assistant(value: str, where: str, problems: Problems) -> str | None:
    """Read a gpt turn's plain rewrite: without ``<gen_emb>``, which must stand once, at its end, and without the
    ``<rewrite>`` tags, which may be missing. A chain of thought stays as it is."""
    value = plain_lines(value)
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
    reject_unusable_rewrite(body, where, problems)
    return body or None


def parse_human(value: str, images: int, videos: int, where: str, problems: Problems) -> str:
    """Read a human turn's task text: without placeholders, and cut at ``<disc_emb>`` (what follows is the set's own
    instruction; the template brings its own)."""
    value = plain_lines(value)
    if value.count(DISC_TOKEN) > 1:
        problems.append((where, f"{value.count(DISC_TOKEN)} times {DISC_TOKEN}; expected it once"))
    text, found, _ = value.partition(DISC_TOKEN)
    text = strip_placeholders(text, images, videos, where, problems)
    if found:
        text = text.removesuffix("\n")
    reject_unusable(text, where, problems)
    return text


def reject_unusable(text: str, where: str, problems: Problems) -> None:
    if match := CONTROL.search(text):
        problems.append((where, f"holds {match.group()!r}, which the model would take for a control token"))
    reject_half_surrogates(text, where, problems)


def reject_half_surrogates(text: str, where: str, problems: Problems) -> None:
    if HALF_SURROGATE.search(text):
        problems.append((where, "holds half a surrogate pair, which is no text"))


def reject_unusable_rewrite(rewrite: str, where: str, problems: Problems) -> None:
    """Refuse a rewrite that is missing, or that holds a control token or the tags that the template puts around it."""
    reject_unusable(rewrite, where, problems)
    if match := TAGS.search(rewrite):
        problems.append((where, f"holds {match.group()!r}, which would end the rewrite early"))
    if not rewrite.strip():
        problems.append((where, "empty rewrite"))


def task_texts(side: Side, where: str) -> list[tuple[str, str]]:
    """The task texts of a side of ours by the name of their field; of texts that meet in ``content``, the first's."""
    name = f"{where}.text" if side.content is None else f"{where}.content[{{}}].text"
    return [(name.format(i), value) for i, (kind, value) in side.joined if kind == "text"]


def reject_unusable_side(side: Side, where: str, problems: Problems) -> None:
    """Refuse what no text of a side may hold: in its task texts, and in its rewrite where it has one."""
    for at, text in task_texts(side, where):
        reject_unusable(text, at, problems)
    if side.rewrite is not None:
        reject_unusable_rewrite(side.rewrite, f"{where}.rewrite", problems)


def plain_lines(text: str) -> str:
    """A text whose lines all end as on another system (``\\r\\n``, or ``\\r`` alone) with plain newlines: a published
    row is the same text wherever its file was written. One that mixes them means them."""
    if "\r" not in text:
        return text
    if "\n" not in text:
        return text.replace("\r", "\n")
    return text.replace("\r\n", "\n") if text.count("\r\n") == text.count("\n") else text


def text_of(raw: dict[str, Any], key: str, problems: Problems) -> str:
    """A text field, "" where it is missing."""
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        problems.append((key, f"is {kind_of(value)}; expected text"))
    return value if isinstance(value, str) else ""


def is_number(value: Any) -> bool:
    """Whether a decoded value is a number that a float holds, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def unknown_keys(raw: dict[str, Any], known: tuple[str, ...], prefix: str, problems: Problems) -> None:
    """Note keys that a format does not have: a mistyped one would be left out in silence."""
    problems.extend((f"{prefix}{key}", f"unknown key; known: {', '.join(known)}") for key in raw if key not in known)
