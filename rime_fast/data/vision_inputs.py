"""Pixels: images and frames to the flat patches Qwen's vision towers read.

The same numbers as transformers' `Qwen2VLImageProcessorPil`, bit for bit, made faster: an 8-bit pixel has 256 values,
so rescaling and normalising are one look-up in a table that the processor itself filled, done after the pixels were
cut into patches as bytes; images of one size go through together. Frames of a video take the same path: two frames
(``temporal_patch_size``) make one patch, the last is repeated where one is missing, as in transformers' video
processors (which need torchvision and resize through it, so their resized frames differ in the last bits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from rime_fast.data.images import MAX_PIXELS, ImageSource, image_size, load_image

Size = tuple[int, int]  # height, width


class VisionInputs:
    """Patches of images and videos, with the limits and constants of one image processor.

    A torchvision-backed processor is replaced by its PIL twin with the same settings: one result on every machine.
    max_decoded: pixels of the largest image that is decoded at all (``load_image``).
    """

    def __init__(self, image_processor: Any, *, max_decoded: int = MAX_PIXELS) -> None:
        self.max_decoded = max_decoded
        pil = _pil_processor(image_processor)
        self.patch_size: int = pil.patch_size
        self.merge_size: int = pil.merge_size
        self.temporal_patch_size: int = pil.temporal_patch_size
        self.do_resize: bool = pil.do_resize
        self.resample: int = int(pil.resample)
        self.min_pixels: int = pil.size["shortest_edge"]
        self.max_pixels: int = pil.size["longest_edge"]
        self.video_min_pixels, self.video_max_pixels = self.min_pixels, self.max_pixels  # of one frame
        self._pil = pil
        values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        if pil.do_rescale:
            values = pil.rescale(values, pil.rescale_factor)
        if pil.do_normalize:
            values = pil.normalize(values, pil.image_mean, pil.image_std)
        self._table = np.ascontiguousarray(values[:, 0], dtype=np.float32)  # [channel, byte]

    def target_size(self, size: Size) -> Size:
        """Height and width after resizing. Raises ValueError for an image thinner than 1 : 200."""
        if not self.do_resize:
            return size
        return _smart_resize(size, self.patch_size * self.merge_size, self.min_pixels, self.max_pixels)

    def video_size(self, size: Size) -> Size:
        """Height and width of every frame of a video whose first has ``size``. Raises as ``target_size``."""
        if not self.do_resize:
            return size
        return _smart_resize(size, self.patch_size * self.merge_size, self.video_min_pixels, self.video_max_pixels)

    def image_tokens(self, size: Size) -> int:
        """Tokens that an image of this height and width takes in the prompt."""
        return math.prod(self.target_size(size)) // (self.patch_size * self.merge_size) ** 2

    def frame_tokens(self, size: Size) -> int:
        """Tokens of one temporal patch of a video whose first frame has this height and width."""
        return math.prod(self.video_size(size)) // (self.patch_size * self.merge_size) ** 2

    def images(self, sources: Sequence[ImageSource]) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the tower's input of images: pixel_values [patches, channels * temporal * patch * patch] fp32 and
        image_grid_thw [n, 3] int64."""
        return self._patches([[self._pixels(source)] for source in sources], [1] * len(sources))

    def videos(self, videos: Sequence[Sequence[ImageSource]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the tower's input of lists of frames: pixel_values_videos and video_grid_thw; all frames take the first
        one's target size."""
        stacks = []
        for frames in videos:
            size = self.video_size(image_size(frames[0], max_pixels=self.max_decoded))
            pixels = [self._pixels(frame, size) for frame in frames]
            pixels += pixels[-1:] * (-len(pixels) % self.temporal_patch_size)
            stacks.append(pixels)
        return self._patches(stacks, [len(stack) // self.temporal_patch_size for stack in stacks])

    def _pixels(self, source: ImageSource, size: Size | None = None) -> np.ndarray:
        """The resized image as bytes [H, W, 3]."""
        if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,):
            given = (source.shape[0], source.shape[1])
            if given == (size or self.target_size(given)):
                return source
        image = load_image(source, max_pixels=self.max_decoded)
        if image.mode != "RGB" or "transparency" in image.info:
            # The processor's own rule for transparency and palettes.
            image = Image.fromarray(np.moveaxis(self._pil.process_image(image, do_convert_rgb=True), 0, -1))
        height, width = size or self.target_size((image.height, image.width))
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), resample=self.resample)
        return np.asarray(image)

    def _patches(self, stacks: list[list[np.ndarray]], times: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        patch, channels = self.patch_size, 3
        shapes = [stack[0].shape for stack in stacks]
        grids = np.array(
            [(t, shape[0] // patch, shape[1] // patch) for t, shape in zip(times, shapes, strict=True)], dtype=np.int64
        ).reshape(-1, 3)
        counts = grids.prod(axis=1)
        stops = np.cumsum(counts)
        out = np.empty((int(counts.sum()), channels, self.temporal_patch_size, patch * patch), dtype=np.float32)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, shape in enumerate(shapes):
            groups.setdefault((len(stacks[i]), *shape), []).append(i)
        for members in groups.values():
            pixels = np.stack([np.stack(stacks[i]) for i in members])  # [n, frames, H, W, 3]
            rows = self._cut(pixels, grids[members[0]])
            if len(groups) == 1:
                self._fill(out, rows)
                continue
            for i, part in zip(members, np.split(rows, len(members)), strict=True):
                self._fill(out[stops[i] - counts[i] : stops[i]], part)
        volume = out.shape[1] * out.shape[2] * out.shape[3]
        return torch.from_numpy(out.reshape(-1, volume)), torch.from_numpy(grids)

    def _cut(self, pixels: np.ndarray, grid: np.ndarray) -> np.ndarray:
        """[n, frames, H, W, 3] bytes to [patches, 3, frames a patch, patch * patch], patches in merge-block order."""
        (n, frames), (t, h, w) = pixels.shape[:2], grid.tolist()
        p, m = self.patch_size, self.merge_size
        cut = pixels.reshape(n, t, frames // t, h // m, m, p, w // m, m, p, 3)
        cut = cut.transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
        return cut.reshape(n * t * h * w, 3, frames // t, p * p)

    def _fill(self, out: np.ndarray, rows: np.ndarray) -> None:
        """Bytes through the table; a still image's one frame fills every time step of its patch."""
        for channel in range(3):
            out[:, channel] = self._table[channel].take(rows[:, channel])


@lru_cache(maxsize=4096)
def _smart_resize(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    return smart_resize(*size, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)


def _pil_processor(image_processor: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if isinstance(image_processor, Qwen2VLImageProcessorPil):
        return image_processor
    if not type(image_processor).__name__.startswith("Qwen2VLImageProcessor"):
        raise ValueError(f"image_processor is {type(image_processor).__name__}; expected a Qwen2VLImageProcessor")
    settings = image_processor.to_dict()
    known = (
        *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
        *("patch_size", "merge_size", "temporal_patch_size"),
    )
    return Qwen2VLImageProcessorPil(**{key: settings[key] for key in known if settings.get(key) is not None})
