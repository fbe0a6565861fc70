"""What a teacher wrote, as a rewrite to train on; or the reason why not."""

from __future__ import annotations

import re
import unicodedata
import zlib

from rime_fast.data.records import Side
from rime_fast.data.templates import CONTROL
from rime_fast.data.texts import Problems, reject_unusable_rewrite
from rime_fast.prepare.content import plain

RULES = 1  # raised when a rule changes: part of every key
MAX_WORDS = 500
MAX_CHARACTERS = 4000  # for scripts that write no blanks
_NAME = 3  # words of a class's name or a short answer, which may stay as it is [ours]

_THINK = re.compile(r"<think>(.*)</think>", re.DOTALL)
_INNER = re.compile(r"<(rewrite|answer)>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"^[\s>*#_-]*(?:final\s+)?(?:answer|summary)\**\s*[:：]\**", re.IGNORECASE | re.MULTILINE)
_TAG = re.compile(r"</?(?:think|answer|rewrite|gen_emb|disc_emb)\b[^>]*>?", re.IGNORECASE)
_TRUTH = re.compile(
    r"ground[ -]?truth|(?:correct|right|given|provided|reference|expected) (?:answer|caption|target|label)"
    r"|target (?:image|picture|text|page)|(?:provided|given) (?:image|picture) of the (?:answer|target)"
    r"|what the search should find|for (?:your )?(?:orientation|reference)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"(?:i['’]?m sorry|i am sorry|sorry,|i (?:can(?:no|['’])t|am unable|am not able|do not have)|as an ai\b"
    r"|unfortunately, i\b)",
    re.IGNORECASE,
)


def read_rewrite(text: str, finish: str, side: Side, truth: str | None, form: str, template: str) -> tuple[str, str]:
    """Read a teacher's text: (rewrite, "") or ("", reason).

    finish: "stop" where the teacher came to an end by itself. truth: the right answer's text where it was shown, else
    None. form: "answer" or "plain" (prompts.yaml). template: "rewrite" keeps the answer alone, "cot" the whole chain in
    UME-R1's form.
    """
    if finish != "stop":
        return "", "not finished" if finish == "length" else finish
    if not text.strip():
        return "", "empty"
    body = text.rpartition("</think>")[2]
    thought = _THINK.search(text)
    if form == "answer":
        inner = list(_INNER.finditer(body))
        marks = list(_ANSWER.finditer(body))
        if inner:
            body = inner[-1].group(2)
        elif marks:
            body = body[marks[-1].end() :]
        elif _REFUSAL.match(plain(body)):
            return "", "refusal"
        else:
            return "", "form"
    if not body.strip():
        return "", "empty"
    rewrite = " ".join(body.split()).strip("*").strip()
    reason = _reason(rewrite, side, truth)
    if reason or template == "rewrite":
        return ("", reason) if reason else (rewrite, "")
    reasoning = " ".join(thought.group(1).split()) if thought else ""
    if not reasoning:
        return "", "form"
    if CONTROL.search(reasoning) or _TAG.search(reasoning):
        return "", "control token"
    if truth is not None and _TRUTH.search(reasoning):
        return "", "talks about the truth"
    return f"<think>{reasoning}</think><answer>{rewrite}</answer>", ""


def _reason(rewrite: str, side: Side, truth: str | None) -> str:
    if not any(sign.isalnum() for sign in rewrite):
        return "empty"
    if len(rewrite.split()) > MAX_WORDS or len(rewrite) > MAX_CHARACTERS:
        return "too long"
    problems: Problems = []
    reject_unusable_rewrite(rewrite, "", problems)
    if problems or _TAG.search(rewrite) or any(unicodedata.category(sign) == "Cc" for sign in rewrite):
        return "control token"
    if _REFUSAL.match(rewrite):
        return "refusal"
    if truth is not None and _TRUTH.search(rewrite):
        return "talks about the truth"
    name = not side.images and not side.videos and len(side.text.split()) <= _NAME
    if plain(rewrite) == plain(side.text) and not name:
        return "copies the input"
    encoded = rewrite.encode()
    if len(encoded) >= 120 and len(zlib.compress(encoded)) < 0.25 * len(encoded):
        return "repeats itself"
    if _foreign(rewrite, f"{side.text} {truth or ''}") > 0.3:
        return "language"
    return ""


def _foreign(text: str, about: str) -> float:
    """Share of the letters in a script that is neither Latin nor in the input."""
    letters = [_script(sign) for sign in text if sign.isalpha()]
    known = {"LATIN", "GREEK"} | {_script(sign) for sign in about if sign.isalpha()}
    if known & {"CJK", "HIRAGANA", "KATAKANA"}:
        known |= {"CJK", "HIRAGANA", "KATAKANA"}
    return sum(script not in known for script in letters) / max(len(letters), 1)


def _script(sign: str) -> str:
    return unicodedata.name(sign, "?").split()[0].split("-")[0]
