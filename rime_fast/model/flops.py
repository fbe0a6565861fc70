"""How much arithmetic a training step is: for the model FLOP utilisation in the log.

A multiply-add counts as two. Matrix products and attention are counted; norms, activations and the optimizer are not.
Forward of a tower: 2 P rows + 4 width (pairs of rows that attend) layers, with P the elements of its matrices; its
backward is as much again for the gradient of its inputs (where anything at or below it is trained) and 2 P_trained rows
for that of its weights. MFU counts each of these once; HFU also what is computed anew: activation checkpointing, and
the gradient cache's second forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

# Dense bf16 FLOP/s by NVIDIA's data sheets, by a part of the device's name.
PEAKS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
PEAKS |= {"GH200": 989.4e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Published dense bf16 FLOP/s of a device; None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class Tower:
    """One stack of layers. matrices, trained: elements of its weights of two or more dimensions, and of those trained.

    width: heads x head size. window: rows that attend to each other at most (None: all), in all layers but ``full``.
    """

    matrices: int
    trained: int
    layers: int
    width: int
    window: int | None = None
    full: int = 0
    causal: bool = False

    def forward(self, sizes: list[int]) -> float:
        """Count the FLOP of a forward over sequences of these many rows."""
        pairs = [n * (n + 1) / 2 if self.causal else float(n * n) for n in sizes]
        near = pairs if self.window is None else [float(n * min(n, self.window)) for n in sizes]
        full = self.layers if self.window is None else self.full
        attention = full * sum(pairs) + (self.layers - full) * sum(near)
        return 2.0 * self.matrices * sum(sizes) + 4.0 * self.width * attention

    def backward(self, sizes: list[int], inputs: bool) -> float:
        """Count the FLOP of the backward. inputs: whether a gradient has to pass through it."""
        if not inputs and not self.trained:
            return 0.0
        through = 2 * self.forward(sizes) - 2.0 * self.matrices * sum(sizes)  # attention has two inputs to its products
        return through + 2.0 * self.trained * sum(sizes)


class StepFlops:
    """Counts the FLOP of packed batches of one model. model: as it is before any wrapper."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        text, vision = config.get_text_config(), config.vision_config
        base = _base(model)
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        self.text = Tower(*_sizes(base.language_model.layers), text.num_hidden_layers, width, causal=True)
        inner = getattr(vision, "embed_dim", None) or vision.hidden_size
        window = getattr(vision, "window_size", None)
        self.vision = Tower(
            *_sizes(base.visual, merged=False),
            vision.depth,
            inner,
            None if window is None else (window // vision.patch_size) ** 2,
            len(getattr(vision, "fullatt_block_indexes", ())),
        )
        self.merger = Tower(*_sizes(base.visual, merged=True), 0, 0)
        self.merge = vision.spatial_merge_size**2
        head = cast(Any, model).get_output_embeddings().weight
        self.head, self.head_trained = _count(head), head.requires_grad

    def of(self, batch: Mapping[str, Any], again: float = 0.0, towers: str = "none") -> tuple[float, float]:
        """Count the FLOP of a step, (what it needs, what it runs); from host numbers only.

        again: share of the batch that is encoded twice (gradient cache). towers: see ``recomputed``. Every row of a
        response counts as scored by the head; a video's frames attend one by one.
        """
        lengths = list(batch["lengths"])
        grids = [*batch.get("image_grids", ()), *batch.get("video_grids", ())]
        patches = [int(h * w) for t, h, w in grids for _ in range(int(t))]
        trains_vision = self.vision.trained > 0
        merged = [n // self.merge for n in patches]
        trains_merger = trains_vision or self.merger.trained > 0
        text, vision = self.text.forward(lengths), self.vision.forward(patches) + self.merger.forward(merged)
        backward = self.text.backward(lengths, trains_merger) + self.vision.backward(patches, False)
        backward += self.merger.backward(merged, trains_vision)
        scored = sum(lengths) - sum(batch.get("prompt_lengths", lengths))
        head = 2.0 * self.head * scored
        needed = text + vision + backward + head * (3 if self.head_trained else 2)
        anew = text * ("text" in towers) + vision * ("vision" in towers) * trains_vision
        return needed, needed + anew + again * (text + vision + head)


def recomputed(model: nn.Module) -> str:
    """Say which towers' activations are computed again in the backward (gradient checkpointing): "text", "vision",
    "text, vision" or "none"."""
    base = _base(model)
    towers = {} if base is None else {"text": base.language_model, "vision": base.visual}
    found = [
        name
        for name, tower in towers.items()
        if any(getattr(module, "gradient_checkpointing", False) and module.training for module in tower.modules())
    ]
    return ", ".join(found) or "none"


def _base(model: nn.Module) -> Any:
    """The part that holds both towers."""
    return next((one for one in model.modules() if {"language_model", "visual"} <= one._modules.keys()), None)


def _sizes(part: nn.Module, merged: bool | None = None) -> tuple[int, int]:
    """(elements of the matrices, of the trained ones); merged: of a vision tower's mergers alone, or of all else.

    Position tables are looked up, not multiplied.
    """
    named = [(n, p) for n, p in part.named_parameters() if "pos_embed" not in n]
    chosen = [p for n, p in named if merged is None or ("merger" in n) == merged]
    matrices = [p for p in chosen if p.dim() > 1 or hasattr(p, "ds_numel")]
    return sum(map(_count, matrices)), sum(_count(p) for p in matrices if p.requires_grad)


def _count(parameter: Any) -> int:
    """Elements of a parameter, a partitioned one's (ZeRO-3) too."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
