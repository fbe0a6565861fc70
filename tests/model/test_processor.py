"""A saved folder holds every part of the family's stock processor, so that stock loaders make the same pixels."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from rime_fast.data.vision_inputs import VisionInputs
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.tiny import FAMILIES, tiny_model, tiny_processor, tiny_tokenizer

VIDEO = {
    "size": {"shortest_edge": 512, "longest_edge": 2048},
    "patch_size": 4,
    "merge_size": 2,
    "fps": 1,
    "max_frames": 6,
}
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def published(folder, form):
    """A checkpoint's processor files as they are published: a file a part (4.x), or all in one (5.x)."""
    processor = tiny_processor(tiny_tokenizer(["a red shoe"]))
    processor.tokenizer.save_pretrained(folder)
    image = json.loads(processor.image_processor.to_json_string())
    if form == "one file":
        parts = {"image_processor": image, "video_processor": VIDEO, "processor_class": "Qwen2VLProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(parts))
        (folder / "chat_template.jinja").write_text(CHAT)
    else:
        image |= {"min_pixels": image["size"]["shortest_edge"], "max_pixels": image.pop("size")["longest_edge"]}
        (folder / "preprocessor_config.json").write_text(json.dumps(image))
        (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEO))
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    return processor


def loaded(loader, folder, **settings):
    """Stock transformers' processor; None where it needs torchvision, as AutoImageProcessor does in 5.17."""
    try:
        return loader.from_pretrained(folder, **settings)
    except ImportError:
        if find_spec("torchvision") or not transformers.__version__.startswith("5.17."):
            raise
        return None


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("form", ["a file a part", "one file"])
def test_every_part_comes_back(form, tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    first.mkdir()
    published(first, form)
    RimeProcessor.from_pretrained(first).save_pretrained(second)
    changed = RimeProcessor.from_pretrained(second, max_pixels=1024)
    changed.save_pretrained(second)  # over what is there: no stale part may win
    changed.save_pretrained(third)
    for folder in (second, third):
        again = RimeProcessor.from_pretrained(folder)
        assert again.image_processor.size["longest_edge"] == 1024
        assert again.tokenizer.chat_template == CHAT
        stock = loaded(AutoImageProcessor, folder)
        assert stock is None or stock.size["longest_edge"] == 1024
        whole = read(folder, "processor_config.json")
        assert whole["video_processor"] == read(folder, "video_preprocessor_config.json") == VIDEO
        assert whole["image_processor"] == read(folder, "preprocessor_config.json")
        assert whole.get("processor_class") == ("Qwen2VLProcessor" if form == "one file" else None)


def test_a_checkpoint_without_video_settings_has_the_images(tmp_path):
    """As transformers itself falls back, so nothing changes for its readers."""
    processor = tiny_processor(tiny_tokenizer(["a"]))
    processor.save_pretrained(tmp_path)
    video = read(tmp_path, "video_preprocessor_config.json")
    image = read(tmp_path, "preprocessor_config.json")
    assert video == {key: value for key, value in image.items() if key != "image_processor_type"}


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_processors_make_the_same_pixels(family, tmp_path):
    processor = tiny_processor(tiny_tokenizer(["a"]))
    tiny_model(family, tokenizer=processor.tokenizer).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in ((16, 24), (37, 53), (200, 111))]
    loaders = [AutoImageProcessor]
    if find_spec("torchvision"):
        loaders.append(AutoProcessor)
    else:
        print("without torchvision stock AutoProcessor refuses these families; AutoImageProcessor is what it would use")
    for loader in loaders:
        stock = loaded(loader, tmp_path, use_fast=False)  # PIL: torchvision's resize rounds its own way
        if stock is None:
            pytest.skip("this transformers has no AutoImageProcessor without torchvision")
        found = getattr(stock, "image_processor", stock)(images, return_tensors="pt")
        pixels, grids = VisionInputs(processor.image_processor).images(images)
        assert torch.equal(found["image_grid_thw"], grids)
        torch.testing.assert_close(found["pixel_values"], pixels, rtol=0, atol=0)
        if loader is AutoProcessor:
            assert stock.video_processor.size["longest_edge"] == processor.image_processor.size["longest_edge"]
