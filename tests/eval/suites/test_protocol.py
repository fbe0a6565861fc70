"""Protocols: limits of pictures and frames, and where a picture stands in a prompt."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rime_fast.data.collate import Collator
from rime_fast.data.records import Side
from rime_fast.data.templates import COT_INSTRUCTION, IMAGE, VIDEO, get_template
from rime_fast.eval.suites import PROTOCOLS, get_protocol, suite_template
from rime_fast.model.tiny import FAMILIES, tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

TEXTS = ["find the picture", "a small boat"]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def collator(family: str = "qwen2_vl", **options) -> Collator:
    tokenizer = tiny_tokenizer([get_template("rewrite").render_prompt(Side(text=text)) for text in TEXTS])
    model = tiny_model(family, tokenizer=tokenizer)
    add_embedding_tokens(model, tokenizer)
    return Collator(tiny_processor(tokenizer, patch_size=14, **options), "rewrite", model.config)


def sides(collated: dict, key: str) -> list[tuple[int, int]]:
    return [(h * 14, w * 14) for _, h, w in collated[key]]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("ume-r1", (28, 28), (28, 28)),
        ("ume-r1", (9, 14), (56, 28)),  # 784 pixels at least, the shape kept
        ("vlm2vec", (20, 400), (56, 56)),
        ("vlm2vec", (28, 28), (56, 56)),
        ("plain", (3, 900), (56, 56)),  # thinner than 1 : 200
    ],
)
def test_no_picture_is_refused(name, size, expected):
    made = PROTOCOLS[name].collator(collator(min_pixels=28 * 28, max_pixels=100 * 784))
    side = PROTOCOLS[name].side("<|image_pad|> x", images=[picture(*size)], id="1")
    assert sides(made.collate_prompts([side], "disc"), "image_grids") == [expected]
    assert made.measure([side], "disc") == made.collate_prompts([side], "disc")["lengths"]


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_have_limits_of_their_own(family):
    protocol = get_protocol("ume-r1", video_min_pixels=4 * 784, video_max_pixels=6 * 784)
    made = protocol.collator(collator(family, min_pixels=784, max_pixels=100 * 784))
    side = protocol.side("<|video_pad|> x", video=[picture(28, 28)] * 3, id="1")
    collated = made.collate_prompts([side], "disc")
    assert sides(collated, "video_grids") == [(56, 56)]
    assert made.measure([side], "disc") == collated["lengths"]
    still = protocol.side("<|image_pad|> x", images=[picture(28, 28)], id="1")
    assert sides(made.collate_prompts([still], "disc"), "image_grids") == [(28, 28)]


def test_a_picture_stands_where_its_token_stands():
    base = collator()
    template = PROTOCOLS["vlm2vec"].collator(base).template
    side = Side(text="<|image_pad|>\nfind <|im_end|>\n", images=[picture(8, 8)])
    assert template.render_disc(side).endswith(f"user\n{IMAGE}\nfind < |im_end|>\n\n<disc_emb>\n")
    side = Side(text="see <|video_pad|> here", video=[picture(8, 8)])
    assert f"user\nsee {VIDEO} here\n" in template.render_disc(side)
    assert template.render_disc(Side(text="a")) == base.template.render_disc(Side(text="a"))
    front = PROTOCOLS["ume-r1"].collator(base).template
    assert f"user\n{IMAGE}find < |im_end|>\n<disc_emb>\n" in front.render_disc(
        PROTOCOLS["ume-r1"].side("<|image_pad|>\nfind <|im_end|>\n", images=[picture(8, 8)], id="1")
    )
    assert base.template.special_text == "error"  # the embedder's own is untouched


def test_template_of_the_published_evaluation():
    template = suite_template("ume-r1")
    assert template.instruction == COT_INSTRUCTION.replace(" \n", " ")
    assert template.well_formed == get_template("cot").well_formed
    assert suite_template("rewrite") is get_template("rewrite")
