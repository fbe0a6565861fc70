"""The vision tower over many images at once: the stock modules, with one attention call per image size.

The stock towers take all patches of a batch as one row, but run attention image by image (frame by frame, window by
window in Qwen2.5-VL), and rebuild positions from the grids in every call. Here equal segments go through attention
as one block, and what depends on the grids alone is kept for the next batch with the same grids.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from rime_fast.model.packing import PACKED_SDPA, PackedLayout, packed_layout
from rime_fast.model.vision_cache import VisionCache, cacheable, trunk_is_frozen

Grids = tuple[tuple[int, int, int], ...]


class _SegmentedAttention:
    """Mixin over a family's vision attention: segments of one length share a call when layouts are passed down."""

    rime_windowed = False

    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        rime_layouts: tuple[PackedLayout, PackedLayout] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if rime_layouts is None or position_embeddings is None:
            return super().forward(  # type: ignore[misc]
                hidden_states, cu_seqlens, position_embeddings=position_embeddings, max_seqlen=max_seqlen, **kwargs
            )
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = self.rime_rotary(query, key, *position_embeddings)
        out = rime_layouts[self.rime_windowed].attend(query, key, value, scale=self.scaling)
        return self.proj(out.flatten(1))


@cache
def _segmented(stock: Any) -> Any:
    rotary = staticmethod(sys.modules[stock.__module__].apply_rotary_pos_emb_vision)
    return type(stock.__name__, (_SegmentedAttention, stock), {"rime_rotary": rotary, "__module__": __name__})


def segment_attention(tower: nn.Module) -> None:
    """Give the tower's blocks the segmented attention, and its forward a cache to use, in place; parameters and their
    names stay."""
    cacheable(tower)
    full = getattr(tower, "fullatt_block_indexes", None)
    blocks: Any = tower.blocks
    for i, block in enumerate(blocks):
        stock: Any = type(block.attn)
        if not issubclass(stock, _SegmentedAttention):
            block.attn.__class__ = _segmented(stock)
        block.attn.rime_windowed = full is not None and i not in full


@lru_cache(maxsize=32)
def _geometry(
    grids: Grids, merge: int, window: tuple[int, int] | None, side: int | None, device: torch.device
) -> dict[str, Any]:
    """What a tower derives from the grids, under the names by which transformers accepts it ready-made.

    window: (window size, patch size), both in pixels, for Qwen2.5-VL. side: the learned position grid of Qwen3-VL.
    """
    host = torch.tensor(grids, dtype=torch.int64)
    bounds = get_vision_cu_seqlens(host)
    layouts = [packed_layout(bounds.diff().tolist(), device, causal=False)]
    tensors = {"position_ids": get_vision_position_ids(host, merge), "cu_seqlens": bounds}
    if window is not None:
        index, window_bounds = get_vision_window_index(host, merge, *window)
        tensors |= {"window_index": index, "cu_window_seqlens": window_bounds}
        layouts.append(packed_layout(window_bounds.diff().tolist(), device, causal=False))
    if side is not None:
        indices, weights = get_vision_interpolation_indices_and_weights(
            host, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=merge
        )
        tensors |= {"interp_indices": indices, "interp_weights": weights}
    return {name: t.to(device, non_blocking=True) for name, t in tensors.items()} | {"rime_layouts": tuple(layouts)}


def vision_features(
    tower: Any, pixels: Tensor, grids: Sequence[Sequence[int]], cache: VisionCache | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Compute the features of all images and videos of a batch, and Qwen3-VL's deepstack features (else an empty list).

    pixels [patches, channels * patch volume]; grids: (t, h, w) in patches, on the host, in the order of ``pixels``.
    cache: of a frozen tower's features between two passes over these pixels (a trained tower ignores it).
    Returns [sum t * h * w / merge^2, H] each.
    """
    config: Any = tower.config
    grids = tuple((int(t), int(h), int(w)) for t, h, w in grids)
    patches = sum(t * h * w for t, h, w in grids)
    if patches != pixels.shape[0]:
        raise ValueError(f"pixel_values has {pixels.shape[0]} patches; the grids {list(grids)[:4]} have {patches}")
    window = (config.window_size, config.patch_size) if hasattr(config, "window_size") else None
    side = getattr(tower, "num_grid_per_side", None)
    known = dict(_geometry(grids, config.spatial_merge_size, window, side, pixels.device))
    layouts = known.pop("rime_layouts")
    if config._attn_implementation in (PACKED_SDPA, "sdpa"):
        known["rime_layouts"] = layouts
    elif "flash" in config._attn_implementation:
        known["max_seqlen"] = max(layouts[0].lengths)
        if window is not None:
            known["max_window_seqlen"] = max(layouts[1].lengths)
    if cache is not None and trunk_is_frozen(tower):
        known["rime_cache"] = cache
    out = tower(pixels.to(tower.dtype), grid_thw=torch.tensor(grids, device="cpu"), **known)
    return out.pooler_output, list(getattr(out, "deepstack_features", None) or [])


def host_grids(host: Any, grids: Any) -> list[tuple[int, int, int]]:
    """Give the grids (t, h, w) as host integers: those given as such, else read back from a tensor."""
    known = host if host is not None else grids
    if known is None:
        return []
    return [(int(t), int(h), int(w)) for t, h, w in (known.tolist() if isinstance(known, Tensor) else known)]


def visual_input(
    images: Tensor | None, image_grids: list[Any], videos: Tensor | None, video_grids: list[Any]
) -> tuple[Tensor | None, list[Any], int]:
    """Join images and videos as one input of the tower (one call on every rank, whatever its batch holds).

    Returns pixels, grids, and the number of image patches.
    """
    for name, pixels, grids in (("image", images, image_grids), ("video", videos, video_grids)):
        if (pixels is None) != (not grids):
            raise ValueError(f"{name} pixels and {name} grids must come together; got one without the other")
    parts = [x for x in (images, videos) if x is not None]
    if not parts:
        return None, [], 0
    pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
    return pixels, [*image_grids, *video_grids], 0 if images is None else int(images.shape[0])
