"""The batch in which rollouts are scored: every prompt once with its rollouts, or each rollout on its own; and how a
step's prompts are cut into such batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rime_fast.data.collate import Collator
from rime_fast.engine.micro_batch import PackedBatch
from rime_fast.engine.rollout import dual_mode_of
from rime_fast.engine.rollout_backend import take_prompts as take_neighbours
from rime_fast.model.packing import PACKED_SDPA
from rime_fast.model.shared_prefix import shared_prefix_batch
from rime_fast.trainers.anchors import to_device


@dataclass
class PolicyBatch:
    """n prompts with G rollouts each, T rows, R: the longest of these rollouts.

    inputs: what the model's forward takes, targets included. pools: where d and g are read, by name.
    scored [n G, R] int64: the row at which each token of a rollout is scored; mask [n G, R] bool: where there is one.
    repeats: rows of the "disc" pool a prompt has.
    """

    inputs: dict[str, Any]
    pools: dict[str, Tensor]
    scored: Tensor
    mask: Tensor
    repeats: int

    def by_rollout(self, logp: Tensor) -> Tensor:
        """Packed scores [T] as [n G, R]; any value outside the mask."""
        return logp.index_select(0, self.scored.flatten()).view_as(self.scored)

    def prompts(self, disc: Tensor) -> Tensor:
        """The "disc" pool's rows as one row a prompt, [n, D]."""
        return disc[:: self.repeats]


@dataclass(frozen=True)
class Part:
    """Prompts ``first`` to ``stop`` of a step. idle: run only because other ranks have more parts."""

    first: int
    stop: int
    idle: bool = False

    def rows(self, group_size: int) -> slice:
        """The rollouts of these prompts."""
        return slice(self.first * group_size, self.stop * group_size)


def plan_parts(costs: Sequence[int], budget: int | None) -> list[Part]:
    """As few runs of neighbouring prompts as there can be whose costs (rows) stay within ``budget``; None: one part.

    A prompt above the budget is a part of its own.
    """
    bounds, room = [0], budget
    for i, cost in enumerate(costs):
        if room is not None and budget is not None:
            if cost > room and i > bounds[-1]:
                bounds.append(i)
                room = budget
            room -= cost
    bounds.append(len(costs))
    return [Part(a, b) for a, b in pairwise(bounds)]


def policy_rows(lengths: Sequence[int], responses: Sequence[Sequence[int]], shared: bool) -> list[int]:
    """Rows of each prompt's policy forward: P - 1 + G (R + 1) where it stands once, G (P + R) where it does not."""
    group = len(responses) // len(lengths)
    tokens = [sum(map(len, responses[i * group : (i + 1) * group])) for i in range(len(lengths))]
    return [p - 1 + group + r if shared else group * p + r for p, r in zip(lengths, tokens, strict=True)]


def take_prompts(prompts: dict[str, Any], chosen: Sequence[int], merge_size: int) -> dict[str, Any]:
    """The packed batch of the ``chosen`` prompts, in ascending order: views (and their share of a filled vision cache)
    where they are neighbours."""
    count, first, stop = len(prompts["lengths"]), chosen[0], chosen[-1] + 1
    if len(chosen) == count:
        return prompts
    if stop - first != len(chosen):
        return PackedBatch(prompts, merge_size).take(chosen)
    images, videos = (prompts.get(f"{kind}_counts") or [0] * count for kind in ("image", "video"))
    return take_neighbours(prompts, first, stop, images, videos)


def has_pixels(prompts: dict[str, Any], first: int = 0, stop: int | None = None) -> bool:
    """Whether prompts ``first`` to ``stop`` have an image or a video."""
    whole = first == 0 and stop in (None, len(prompts["lengths"]))
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in prompts and (whole or any(prompts[f"{kind}_counts"][first:stop])):
            return True
    return False


def shared_policy_batch(prompts: dict[str, Any], responses: Sequence[Sequence[int]]) -> PolicyBatch:
    """P + G R rows a prompt. prompts: the packed prompt batch, on the device already."""
    batch = shared_prefix_batch(prompts, responses)
    pools = {name: batch.pop(f"{name}_index") for name in ("disc", "gen") if f"{name}_index" in batch}
    layout = batch["layout"]
    sizes = [len(response) for response in responses]
    # A rollout's first row is the prompt's last token, which scores its first token.
    first = [layout.prefix_rows + n for n in accumulate((size + 1 for size in sizes[:-1]), initial=0)]
    return PolicyBatch(batch, pools, *_scored(first, sizes, batch["input_ids"].device), 1)


def separate_policy_batch(
    collator: Collator, sides: Sequence[Any], responses: Sequence[Sequence[int]], device: torch.device
) -> PolicyBatch:
    """G (P + R) rows a prompt: every rollout a sequence of its own (for comparison, and for flash-attention)."""
    batch = to_device(collator.collate_responses(sides, responses), device)
    pools = {name: batch.pop(f"{name}_index") for name in ("disc", "gen")}
    starts = accumulate(batch["lengths"][:-1], initial=0)
    first = [start + prompt - 1 for start, prompt in zip(starts, batch["prompt_lengths"], strict=True)]
    sizes = [len(response) for response in responses]
    return PolicyBatch(batch, pools, *_scored(first, sizes, device), len(responses) // len(sides))


def _scored(first: Sequence[int], sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, mask) [rollouts, longest], worked out on the host."""
    starts, lengths = torch.tensor(first)[:, None], torch.tensor(sizes)[:, None]
    steps = torch.arange(max(sizes))
    rows = starts + torch.minimum(steps, lengths - 1)
    return rows.to(device, non_blocking=True), (steps < lengths).to(device, non_blocking=True)


def use_packed_attention(model: nn.Module) -> None:
    """Let the text model take an attention layout: packed SDPA, whose CUDA kernel is flash-attention too."""
    dual_mode_of(model).model.language_model.config._attn_implementation = PACKED_SDPA
