"""A tiny model, processor and pairs for the trainers' tests; everything is made here, nothing is downloaded."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rime_fast.data.records import Pair, Side
from rime_fast.data.templates import get_template
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer

WORDS = ["red", "blue", "green", "black", "white", "round", "flat", "tall"]
TEMPLATE = get_template("rewrite", instruction="describe", system=None)


def make_pairs(count: int, *, negatives: int = 0, seed: int = 0) -> list[Pair]:
    """Pairs that can be learned: the query's image is shaded by the number the target's text names."""
    rng = np.random.default_rng(seed)

    def answer(kind: int) -> Side:
        words = f"{WORDS[kind % 8]} {kind}"
        return Side(text=words, rewrite=words, id=f"t{kind}")

    pairs = []
    for i in range(count):
        kind = int(rng.integers(40))
        size = (16, 8 + 8 * (i % 2))
        pixels = np.clip(rng.normal(kind * 6, 8, (*size, 3)), 0, 255).astype(np.uint8)
        words = f"{WORDS[kind % 8]} {kind}"
        query = Side(text="which one", images=[Image.fromarray(pixels)], rewrite=words, id=f"q{i}")
        others = [answer((kind + 1 + j) % 40) for j in range(negatives)]
        if others:
            others[-1].rewrite = None if i % 3 == 0 else others[-1].rewrite
        pairs.append(Pair(query, answer(kind), others, id=str(i)))
    return pairs


def make_processor() -> object:
    known = [*WORDS, "which one describe user assistant system <rewrite> </rewrite>"]
    return tiny_processor(tiny_tokenizer([" ".join(known)]))


def make_model(processor: object, family: str = "qwen2_vl", **sizes: object) -> object:
    options = {"hidden": 32, "layers": 2, "vision_hidden": 16, "vision_layers": 2, "init_std": 0.1} | sizes
    return tiny_model(family, tokenizer=processor.tokenizer, **options)


@pytest.fixture
def tiny() -> SimpleNamespace:
    """The builders. A trainer adds tokens to its processor, so each trainer wants a fresh one."""
    return SimpleNamespace(pairs=make_pairs, model=make_model, processor=make_processor, template=TEMPLATE)
