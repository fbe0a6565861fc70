"""The second demo: one figure by two artists, found after a change said in words (``data/emoji.py``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rime_fast.data.digits import Split, Style
from rime_fast.data.emoji import EmojiPairs, change, emoji_retrieval, load_emoji, rewrite
from rime_fast.data.retrieval import RetrievalSet
from rime_fast.demo.task import DIGITS, Task, demo_template, fresh_model
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.tiny import tiny_tokenizer

PATCH = 8
# Tokens of a rewrite like "woman firefighter, dark skin tone" with tags, newline and <gen_emb>; the longest name has
# four more ("in motorized wheelchair", "medium-light").
TERSE_TOKENS = 14


def emoji_task(folder: str | Path) -> Task:
    """Make the task over the packages in ``folder``."""
    emoji = load_emoji(str(folder))
    template = demo_template("rewrite")
    texts = [template.instruction or ""]
    for cell in emoji.cells:
        texts += [f"<rewrite>{rewrite(cell, 'wordy')}</rewrite>", rewrite(cell), rewrite(cell, "vague")]
        texts += [change(other, cell) for other in emoji.cells[:10]]
    tokenizer = tiny_tokenizer(texts)

    def model(seed: int) -> tuple[Any, RimeProcessor]:
        return fresh_model(tokenizer, seed, patch_size=PATCH, mrope_section=(4, 6, 6))

    def rows(size: int, *, seed: int, style: Style, wordy: float, vague: float) -> EmojiPairs:
        return EmojiPairs(emoji, "train", size, seed=seed, wordy=wordy, vague=vague)

    def retrieval(split: Split, size: int, seed: int, style: Style) -> RetrievalSet:
        return emoji_retrieval(emoji, split, size, seed=seed)

    return replace(
        DIGITS,
        title="rime-fast demo: emoji by two artists",
        lead='Each query is a figure from Google\'s emoji and a change in words ("as a man with dark skin tone"); the '
        "target is Twitter's picture of the changed figure, one of all cells. Test pictures, by either artist, are "
        "never trained on; their activities, genders and tones are, in other company. A Qwen2-VL of random weights "
        "learns to write the target's name as its rewrite from a noisy teacher: {vague:.0%} of its rewrites name the "
        "activity alone, {wordy:.0%} are wordy, the rest are whole. Refine-RL then rewards closeness to the targets' "
        "frozen disc embeddings.",
        model=model,
        rows=rows,
        retrieval=retrieval,
        reward=DIGITS.reward | {"length_limit": TERSE_TOKENS},
        max_new_tokens={"rewrite": 26},
    )
