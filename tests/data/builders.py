"""Small things the data tests share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from rime_fast.data.records import Pair, Side
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.tiny import tiny_config, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import DISC_TOKEN, GEN_TOKEN

WORDS = "system You are a helpful assistant user what is in this picture describe red blue cat dog seconds last two"


@lru_cache
def processor(patch_size: int = 4) -> RimeProcessor:
    tokenizer = tiny_tokenizer([WORDS])
    tokenizer.add_tokens([DISC_TOKEN, GEN_TOKEN], special_tokens=True)
    return tiny_processor(tokenizer, patch_size=patch_size)


@lru_cache
def config(family: str = "qwen2_vl", patch_size: int = 4) -> Any:
    return tiny_config(family, vocab_size=320, patch_size=patch_size)


def picture(seed: int, width: int = 16, height: int = 8, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def sample_pairs() -> list[Pair]:
    """Text alone, one image, two images of two sizes, a video of an odd number of frames."""
    return [
        Pair(Side("what is red?", rewrite="a red cat"), Side("cat", rewrite="cat"), id="first"),
        Pair(Side("what is this", [picture(1)], rewrite="blue"), Side("", [picture(2, 8, 8)], rewrite="dog\nred")),
        Pair(
            Side("what\n", [picture(3, 24, 16), picture(4)], rewrite="two"),
            Side("in this", video=[picture(5 + i) for i in range(3)], rewrite="dog", fps=1.5),
        ),
    ]
