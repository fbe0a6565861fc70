"""The demo's parts: a Qwen2-VL of about a million random weights, its tokenizer, its templates.

Everything is made here from nothing, with transformers' own classes; sizes and settings were chosen on the training
and validation scans of ``data/digits.py`` (docs/demo.md tells how), never on the test scans.
"""

from __future__ import annotations

from typing import Any

import torch

from rime_fast.data.digits import CONTROL_TEXTS, OPERATORS, SIDE, Style, make_chain, query_side, target_side
from rime_fast.data.templates import Template, get_template
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.tiny import tiny_config, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

STYLES: tuple[Style, ...] = ("rewrite", "cot", "control")
# Decoded tokens of the longest well-formed response, with room for a slip: tags, values, newline, <gen_emb>.
MAX_NEW_TOKENS: dict[Style, int] = {"rewrite": 16, "control": 16, "cot": 48}
# A tiny model has no use for a sentence of instructions: one word each.
_INSTRUCTIONS: dict[Style, str] = {"rewrite": "rewrite", "control": "rewrite", "cot": "think"}


def demo_template(style: Style = "rewrite") -> Template:
    """The package's own templates without the system turn and with one word of instruction."""
    name = "cot" if style == "cot" else "rewrite"
    return get_template(name, system=None, instruction=_INSTRUCTIONS[style], end_of_turn="")


def demo_tokenizer() -> Any:
    """A word-level tokenizer in which every digit, operator, tag and word of the demo is one token.

    A digit after a blank is two tokens (the blank, the digit): a digit has one token wherever it stands.
    """
    texts = [*CONTROL_TEXTS, OPERATORS, " and so"]
    for style, template in ((style, demo_template(style)) for style in STYLES):
        sides = [query_side(make_chain("train", 0, 0), style), target_side("00", style)]
        texts += [template.render_prompt(side) + template.render_response(side) for side in sides]
    return tiny_tokenizer(texts)


def demo_model(seed: int) -> tuple[Any, RimeProcessor]:
    """A randomly initialised dual-mode Qwen2-VL (4 layers, width 128, a 2-layer vision tower) and its processor.

    One scan is 2 x 2 patches of 4 pixels, merged into one visual token: an image is five tokens.
    """
    tokenizer = demo_tokenizer()
    config: Any = tiny_config(
        "qwen2_vl",
        vocab_size=-(-(len(tokenizer) + 2) // 64) * 64,
        hidden=128,
        layers=4,
        heads=4,
        kv_heads=4,
        intermediate=512,
        vision_hidden=64,
        vision_layers=2,
        vision_heads=4,
        patch_size=SIDE // 2,
        temporal_patch_size=1,
        max_positions=512,
        # Wider than the published 0.02: that is made for widths in the thousands (0.07 is near 1 / sqrt(128)).
        init_std=0.07,
        tie_word_embeddings=False,
    )
    # Short sequences and a one-row image: low frequencies, and most of them on the axis that tells the scans apart.
    config.text_config.rope_parameters |= {"rope_theta": 100.0, "mrope_section": [0, 0, 16]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = DualModeModel.from_config(config, dtype=torch.float32)
    processor = tiny_processor(tokenizer, patch_size=SIDE // 2, temporal_patch_size=1)
    add_embedding_tokens(model, tokenizer)
    return model, processor
