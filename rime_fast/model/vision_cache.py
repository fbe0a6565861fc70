"""What a frozen vision tower computes, kept between passes over the same images.

Frozen is the trunk: patch embedding and blocks. The mergers behind it may be trained (UME-R1 does), so what is kept
is the mergers' input: for Qwen3-VL also that of every deepstack merger. Later passes run the mergers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


class VisionCache:
    """Holds one batch's trunk features: filled by the first forward that is given it, emptied by the second.

    host: keep them in (pinned) host memory, off the accelerator. keep: do not empty it; every further forward over
    these pixels uses the features (Refine-RL: prefill, reference and policy), until the cache is dropped. The features
    are those of the first forward to the bit; the towers have no dropout. A tower whose trunk is trained ignores the
    cache.
    """

    def __init__(self, *, host: bool = False, keep: bool = False) -> None:
        self.host, self.keep = host, keep
        self._held: list[Tensor] | None = None
        self._device: torch.device | None = None

    @property
    def filled(self) -> bool:
        """Whether the next forward takes its features from here."""
        return self._held is not None

    def put(self, features: list[Tensor]) -> None:
        """Keep the mergers' inputs, deepstack's first."""
        self._device = features[0].device
        features = [x.detach() for x in features]
        if self.host and self._device.type != "cpu":
            features = [
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in features
            ]
        self._held = features

    def take(self) -> list[Tensor]:
        """Give the features, on the device they came from; the cache is empty afterwards unless it keeps them."""
        if self._held is None:
            raise RuntimeError("the vision cache is empty; expected a forward that filled it")
        held = self._held
        self._held = held if self.keep else None
        return [x.to(self._device, non_blocking=True) for x in held]

    def part(self, patches: Sequence[tuple[int, int]]) -> VisionCache:
        """Make a filled cache of some whole images and videos: of the given ranges of the rows of the pixels."""
        if self._held is None:
            raise RuntimeError("the vision cache is empty; expected a forward that filled it")
        part = VisionCache(host=self.host, keep=self.keep)
        part._held = [torch.cat([x[first:stop] for first, stop in patches]) for x in self._held]
        part._device = self._device
        return part


@dataclass
class MergedFeatures(ModelOutput):
    """What the mergers make of kept features: pooler_output [n, H], deepstack_features (a list of [n, H])."""

    pooler_output: Tensor | None = None
    deepstack_features: list[Tensor] | None = None


class _CachedTower:
    """Mixin over a family's vision tower; ``rime_cache`` is a VisionCache to fill or to use."""

    def forward(
        self: Any, hidden_states: Tensor, *args: Any, rime_cache: VisionCache | None = None, **kwargs: Any
    ) -> Any:
        if rime_cache is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        mergers = _mergers(self)
        if rime_cache.filled:
            held = rime_cache.take()
            if held[0].shape[0] != hidden_states.shape[0]:
                raise ValueError(
                    f"the vision cache holds {held[0].shape[0]} patches; the pixels have {hidden_states.shape[0]}"
                )
            return _merge(self, mergers, held, kwargs.get("window_index"))
        inputs: list[Tensor] = []
        hooks = [merger.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for merger in mergers]
        try:
            out = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finally:
            for hook in hooks:
                hook.remove()
        rime_cache.put(inputs)
        return out


def _mergers(tower: Any) -> list[nn.Module]:
    """In the order in which the tower calls them."""
    return [*getattr(tower, "deepstack_merger_list", ()), tower.merger]


def _merge(tower: Any, mergers: list[nn.Module], inputs: list[Tensor], window_index: Tensor | None) -> MergedFeatures:
    *deepstack, merged = [merger(x) for merger, x in zip(mergers, inputs, strict=True)]
    if hasattr(tower, "window_size") and window_index is not None:
        merged = merged[torch.argsort(window_index)]  # Qwen2.5-VL's blocks run in window order
    return MergedFeatures(pooler_output=merged, deepstack_features=deepstack or None)


@cache
def _cached(stock: Any) -> Any:
    return type(stock.__name__, (_CachedTower, stock), {"__module__": __name__})


def cacheable(tower: nn.Module) -> None:
    """Let the tower's forward take a ``VisionCache``, in place; parameters and their names stay."""
    stock: Any = type(tower)
    if not issubclass(stock, _CachedTower):
        tower.__class__ = _cached(stock)


def trunk_is_frozen(tower: nn.Module) -> bool:
    """Whether nothing before the mergers is trained (an adapter inside counts as trained)."""
    return not any(p.requires_grad for name, p in tower.named_parameters() if "merger" not in name)


def has_pixels(prompts: dict[str, Any]) -> bool:
    """Whether a batch has an image or a video."""
    return "pixel_values" in prompts or "pixel_values_videos" in prompts
