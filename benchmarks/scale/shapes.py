"""A model's sizes: what the counts of FLOP, bytes and memory need to know of a transformers config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Sizes of the published checkpoints (their config.json); the rest of each config is the family's default.
_QWEN2_VISION = {"depth": 32, "num_heads": 16, "patch_size": 14}
_QWEN25_VISION = _QWEN2_VISION | {"hidden_size": 1280, "intermediate_size": 3420}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    # name: (family, text, vision, head tied to the embedding)
    "qwen2-vl-2b": (
        "qwen2_vl",
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
        },
        _QWEN2_VISION | {"embed_dim": 1280, "hidden_size": 1536},
        True,
    ),
    "qwen2-vl-7b": (
        "qwen2_vl",
        {
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
        },
        _QWEN2_VISION | {"embed_dim": 1280, "hidden_size": 3584},
        False,
    ),
    "qwen2.5-vl-3b": (
        "qwen2_5_vl",
        {
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
        },
        _QWEN25_VISION | {"out_hidden_size": 2048},
        True,
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
        },
        _QWEN25_VISION | {"out_hidden_size": 3584},
        False,
    ),
    "qwen3-vl-2b": (
        "qwen3_vl",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
        },
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        True,
    ),
    "qwen3-vl-8b": (
        "qwen3_vl",
        {
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
        },
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        False,
    ),
}


@dataclass(frozen=True)
class TextShape:
    """The language model. query, key: all heads' widths together. bias, head_norm: of the q, k, v projections."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    key: int
    head_dim: int
    vocabulary: int
    tied: bool
    bias: bool
    head_norm: bool

    @property
    def layer_matrix(self) -> int:
        """Entries of one layer's matrices."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        small = (self.query + 2 * self.key) * self.bias + 2 * self.head_dim * self.head_norm
        return self.layer_matrix + 2 * self.hidden + small

    @property
    def table(self) -> int:
        """Entries of the embedding; the head has as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of the language model with its head."""
        return self.layers * self.layer + self.hidden + self.table * (1 if self.tied else 2)


@dataclass(frozen=True)
class VisionShape:
    """The vision tower. mlp_matrices: 2, or 3 where it is gated. full: layers that see the whole image; the others see
    windows of ``window`` patches. mergers: 1, and one for each deepstack layer. positions: learned ones."""

    width: int
    out: int
    intermediate: int
    layers: int
    patch: int
    volume: int
    merge: int
    mlp_matrices: int
    full: int
    window: int
    mergers: int
    positions: int
    rms: bool
    patch_bias: bool

    @property
    def layer_matrix(self) -> int:
        return 4 * self.width**2 + self.mlp_matrices * self.width * self.intermediate

    @property
    def merger_matrix(self) -> int:
        """Entries of one merger's matrices."""
        merged = self.width * self.merge**2
        return merged * (merged + self.out)

    @property
    def trunk(self) -> int:
        """Parameters without the mergers: what is frozen in the published recipes."""
        norm = self.width if self.rms else 2 * self.width
        mlp_bias = self.intermediate * (self.mlp_matrices - 1) + self.width
        layer = self.layer_matrix + 4 * self.width + mlp_bias + 2 * norm
        return self.layers * layer + self.width * (self.volume + self.patch_bias + self.positions)

    @property
    def merging(self) -> int:
        """Parameters of all mergers. The deepstack ones normalise after merging, so their norms are wider."""
        merged = self.width * self.merge**2
        linear = self.merger_matrix + merged + self.out
        first_norm = self.width if self.rms else 2 * self.width
        return self.mergers * linear + first_norm + (self.mergers - 1) * 2 * merged


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model. ``name`` is for reports."""

    name: str
    text: TextShape
    vision: VisionShape

    @property
    def parameters(self) -> int:
        """All parameters (a tied head counts once)."""
        return self.text.parameters + self.vision.trunk + self.vision.merging

    def trained(self, vision_trunk: bool = False) -> int:
        """Parameters with a gradient: all, or all but the vision trunk."""
        return self.parameters - (0 if vision_trunk else self.vision.trunk)

    def patches(self, pixels: int) -> int:
        """Patches of an image of this many pixels, whole merged cells."""
        cell = (self.vision.patch * self.vision.merge) ** 2
        return max(1, round(pixels / cell)) * self.vision.merge**2 if pixels else 0


def shape_of(config: Any, name: str = "") -> ModelShape:
    """The shape of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL config. Raises ValueError for any other model_type."""
    family = config.model_type
    if family not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        raise ValueError(f"model_type is {family!r}; expected qwen2_vl, qwen2_5_vl or qwen3_vl")
    return ModelShape(name or family, _text(config), _vision(config.vision_config, family))


def checkpoint_config(name: str) -> Any:
    """The transformers config with the sizes of a published checkpoint; ValueError for a name not in CHECKPOINTS."""
    if name not in CHECKPOINTS:
        raise ValueError(f"model is {name!r}; expected one of {', '.join(CHECKPOINTS)}")
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

    family, text, vision, tied = CHECKPOINTS[name]
    classes: dict[str, Any] = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}
    return classes[family](text_config=text, vision_config=vision, tie_word_embeddings=tied)


def checkpoint_shape(name: str) -> ModelShape:
    """``shape_of`` a published checkpoint by its short name."""
    return shape_of(checkpoint_config(name), name)


def _text(config: Any) -> TextShape:
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    qwen3 = config.model_type == "qwen3_vl"
    return TextShape(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        query=text.num_attention_heads * head_dim,
        key=text.num_key_value_heads * head_dim,
        head_dim=head_dim,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        bias=not qwen3,
        head_norm=qwen3,
    )


def _vision(vision: Any, family: str) -> VisionShape:
    windowed = family == "qwen2_5_vl"
    width = vision.embed_dim if family == "qwen2_vl" else vision.hidden_size
    side = vision.window_size // vision.patch_size if windowed else 0
    return VisionShape(
        width=width,
        out=vision.hidden_size if family == "qwen2_vl" else vision.out_hidden_size,
        intermediate=int(width * vision.mlp_ratio) if family == "qwen2_vl" else vision.intermediate_size,
        layers=vision.depth,
        patch=vision.patch_size,
        volume=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        merge=vision.spatial_merge_size,
        mlp_matrices=3 if windowed else 2,
        full=len(vision.fullatt_block_indexes) if windowed else vision.depth,
        window=side**2,
        mergers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
        positions=getattr(vision, "num_position_embeddings", 0),
        rms=windowed,
        patch_bias=family == "qwen3_vl",
    )
