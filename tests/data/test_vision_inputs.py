"""Pixels equal the stock processor's bit for bit; videos equal a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rime_fast.data.vision_inputs import VisionInputs
from tests.data.builders import picture, processor

SIZES = [(16, 8), (16, 8), (9, 31), (40, 24), (5, 3), (300, 200)]


@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, {"do_normalize": False}])
@pytest.mark.parametrize("patch_size", [4, 14])
def test_images_equal_the_stock_processor_bit_for_bit(settings, patch_size):
    limits = {"shortest_edge": 4 * patch_size**2, "longest_edge": 40 * patch_size**2}
    stock = Qwen2VLImageProcessorPil(patch_size=patch_size, size=limits, **settings)
    images = [picture(i, *size) for i, size in enumerate(SIZES)]
    expected = stock(images=images, return_tensors="pt")
    pixels, grids = VisionInputs(stock).images(images)
    assert pixels.dtype == torch.float32
    assert torch.equal(grids, expected["image_grid_thw"])
    assert torch.equal(pixels, expected["pixel_values"])


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_every_mode_is_converted_as_the_stock_processor_does(mode):
    image = picture(7, 32, 24)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)))
    elif mode == "LA":
        image = picture(7, 32, 24, "RGBA").convert("LA")
    else:
        image = image.convert(mode)
    stock = processor().image_processor
    pixels, _ = VisionInputs(stock).images([image])
    assert torch.equal(pixels, stock(images=[image], return_tensors="pt")["pixel_values"])


def test_an_array_is_the_same_as_its_image():
    vision = VisionInputs(processor().image_processor)
    for size in ((16, 8), (19, 11)):
        image = picture(1, *size)
        assert torch.equal(vision.images([image])[0], vision.images([np.asarray(image)])[0])


def video_by_hand(frames: list[Image.Image], stock: Qwen2VLImageProcessorPil) -> tuple[torch.Tensor, list[int]]:
    """Each frame through the stock processor as a still, then time steps picked out of the repeated patches."""
    size, patch, merge = stock.temporal_patch_size, stock.patch_size, stock.merge_size
    frames = frames + frames[-1:] * (-len(frames) % size)
    rows = []
    for start in range(0, len(frames), size):
        steps = []
        for frame in frames[start : start + size]:
            still = stock(images=[frame], return_tensors="pt")
            steps.append(still["pixel_values"].reshape(-1, 3, size, patch * patch)[:, :, :1])
        rows.append(torch.cat(steps, dim=2).flatten(1))
    assert merge == 2
    return torch.cat(rows), [len(frames) // size, *still["image_grid_thw"][0, 1:].tolist()]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_videos_equal_a_direct_computation(count):
    stock = processor().image_processor
    frames = [picture(i, 50, 30) for i in range(count)]
    others = [picture(9 + i, 16, 24) for i in range(2)]
    pixels, grids = VisionInputs(stock).videos([frames, others])
    first, first_grid = video_by_hand(frames, stock)
    second, second_grid = video_by_hand(others, stock)
    assert grids.tolist() == [first_grid, second_grid]
    assert torch.equal(pixels, torch.cat([first, second]))


def test_video_layout_is_that_of_the_stock_video_processor():
    """Rows in the order (time, height block, width block, height in block, width in block), columns (channel, time,
    height, width): the permutation of transformers' ``Qwen2VLVideoProcessor.patchify``, written out in torch."""
    stock = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096}, do_normalize=False)
    frames = [picture(i, 24, 16) for i in range(4)]
    video = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames]).float() / 255
    cut = video.view(2, 2, 3, 2, 2, 4, 3, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    pixels, grids = VisionInputs(stock).videos([frames])
    assert grids.tolist() == [[2, 4, 6]]
    torch.testing.assert_close(pixels, cut.reshape(2 * 4 * 6, -1), rtol=1e-6, atol=1e-7)


def test_tokens_are_known_from_the_size_alone():
    vision = VisionInputs(processor().image_processor)
    for width, height in SIZES:
        _, grids = vision.images([picture(0, width, height)])
        assert vision.image_tokens((height, width)) == int(grids.prod()) // 4


def test_errors_name_what_is_wrong(tmp_path):
    vision = VisionInputs(processor().image_processor)
    with pytest.raises(ValueError, match=r"missing image: .*gone.png"):
        vision.images([str(tmp_path / "gone.png")])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=r"broken image: .*broken.png"):
        vision.images([str(broken)])
    with pytest.raises(ValueError, match="uint8"):
        vision.images([np.zeros((8, 8, 3), dtype=np.float32)])
    with pytest.raises(ValueError, match="expected a Qwen2VLImageProcessor"):
        VisionInputs(object())
