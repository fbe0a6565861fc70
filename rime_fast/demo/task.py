"""What a demo is made of, and the first one: digit scans, a Qwen2-VL of about a million random weights, its words.

Everything is made here from nothing, with transformers' own classes; sizes and settings were chosen on the training
and validation scans of ``data/digits.py`` (docs/demo.md tells how), never on the test scans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rime_fast.data.digits import (
    CONTROL_TEXTS,
    OPERATORS,
    SIDE,
    DigitChains,
    Split,
    Style,
    make_chain,
    query_side,
    retrieval_set,
    target_side,
)
from rime_fast.data.records import Pair
from rime_fast.data.retrieval import RetrievalSet
from rime_fast.data.templates import Template, get_template
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.tiny import tiny_config, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

STYLES: tuple[Style, ...] = ("rewrite", "cot", "control", "trace")
# Tokens of a whole rewrite, tags, newline and <gen_emb> included: what is free of the length penalty.
TERSE_TOKENS = 9
# Decoded tokens of the longest well-formed response, with room for a slip: tags, values, newline, <gen_emb>.
MAX_NEW_TOKENS: dict[Style, int] = {"rewrite": 16, "control": 16, "cot": 48, "trace": 16}
# A tiny model has no use for a sentence of instructions: one word each.
_INSTRUCTIONS: dict[Style, str] = {"rewrite": "rewrite", "control": "rewrite", "cot": "think", "trace": "think"}


class Rows(Protocol):
    """Makes ``size`` training pairs whose rewrites are ``wordy`` and ``vague`` in these shares, else whole."""

    def __call__(self, size: int, *, seed: int, style: Style, wordy: float, vague: float) -> Sequence[Pair]: ...


@dataclass(frozen=True)
class Task:
    """Describes a task as the demo's phases take it.

    title, lead: of the report; ``lead`` has the places {vague} and {wordy} for the teacher's shares. model: from a
    seed. rows: training pairs. retrieval: the evaluation set of a split with that many queries at most. reward:
    fields of ``RefineConfig``. max_new_tokens: of the longest well-formed response, with room for a slip. sft_steps:
    of joint training.
    """

    title: str
    lead: str
    model: Callable[[int], tuple[Any, RimeProcessor]]
    template: Callable[[Style], Template]
    rows: Rows
    retrieval: Callable[[Split, int, int, Style], RetrievalSet]
    reward: dict[str, Any]
    max_new_tokens: dict[Style, int]
    sft_steps: int


def demo_template(style: Style = "rewrite") -> Template:
    """The package's own templates without the system turn and with one word of instruction."""
    name = {"cot": "cot", "trace": "tte"}.get(style, "rewrite")
    return get_template(name, system=None, instruction=_INSTRUCTIONS[style], end_of_turn="")


def demo_tokenizer() -> Any:
    """A word-level tokenizer in which every digit, operator, tag and word of the demo is one token.

    A digit after a blank is two tokens (the blank, the digit): a digit has one token wherever it stands.
    """
    texts = [*CONTROL_TEXTS, OPERATORS, " and so"]
    for style in STYLES[:-1]:  # a trace has no word of its own, and the most frequent words have the first ids
        template = demo_template(style)
        sides = [query_side(make_chain("train", 0, 0), style), target_side("00", style)]
        texts += [template.render_prompt(side) + template.render_response(side) for side in sides]
    return tiny_tokenizer(texts)


def demo_model(seed: int) -> tuple[Any, RimeProcessor]:
    """A randomly initialised dual-mode Qwen2-VL (4 layers, width 128, a 2-layer vision tower) and its processor.

    One scan is 2 x 2 patches of 4 pixels, merged into one visual token: an image is five tokens.
    """
    # A one-row image: most frequencies on the axis that tells the scans apart.
    return fresh_model(demo_tokenizer(), seed, patch_size=SIDE // 2, mrope_section=(0, 0, 16))


def fresh_model(
    tokenizer: Any, seed: int, *, patch_size: int, mrope_section: Iterable[int], vision_hidden: int = 64
) -> tuple[Any, RimeProcessor]:
    """Make a dual-mode Qwen2-VL of about a million random weights for short sequences, and its processor."""
    config: Any = tiny_config(
        "qwen2_vl",
        vocab_size=-(-(len(tokenizer) + 2) // 64) * 64,
        hidden=128,
        layers=4,
        heads=4,
        kv_heads=4,
        intermediate=512,
        vision_hidden=vision_hidden,
        vision_layers=2,
        vision_heads=4,
        patch_size=patch_size,
        temporal_patch_size=1,
        max_positions=512,
        # Wider than the published 0.02: that is made for widths in the thousands (0.07 is near 1 / sqrt(128)).
        init_std=0.07,
        tie_word_embeddings=False,
    )
    config.text_config.rope_parameters |= {"rope_theta": 100.0, "mrope_section": list(mrope_section)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = DualModeModel.from_config(config, dtype=torch.float32)
    processor = tiny_processor(tokenizer, patch_size=patch_size, temporal_patch_size=1)
    add_embedding_tokens(model, tokenizer)
    return model, processor


DIGITS = Task(
    title="rime-fast demo: digit chains",
    lead="Each query is an image of five handwritten digits in a row (scikit-learn's scans; train and test share none) "
    "and four operators. The target is the text of the last two running values modulo 10, one of 100. A Qwen2-VL of "
    "1.3 million random weights learns to write the five values as its rewrite, and to embed before it (disc) and "
    "after it (gen), from a noisy teacher: {vague:.0%} of its rewrites stop after two values, {wordy:.0%} say the "
    "answer twice, the rest are whole. Refine-RL then samples rewrites and rewards closeness to the targets' frozen "
    "disc embeddings: which rewrites retrieve is nowhere in the teacher's data.",
    model=demo_model,
    template=demo_template,
    rows=lambda size, *, seed, style, wordy, vague: DigitChains(
        "train", size, seed=seed, style=style, wordy=wordy, vague=vague
    ),
    retrieval=lambda split, size, seed, style: retrieval_set(split, size, seed=seed, style=style),
    reward={"rank_reward": "hit", "length_weight": 0.2, "length_limit": TERSE_TOKENS},
    max_new_tokens=MAX_NEW_TOKENS,
    sft_steps=1400,
)
