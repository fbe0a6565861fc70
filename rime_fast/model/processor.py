"""A tokenizer and an image processor side by side, without torchvision.

transformers' own Qwen processors refuse to be built where torchvision is missing, since their video processor needs
it. Frames are images to us (two frames make one temporal patch), so PIL is enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase


class RimeProcessor:
    """``tokenizer`` and ``image_processor`` of one checkpoint, loaded and saved together.

    The image processor is transformers' ``Qwen2VLImageProcessorPil``, the one all three families use: its
    ``patch_size``, ``merge_size``, ``temporal_patch_size`` and ``size`` (pixel limits) come from the checkpoint.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor: Any) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None, **kwargs: Any
    ) -> RimeProcessor:
        """Load both parts from a directory or a hub name.

        ``min_pixels`` / ``max_pixels`` replace the checkpoint's limits of an image's area. Other keyword arguments
        (revision, cache_dir, token) go to both loaders.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name_or_path, **kwargs)
        size = {edge: image_processor.size[edge] for edge in ("shortest_edge", "longest_edge")}
        if min_pixels is not None:
            size["shortest_edge"] = min_pixels
        if max_pixels is not None:
            size["longest_edge"] = max_pixels
        if size["shortest_edge"] > size["longest_edge"]:
            raise ValueError(f"min_pixels is {size['shortest_edge']}, above max_pixels {size['longest_edge']}")
        image_processor.size = type(image_processor.size)(**size)
        return cls(tokenizer=tokenizer, image_processor=image_processor)

    def save_pretrained(self, directory: str | Path, **kwargs: Any) -> None:
        """Write tokenizer files and ``preprocessor_config.json``, as transformers reads them.

        Trainer calls this on its ``processing_class`` at each checkpoint.
        """
        self.tokenizer.save_pretrained(directory, **kwargs)
        self.image_processor.save_pretrained(directory)
