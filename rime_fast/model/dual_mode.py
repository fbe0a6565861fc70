"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with a dual-mode forward: one causal pass, two embeddings, token scores.

``DualModeModel`` is a mixin; its three concrete classes are true subclasses of transformers' own, under their names,
so that Trainer, peft, DeepSpeed, FSDP, ``generate`` and ``save_pretrained`` see the stock model. ``forward`` is stock's
unless it is given ``lengths``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from rime_fast.model.adapter import is_adapter, merged_adapter
from rime_fast.model.compiled import layout_kwargs
from rime_fast.model.embedding_head import make_head, read_by_head
from rime_fast.model.head import ScoringHead, make_scoring
from rime_fast.model.outputs import DualModeOutput
from rime_fast.model.packing import PACKED_SDPA, AttentionLayout, packed_layout
from rime_fast.model.state_cache import StateCache
from rime_fast.model.token_names import MODES
from rime_fast.model.vision import host_grids, segment_attention, vision_features, visual_input
from rime_fast.model.vision_cache import VisionCache


def resolve_attention(requested: str | None) -> str:
    """The attention implementation that serves packed rows: flash-attention where it can run, else packed SDPA.

    "auto" (or None): ``flash_attention_2`` when CUDA and flash_attn are there, else packed SDPA. "sdpa" is packed
    SDPA; a name with "flash" in it is kept. Others cannot keep sequences apart: ValueError.
    """
    if requested in (None, "auto"):
        flash = torch.cuda.is_available() and find_spec("flash_attn") is not None
        return "flash_attention_2" if flash else PACKED_SDPA
    if requested in ("sdpa", PACKED_SDPA):
        return PACKED_SDPA
    if "flash" in str(requested):
        return str(requested)
    raise ValueError(f"attn_implementation is {requested!r}; expected 'auto', 'sdpa' or a flash-attention name")


class DualModeModel:
    """A Qwen-VL model whose one causal pass gives both embeddings and token scores: mixin and factory; see
    ``from_pretrained``, ``from_model``, ``from_config`` and ``forward``."""

    config: Any
    model: Any
    lm_head: Any
    state_cache: StateCache | None = None  # where the states that a head reads are kept

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self._make_dual()
        if (head := getattr(config, "embedding_head", None)) is not None:
            self.attach_head(head)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *args: Any,
        attn_implementation: str | None = "auto",
        dtype: str | torch.dtype = "auto",
        **kwargs: Any,
    ) -> DualModeModel:
        """Load a stock checkpoint (safetensors) of one of the three families as a dual-mode model.

        A trained adapter's folder (LoRA) gives its base model with the adapter merged in.

        dtype: "auto" takes the checkpoint's. attn_implementation: see ``resolve_attention``. Everything else goes to
        transformers' ``from_pretrained``. Raises ValueError for any other ``model_type``, and for a checkpoint without
        some of the model's weights (tied ones aside), naming them: transformers would leave these at random values.
        """
        kwargs.setdefault("use_safetensors", True)
        options = {"attn_implementation": resolve_attention(attn_implementation), "dtype": dtype, **kwargs}
        if cls is not DualModeModel:
            with_info = options.pop("output_loading_info", False)
            found: Any = super().from_pretrained(  # type: ignore[misc]
                name_or_path, *args, output_loading_info=True, **options
            )
            _require_all(found[1]["missing_keys"], name_or_path, cls.__name__)
            return found if with_info else found[0]
        if is_adapter(name_or_path):
            same = options | {"attn_implementation": attn_implementation}
            return merged_adapter(name_or_path, lambda base: cls.from_pretrained(base, *args, **same))
        config = kwargs.get("config")
        if config is None:
            passed = {k: kwargs[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in kwargs}
            config = AutoConfig.from_pretrained(name_or_path, **passed)
        return dual_mode_class(config).from_pretrained(
            name_or_path, *args, **(options | {"attn_implementation": attn_implementation})
        )

    @classmethod
    def from_model(cls, model: Any, *, attn_implementation: str | None = "auto") -> DualModeModel:
        """Turn a stock model into a dual-mode one IN PLACE (its class changes, no tensor moves) and return it.

        "auto" keeps a flash implementation the model already has.
        """
        if not isinstance(model, DualModeModel):
            target: Any = dual_mode_class(model.config)
            if type(model) is not target.__mro__[2]:
                raise TypeError(f"model is a {type(model).__name__}; expected transformers' {target.__name__}")
            model.__class__ = target
        current = model.config._attn_implementation
        keep = attn_implementation in (None, "auto") and current is not None and "flash" in current
        model.set_attn_implementation(current if keep else resolve_attention(attn_implementation))
        model._make_dual()
        return model

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, *, attn_implementation: str | None = "auto", **kwargs: Any
    ) -> DualModeModel:
        """A randomly initialised dual-mode model; ``dtype`` and others go to transformers' ``_from_config``."""
        target: Any = dual_mode_class(config)
        return target._from_config(config, attn_implementation=resolve_attention(attn_implementation), **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say that the weights are the stock class's. transformers applies its renamings of old checkpoints (Qwen2-VL's
        and Qwen2.5-VL's `model.layers...`) to its own classes only, and would leave these at random values."""
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers' does: under the published names, which every loader reads (stock ``AutoModel`` among
        them), whatever names the weights came from and whatever wraps the model (FSDP2 changes its class's name)."""
        stock = dual_mode_class(self.config).__name__
        self._weight_conversions = get_checkpoint_conversion_mapping(stock) or []
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load as torch's does, and take the published names too: transformers' Trainer resumes by it."""
        named = {_module_name(name): value for name, value in state_dict.items()}
        table, head = "model.language_model.embed_tokens.weight", "lm_head.weight"
        if table in named and self.lm_head.weight is self.model.get_input_embeddings().weight:
            named.setdefault(head, named[table])  # no checkpoint holds a tied head; it is not missing
        if named.keys() == state_dict.keys():
            named = state_dict  # type: ignore[assignment]  # with its metadata
        return super().load_state_dict(named, *args, **kwargs)  # type: ignore[misc]

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Set the head as transformers' does, which puts a plain linear layer in place when it
        resizes an untied table."""
        super().set_output_embeddings(new_embeddings)  # type: ignore[misc]
        make_scoring(self.lm_head)

    def _make_dual(self) -> None:
        make_scoring(self.lm_head)
        segment_attention(self.model.visual)
        text = self.model.language_model
        if isinstance(text, transformers.Qwen3VLTextModel):
            text.__class__ = Qwen3VLTextModel

    def attach_head(self, text: str) -> None:
        """Give the model a head that makes its gen embedding (embedding_head.py), saved and loaded with it."""
        self.embedding_head, self.config.embedding_head = make_head(text, self), text

    def encode_hidden(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        position_ids: Tensor,
        *,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | Sequence[Sequence[int]] | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | Sequence[Sequence[int]] | None = None,
        image_grids: Sequence[Sequence[int]] | None = None,
        video_grids: Sequence[Sequence[int]] | None = None,
        layout: AttentionLayout | None = None,
        vision_cache: VisionCache | None = None,
    ) -> Tensor:
        """Compute the last hidden states (after the final norm) of a packed batch, [T, H].

        Sequence i of ``lengths`` (host integers) sees itself only, unless a ``layout`` says otherwise (that needs
        packed SDPA). ``mm_token_type_ids`` [T] tells image (1) and video (2) placeholders from text (0); without it
        the token ids do, and a response that happens to contain such a token is an error. ``image_grids`` /
        ``video_grids``: the grids as host integers; a grid tensor on a device is read back, which waits for it.
        ``vision_cache``: see rime_fast/model/vision_cache.py.
        """
        rows = int(input_ids.shape[0]) if input_ids.dim() == 1 else -1
        if sum(lengths) != rows:
            raise ValueError(f"lengths sum to {sum(lengths)}; expected input_ids [that many], got {_shape(input_ids)}")
        if position_ids is None or tuple(position_ids.shape) != (3, rows):
            raise ValueError(f"position_ids is {_shape(position_ids)}; expected [3, {rows}]")
        embeds = self.model.get_input_embeddings()(input_ids)
        image_grids = host_grids(image_grids, image_grid_thw)
        video_grids = host_grids(video_grids, video_grid_thw)
        pixels, grids, n_image = visual_input(pixel_values, image_grids, pixel_values_videos, video_grids)
        extra: dict[str, Any] = {}
        if pixels is not None:
            features, deepstack = vision_features(self.model.visual, pixels, grids, vision_cache)
            n_image //= self.model.visual.spatial_merge_size**2
            where, mask = self._placeholders(input_ids, mm_token_type_ids, n_image, features.shape[0])
            embeds = torch.where(mask, features.to(embeds.dtype).index_select(0, where), embeds)
            if deepstack:
                dense = [torch.where(mask, x.to(embeds.dtype).index_select(0, where), 0.0) for x in deepstack]
                extra = {"visual_pos_masks": None, "deepstack_visual_embeds": dense}
        elif self._must_touch_vision():
            embeds = embeds + 0.0 * self._blank_image(embeds, vision_cache)
        extra |= self._attention_kwargs(lengths, input_ids.device, layout)
        out = self.model.language_model(
            input_ids=None, inputs_embeds=embeds[None], position_ids=position_ids[:, None], use_cache=False, **extra
        )
        return out.last_hidden_state[0]

    def _attention_kwargs(
        self, lengths: Sequence[int], device: torch.device, layout: AttentionLayout | None
    ) -> dict[str, Any]:
        attention = self.model.language_model.config._attn_implementation
        if attention == PACKED_SDPA:
            return layout_kwargs(self, layout or packed_layout(lengths, device))
        if "flash" in attention and layout is None:
            return packed_layout(lengths, device).flash_kwargs()
        raise ValueError(
            f"attention is set to {attention!r}, which cannot keep packed sequences apart; "
            "call set_attn_implementation('rime_sdpa') or a flash-attention name"
        )

    def _placeholders(
        self, input_ids: Tensor, kinds: Tensor | None, n_image: int, n_features: int
    ) -> tuple[Tensor, Tensor]:
        """Which feature row each token takes [T] (images' first, then videos'), and whether it takes one [T, 1].

        Index arithmetic instead of masked_scatter, whose backward waits for the device.
        """
        if kinds is None:
            image, video = (input_ids == i for i in (self.config.image_token_id, self.config.video_token_id))
        else:
            image, video = (kinds == i for i in (1, 2))
        rank_image, rank_video = image.cumsum(0), video.cumsum(0)
        fits = (rank_image[-1] == n_image) & (rank_video[-1] == n_features - n_image)
        if input_ids.device.type == "cpu" and not fits:
            raise ValueError(
                f"the batch has {int(rank_image[-1])} image and {int(rank_video[-1])} video tokens; "
                f"the pixel values make {n_image} and {n_features - n_image}"
            )
        torch._assert_async(fits, "image or video tokens do not match the features")
        where = torch.where(image, rank_image - 1, rank_video - 1 + n_image).clamp(0, n_features - 1)
        return where, (image | video)[:, None]

    def _must_touch_vision(self) -> bool:
        """Whether other ranks may run the vision tower in this step, so that this one has to as well.

        DDP waits for a gradient of every trained parameter, ZeRO-3 and FSDP gather parameters in step.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return False
        parameters = list(self.model.visual.parameters())
        sharded = any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in parameters)
        return sharded or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))

    def _blank_image(self, embeds: Tensor, cache: VisionCache | None) -> Tensor:
        """0-d: the sum of all features of one black image of one merged patch.

        Its features wait in ``cache`` as a real image's do: the ranks then run the same modules in both passes.
        """
        vision = self.model.visual.config
        merge = vision.spatial_merge_size
        volume = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(merge * merge, volume, device=embeds.device)
        features, deepstack = vision_features(self.model.visual, pixels, [(1, merge, merge)], cache)
        return sum((x.sum() for x in deepstack), start=features.sum()).to(embeds.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: Any = None,
        lengths: Sequence[int] | None = None,
        image_grids: Sequence[Sequence[int]] | None = None,
        video_grids: Sequence[Sequence[int]] | None = None,
        layout: AttentionLayout | None = None,
        vision_cache: VisionCache | None = None,
        targets: Tensor | None = None,
        token_weight: Tensor | None = None,
        max_scored: int | None = None,
        pools: dict[str, Tensor] | None = None,
        disc_index: Tensor | None = None,
        gen_index: Tensor | None = None,
        latent_index: Tensor | None = None,
        entropy: bool = False,
        temperature: float = 1.0,
        normalize: bool = True,
        logprob_backend: str = "auto",
        **kwargs: Any,
    ) -> Any:
        """Compute scores and embeddings of a packed batch in one causal pass; without ``lengths``, transformers' own
        forward.

        input_ids, lengths, position_ids and what an image or video needs: see ``encode_hidden``. targets [T]: the token
        to score at each row (-100: none); token_weight [T]: its weight in the loss; max_scored: no more rows than these
        are scored, as the host knows (``fused_logprob_pool``). pools: name -> row [N], or rows
        [N, K], of an embedding (``score_rows``), or disc_index, gen_index [N] and latent_index [N, K] for the recipe's.
        entropy, temperature, normalize: as in ``fused_logprob_pool``. Returns a DualModeOutput. Raises ValueError for
        arguments of transformers' own forward beside ``lengths``. Names that neither knows are left alone, as there.
        """
        stock = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        vision: dict[str, Any] = {
            "position_ids": position_ids,
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "image_grid_thw": image_grid_thw,
            "video_grid_thw": video_grid_thw,
            "mm_token_type_ids": mm_token_type_ids,
        }
        if lengths is None:
            packed = {"targets": targets, "token_weight": token_weight, "pools": pools}
            packed |= {"disc_index": disc_index, "gen_index": gen_index, "latent_index": latent_index}
            if alone := [name for name, value in packed.items() if value is not None]:
                raise ValueError(f"{', '.join(alone)} was given without lengths (a packed batch)")
            given = {name: value for name, value in {**stock, **vision}.items() if value is not None}
            return super().forward(input_ids, logits_to_keep=logits_to_keep, **given, **kwargs)  # type: ignore[misc]
        if input_ids is None:
            raise ValueError("lengths (a packed batch) was given without input_ids")
        both = sorted(name for name, value in stock.items() if value is not None)  # peft passes them as None
        if both:
            raise ValueError(f"lengths (a packed batch) was given together with {', '.join(both)}; expected only one")
        if token_weight is not None and targets is None:
            raise ValueError("token_weight was given without targets")
        inputs: dict[str, Any] = {"input_ids": input_ids, "lengths": lengths, **vision, "layout": layout}
        inputs |= {"image_grids": image_grids, "video_grids": video_grids, "vision_cache": vision_cache}
        if pools is None:
            by_mode = zip(MODES, (disc_index, gen_index, latent_index), strict=True)
            pools = {mode: index for mode, index in by_mode if index is not None}
        if hasattr(self, "embedding_head") and "gen" in pools and targets is None:
            return DualModeOutput(embeddings={"gen": read_by_head(self, inputs, pools["gen"])})
        hidden = self.encode_hidden(**inputs)
        if not (pools or targets is not None):
            return DualModeOutput(embeddings={}, hidden=hidden)
        head = self._scoring_head()
        scoring = {
            "targets": targets,
            "token_weight": token_weight,
            "pools": pools,
            "entropy": entropy,
            "temperature": temperature,
            "normalize": normalize,
            "backend": logprob_backend,
            "max_scored": max_scored,
        }
        found: dict[str, Tensor] = head(hidden, scoring=scoring)
        embeddings = {k.removeprefix("pool:"): found.pop(k) for k in list(found) if k.startswith("pool:")}
        return DualModeOutput(**found, embeddings=embeddings)

    def _scoring_head(self) -> Any:
        """The head to call with ``scoring``: peft's wrapper of a whole trained head passes the call on, its wrapper of
        single trained rows (``trainable_token_indices`` on a tied model) does not, but gives the weight with them."""
        head = self.lm_head
        inner = getattr(head, "original_module", head)
        make_scoring(inner)
        if not isinstance(inner, ScoringHead):
            raise TypeError(
                f"lm_head is a {type(head).__name__}; the fused scoring needs a plain linear head: leave it out of "
                "LoRA's target_modules (train it whole by modules_to_save) and out of quantisation"
            )
        return partial(inner, weight=lambda: head.weight) if hasattr(head, "token_adapter") else head


def _require_all(missing: set[str] | list[str], source: str | Path, name: str) -> None:
    if missing:
        keys = sorted(missing)
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        raise ValueError(f"the checkpoint {source} lacks weights of {name}: {', '.join(keys[:8])}{more}")


def _module_name(name: str) -> str:
    """The module that a published name of Qwen2-VL and Qwen2.5-VL stands for; any other name as it is."""
    return re.sub(
        r"^model\.(?!language_model\.|visual\.)", "model.language_model.", re.sub(r"^visual\.", "model.visual.", name)
    )


def _shape(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{list(tensor.shape)}"


class Qwen2VLForConditionalGeneration(DualModeModel, transformers.Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """Dual-mode Qwen2-VL."""


class Qwen2_5_VLForConditionalGeneration(DualModeModel, transformers.Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Dual-mode Qwen2.5-VL."""


class Qwen3VLForConditionalGeneration(DualModeModel, transformers.Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """Dual-mode Qwen3-VL."""


class Qwen3VLTextModel(transformers.Qwen3VLTextModel):
    """Qwen3-VL's text model; deepstack features laid out over all rows are added without a mask.

    The stock code indexes by a boolean mask, which waits for the device.
    """

    def _deepstack_process(
        self, hidden_states: Tensor, visual_pos_masks: Tensor | None, visual_embeds: Tensor
    ) -> Tensor:
        if visual_pos_masks is None:
            return hidden_states + visual_embeds.to(hidden_states.dtype)
        return super()._deepstack_process(hidden_states, visual_pos_masks, visual_embeds)


_CLASSES: dict[str, Any] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}


def dual_mode_class(config: PreTrainedConfig) -> Any:
    """The dual-mode class for a configuration; ValueError for a family that is not supported."""
    if config.model_type not in _CLASSES:
        raise ValueError(f"model_type is {config.model_type!r}; expected one of {', '.join(_CLASSES)}")
    return _CLASSES[config.model_type]
