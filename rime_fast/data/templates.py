"""Prompts: how a side becomes the text of a user turn and an assistant turn, and back.

    <|im_start|>user
    [vision]TASK TEXT
    <disc_emb>
    INSTRUCTION<|im_end|>
    <|im_start|>assistant
    <rewrite>REWRITE</rewrite>
    <gen_emb>

[known] (UME-R1): the user turn, where it ends for an embedding without decoding (after `<disc_emb>` and a newline), the
whole of template ``cot``. [ours]: the assistant turn and the instruction of template ``rewrite``; RIME's own wording
is not published.

Template ``tte`` is Think-Then-Embed's (arXiv 2510.05014): no embedding tokens; the assistant turn is the reasoning
trace, and the embedding (mode "gen") the state of the chat's last token, `<|im_end|>` [known; ours: the wording].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from rime_fast.data.records import Side
from rime_fast.model.token_names import DISC_TOKEN, GEN_TOKEN, LATENT_TOKEN, REWRITE_CLOSE, REWRITE_OPEN

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"

# What splits a rendered text for the tokenizer, and what a user's own text may not hold: anything written like one of
# Qwen's control tokens, the two embedding tokens and the latent tokens.
CONTROL = re.compile(
    rf"<\|[A-Za-z0-9_]+\|>|{re.escape(DISC_TOKEN)}|{re.escape(GEN_TOKEN)}|{LATENT_TOKEN.format('[0-9]+')}"
)
# What no tokenizer takes: JSON may hold it, UTF-8 may not.
HALF_SURROGATE = re.compile("[\ud800-\udfff]")
# What the template puts around a rewrite.
TAGS = re.compile(rf"{re.escape(REWRITE_OPEN)}|{re.escape(REWRITE_CLOSE)}")

# [known] The system turn that the chat templates of Qwen2-VL and Qwen2.5-VL put first (Qwen3-VL's has none).
QWEN_SYSTEM = "You are a helpful assistant."
# [ours]
REWRITE_INSTRUCTION = (
    f"Rewrite the input above as a short text for retrieval between {REWRITE_OPEN} and {REWRITE_CLOSE}, "
    "keeping what identifies its match, then embed it."
)
# [ours] Think-Then-Embed's own prompts differ by task; a set's task text says what is asked for.
TTE_INSTRUCTION = (
    "Represent the input above for retrieval. Think first, in one to three sentences between <think> and </think>: "
    "what tells it from others like it, and what its match must have. Then write one line: Answer: and what it comes "
    "down to."
)
# [known] UME-R1's prompt, to the letter: its checkpoints were trained on it. It names the token itself, so `<gen_emb>`
# also stands in the user turn; the read-out is at the LAST occurrence.
COT_INSTRUCTION = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. \n"
    "First output the thinking process in <think> </think> tags and then summarize the entire input in a word or "
    f"sentence. \nFinally, use the {GEN_TOKEN} tag to represent the entire input."
)


class ParsedResponse(NamedTuple):
    """What a generated response says. rewrite: the text between the tags (best effort where the form is broken).
    format_ok: the form is exact."""

    rewrite: str
    format_ok: bool


@dataclass(frozen=True)
class Template:
    """One way to write a side as a chat. Make one with ``get_template``; a template pickles.

    open, close: what stands around the rewrite in the assistant turn. end_of_turn: what follows ``<gen_emb>`` in
    training ("" ends the sequence there). well_formed: regular expression of a whole response up to ``<gen_emb>``.
    read_out: the token whose state is the generative embedding; generation ends there. with_disc: whether the prompt
    holds a discriminative one.
    filler: the control experiment's hook: this text (or what the function makes of the side) stands in every response
    in place of the side's own rewrite. special_text: what to do with a user's text that looks like a control token.
    """

    name: str
    instruction: str
    open: str
    close: str
    well_formed: str
    end_of_turn: str = ""
    system: str | None = QWEN_SYSTEM
    filler: str | Callable[[Side], str] | None = None
    special_text: Literal["error", "escape"] = "error"
    read_out: str = GEN_TOKEN
    with_disc: bool = True

    def render_vision(self, side: Side) -> str:
        """Write the placeholders of a side's pictures: one per image, then one per video."""
        return IMAGE * len(side.images) + VIDEO * len(side.videos)

    def render_user(self, side: Side) -> str:
        """Write the side's parts in order, with one placeholder an image or video; the collator expands them to their
        token counts."""
        marks = {"image": IMAGE, "video": VIDEO}
        written = [marks.get(kind) or self._user_text(value, "text", side, CONTROL) for _, (kind, value) in side.joined]
        return "".join(written)

    def render_disc(self, side: Side) -> str:
        """Write the shortest text that holds the discriminative embedding: it ends with
        ``<disc_emb>`` and a newline."""
        if not self.with_disc:
            raise ValueError(f"template {self.name!r} has no discriminative embedding; its mode is 'gen'")
        return f"{self._render_input(side)}{DISC_TOKEN}\n"

    def render_prompt(self, side: Side) -> str:
        """Write everything before the assistant's first token."""
        user = self.render_disc(side) if self.with_disc else self._render_input(side)
        return f"{user}{self.instruction}{IM_END}\n{IM_START}assistant\n"

    def _render_input(self, side: Side) -> str:
        system = "" if self.system is None else f"{IM_START}system\n{self.system}{IM_END}\n"
        return f"{system}{IM_START}user\n{self.render_user(side)}\n"

    def render_response(self, side: Side) -> str:
        """Write the assistant turn. Raises ValueError where the side has no rewrite (and the template no filler)."""
        if self.filler is not None:
            rewrite = self.filler if isinstance(self.filler, str) else self.filler(side)
        elif side.rewrite is None or not side.rewrite.strip():
            raise ValueError(f"{side.name}: rewrite is empty; template {self.name!r} needs one to train on")
        else:
            rewrite = side.rewrite
        rewrite = self._user_text(rewrite, "rewrite", side, CONTROL)
        if self.open:
            rewrite = self._user_text(rewrite, "rewrite", side, TAGS)
        if self.read_out != GEN_TOKEN:
            return f"{rewrite}{self.read_out}"
        return f"{self.open}{rewrite}{self.close}\n{GEN_TOKEN}{self.end_of_turn}"

    def parse_response(self, text: str) -> ParsedResponse:
        """Read a generated response, decoded WITH its special tokens. What follows the first ``<gen_emb>``
        (``read_out``) is ignored; without one, format_ok is False."""
        body, found, _ = text.partition(self.read_out)
        format_ok = bool(found) and re.fullmatch(self.well_formed, body, re.DOTALL) is not None
        body = body.removesuffix("\n")
        if self.open:
            _, opened, after = body.partition(self.open)
            body = (after if opened else body).partition(self.close)[0]
        return ParsedResponse(CONTROL.sub("", body).strip() if not format_ok else body, format_ok)

    def _user_text(self, text: str, field: str, side: Side, forbidden: re.Pattern[str]) -> str:
        if HALF_SURROGATE.search(text):
            raise ValueError(f"{side.name}: {field} holds half a surrogate pair, which is no text")
        match = forbidden.search(text)
        if match is None:
            return text
        if self.special_text == "escape":
            return forbidden.sub(_spaced, text)
        raise ValueError(
            f"{side.name}: {field} holds {match.group()!r}, which the model would take for a control token; "
            'remove it, put a blank after its "<", or give the template special_text="escape"'
        )


def escape_control(text: str) -> str:
    """Make ``text`` safe for a tokenizer: a blank after the ``<`` of everything that looks like a control token, ``<
    gen_emb>``."""
    return CONTROL.sub(_spaced, text)


def _spaced(match: re.Match[str]) -> str:
    return f"< {match.group()[1:]}"


_REWRITE = Template(
    name="rewrite",
    instruction=REWRITE_INSTRUCTION,
    open=REWRITE_OPEN,
    close=REWRITE_CLOSE,
    well_formed=rf"{re.escape(REWRITE_OPEN)}(?=.*\S.*{re.escape(REWRITE_CLOSE)})"
    rf"(?:(?!</?rewrite>|<\|[A-Za-z0-9_]+\|>|<disc_emb>).)+{re.escape(REWRITE_CLOSE)}\n",
)
_COT = Template(
    name="cot",
    instruction=COT_INSTRUCTION,
    open="",
    close="",
    well_formed=r"<think>(?:(?!</?think>|<\|[A-Za-z0-9_]+\|>).)+</think>\s*<answer>(?=.*\S)(?:(?!</?think>|<answer>).)+\n",
    end_of_turn=IM_END,
)
_TTE = Template(
    name="tte",
    instruction=TTE_INSTRUCTION,
    open="",
    close="",
    well_formed=r"<think>(?:(?!</?think>|<\|[A-Za-z0-9_]+\|>).)+</think>\s*"
    r"(?=.*\S)(?:(?!</?think>|<\|[A-Za-z0-9_]+\|>).)+",
    read_out=IM_END,
    with_disc=False,
)
TEMPLATES = {template.name: template for template in (_REWRITE, _COT, _TTE)}


def get_template(name: str | Template = "rewrite", **changes: Any) -> Template:
    """The template of that name: ``rewrite`` (default), ``cot`` (UME-R1's chain of thought) or ``tte``
    (Think-Then-Embed's reasoning trace).

    ``changes`` replace fields, for instance ``system=None`` (Qwen3-VL), ``instruction="..."``, ``filler="..."`` or
    ``special_text="escape"``. A Template is taken as it is. Raises ValueError for an unknown name.
    """
    if isinstance(name, str):
        if name not in TEMPLATES:
            raise ValueError(f"template is {name!r}; expected one of {', '.join(TEMPLATES)}")
        name = TEMPLATES[name]
    if (special := changes.get("special_text", "error")) not in ("error", "escape"):
        raise ValueError(f"special_text is {special!r}; expected 'error' or 'escape'")
    return replace(name, **changes) if changes else name
