"""Who decodes the rollouts: the policy itself, or a server that stands in for it.

A backend gives the tokens of G responses a prompt. Embeddings come from the update's own forward, so a backend that
knows nothing but text generation will do. ``LocalBackend`` is ``generate_rollouts``; ``rime_fast.engine.vllm_backend``
hands the decoding to vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rime_fast.data.records import Side
from rime_fast.engine.gathered import is_gathered
from rime_fast.engine.rollout import dual_mode_of, generate_rollouts
from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.model.vision import vision_features


@dataclass(frozen=True)
class Sampling:
    """What is drawn; the fields are the arguments of ``generate_rollouts``."""

    gen_id: int
    max_new_tokens: int
    group_size: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_limit: int = 0
    stop_ids: tuple[int, ...] | None = None
    suppress_ids: tuple[int, ...] = ()
    pad_id: int = 0


class Samples(Protocol):
    """What a backend gives; ``Rollout`` is one. Row b * G + g is the g-th response to prompt b.

    tokens [B*G, R] int64, padded with the pad id, the stop token included; lengths [B*G] int64; logp [B*G, R] fp32, of
    the sampling policy at temperature 1 without filters, 0 in the padding; finished [B*G] bool: ended by ``<gen_emb>``.
    """

    tokens: Tensor
    lengths: Tensor
    logp: Tensor
    finished: Tensor


@dataclass
class SampledTokens:
    """``Samples`` as plain tensors."""

    tokens: Tensor
    lengths: Tensor
    logp: Tensor
    finished: Tensor


class RolloutBackend(Protocol):
    """Generates responses with the policy's current weights."""

    def refresh(self, policy: nn.Module) -> None:
        """The policy's weights are whole on this rank and may have changed since the last call."""

    def generate(
        self,
        policy: nn.Module,
        sides: Sequence[Side],
        prompts: dict[str, Any],
        sampling: Sampling,
        out: RolloutBuffer | None = None,
    ) -> Samples:
        """G responses to each of the B prompts: ``sides`` and the packed batch ``prompts`` of the same prompts.

        ``out``: a buffer of B prompts to write tokens, lengths, logp and finished into; the samples may be its views.
        """


class LocalBackend:
    """The policy decodes by itself.

    at_once: rollouts decoded together (memory); None: all. decode, check_every: see ``generate_rollouts``.
    """

    def __init__(self, at_once: int | None = None, *, decode: str = "auto", check_every: int | None = None) -> None:
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once is {at_once}; expected a positive number of rollouts")
        if check_every is not None and check_every < 1:
            raise ValueError(f"check_every is {check_every}; expected a positive number of steps")
        self.at_once, self.options = at_once, {"decode": decode, "check_every": check_every}

    def refresh(self, policy: nn.Module) -> None:
        """Nothing to do: the policy is the sampler."""

    def generate(
        self,
        policy: nn.Module,
        sides: Sequence[Side],
        prompts: dict[str, Any],
        sampling: Sampling,
        out: RolloutBuffer | None = None,
    ) -> Samples:
        """See ``RolloutBackend``; a prompt's G rollouts are never decoded apart. ``out`` gets ``gen_states``, too,
        and ``disc_states`` where the prompts have a ``disc_index``."""
        options = vars(sampling) | self.options
        count, group = len(prompts["lengths"]), sampling.group_size
        step = count if self.at_once is None else max(1, self.at_once // group)
        if step >= count:
            return generate_rollouts(policy, prompts, out=out, **options)
        if out is None:
            hidden = dual_mode_of(policy).config.get_text_config().hidden_size
            out = RolloutBuffer.make(
                prompts=count,
                group_size=group,
                max_tokens=sampling.max_new_tokens,
                hidden=hidden,
                device=prompts["input_ids"].device,
                pad_id=sampling.pad_id,
            )
        images = [len(side.images) for side in sides]
        videos = [len(side.videos) for side in sides]
        _see_once(policy, prompts)
        longest = 0
        for first in range(0, count, step):
            stop = min(count, first + step)
            part = take_prompts(prompts, first, stop, images, videos)
            rollout = generate_rollouts(policy, part, out=out.part(first, stop - first), **options)
            longest = max(longest, rollout.tokens.shape[1])
        return SampledTokens(out.tokens[:, :longest], out.lengths, out.logp[:, :longest], out.finished)


@torch.no_grad()
def _see_once(policy: nn.Module, prompts: dict[str, Any]) -> None:
    """Fill the batch's vision cache, which parts of the batch then take their share of."""
    cache, model = prompts.get("vision_cache"), dual_mode_of(policy)
    pixels = [prompts[name] for name in ("pixel_values", "pixel_values_videos") if name in prompts]
    if cache is None or cache.filled or not pixels or is_gathered(model):
        return
    grids = [*prompts.get("image_grids", ()), *prompts.get("video_grids", ())]
    vision_features(model.model.visual, torch.cat(pixels), grids, cache)


def take_prompts(
    prompts: dict[str, Any], first: int, stop: int, images: Sequence[int], videos: Sequence[int]
) -> dict[str, Any]:
    """Prompts ``first`` to ``stop`` of a packed batch; images, videos: how many each prompt of the batch has (host)."""
    lengths = prompts["lengths"]
    rows = slice(sum(lengths[:first]), sum(lengths[:stop]))
    part: dict[str, Any] = {
        "input_ids": prompts["input_ids"][rows],
        "lengths": list(lengths[first:stop]),
        "position_ids": prompts["position_ids"][:, rows],
        "mm_token_type_ids": prompts["mm_token_type_ids"][rows],
    }
    if prompts.get("disc_index") is not None:
        part["disc_index"] = prompts["disc_index"][first:stop] - rows.start
    seen, patches = 0, []
    for kind, pixels, counts in (("image", "pixel_values", images), ("video", "pixel_values_videos", videos)):
        if pixels not in prompts:
            continue
        sizes = [t * h * w for t, h, w in prompts[f"{kind}_grids"]]
        a, b = sum(counts[:first]), sum(counts[:stop])
        if a < b:
            start, end = sum(sizes[:a]), sum(sizes[:b])
            part[pixels] = prompts[pixels][start:end]
            part[f"{kind}_grids"] = list(prompts[f"{kind}_grids"][a:b])
            patches.append((seen + start, seen + end))
        seen += sum(sizes)
    cache = prompts.get("vision_cache")
    if cache is not None and cache.filled and patches:
        part["vision_cache"] = cache.part(patches)
    return part
