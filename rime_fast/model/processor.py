"""A tokenizer and an image processor side by side, without torchvision.

transformers' own Qwen processors refuse to be built where torchvision is missing, since their video processor needs
it. Frames are images to us (two frames make one temporal patch), so PIL is enough; the video processor's settings are
carried along as plain data, so that the saved folder is whole for whoever has torchvision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

PROCESSOR, VIDEO, CHAT = "processor_config.json", "video_preprocessor_config.json", "chat_template.json"


class RimeProcessor:
    """The ``tokenizer`` and ``image_processor`` of one checkpoint, loaded and saved together.

    The image processor is transformers' ``Qwen2VLImageProcessorPil``, the one all three families use: its
    ``patch_size``, ``merge_size``, ``temporal_patch_size`` and ``size`` (pixel limits) come from the checkpoint.
    ``stock``: the settings of transformers' own processor in the form of its ``processor_config.json``, of which we
    use none: ``video_processor`` and ``processor_class``, where the checkpoint has them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_processor: Any, stock: dict[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.stock = stock or {}

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None, **kwargs: Any
    ) -> RimeProcessor:
        """Load all parts from a directory or a hub name.

        ``min_pixels`` / ``max_pixels`` replace the checkpoint's limits of an image's area. Other keyword arguments
        (revision, cache_dir, token) go to all loaders.
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
        stock = {k: v for k, v in _json(name_or_path, PROCESSOR, kwargs).items() if k != "image_processor"}
        video = stock.get("video_processor") or _json(name_or_path, VIDEO, kwargs)
        if video:
            stock["video_processor"] = video
        if tokenizer.chat_template is None:  # older checkpoints keep it with the processor
            tokenizer.chat_template = _json(name_or_path, CHAT, kwargs).get("chat_template")
        return cls(tokenizer=tokenizer, image_processor=image_processor, stock=stock)

    def save_pretrained(self, directory: str | Path, **kwargs: Any) -> None:
        """Write the tokenizer's files and every part of the family's stock processor, as transformers reads them.

        Both forms: one file a part (``preprocessor_config.json``, ``video_preprocessor_config.json``), and all in
        ``processor_config.json``, which transformers 5 reads first. Without video settings of its own a checkpoint's
        videos have the images' limits, in transformers too. Trainer calls this on its ``processing_class`` at each
        checkpoint.
        """
        self.tokenizer.save_pretrained(directory, **kwargs)
        self.image_processor.save_pretrained(directory)
        parts = self.settings()
        for name, content in ((VIDEO, parts["video_processor"]), (PROCESSOR, parts)):
            Path(directory, name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """The content of ``processor_config.json``."""
        image = json.loads(self.image_processor.to_json_string())
        video = {k: v for k, v in image.items() if k != "image_processor_type"}
        return {"video_processor": video} | self.stock | {"image_processor": image}


def _json(name_or_path: str | Path, file: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A JSON file of a directory or hub name; {} where there is none."""
    known = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
    passed = {k: kwargs[k] for k in known if k in kwargs}
    found = cached_file(
        str(name_or_path),
        file,
        **passed,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
