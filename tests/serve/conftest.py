"""A tiny trained-like model on disk, and a file of items with pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


def save_model(folder, family="qwen2_vl", latent_tokens=0, **sizes):
    processor = tiny_processor(tiny_tokenizer(["a red blue shoe which one system user assistant rewrite it"]))
    options = {"hidden": 32, "layers": 2, "vision_hidden": 16, "vision_layers": 1, "init_std": 0.1} | sizes
    model = DualModeModel.from_model(tiny_model(family, tokenizer=processor.tokenizer, **options))
    add_embedding_tokens(model, processor.tokenizer, latent_tokens)
    processor.tokenizer.chat_template = CHAT
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def items_file(tmp_path_factory):
    """Text, image (with and without a resize), both, two images."""
    folder = tmp_path_factory.mktemp("items")
    for name, size in (("a.png", (16, 24)), ("b.png", (37, 53)), ("c.png", (100, 30))):
        picture(*size, seed=size[0]).save(folder / name)
    rows = [
        {"text": "a red shoe", "id": "r"},
        {"image": "a.png"},
        {"text": "which one", "image": "b.png"},
        {"text": " blue\n shoe ", "images": ["c.png", "a.png"]},
        {"image": "c.png"},
        {"text": "it"},
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "items.jsonl"
