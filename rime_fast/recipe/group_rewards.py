"""Rewards of a Refine-RL step: every trained side's rollouts against that side's anchors, and what is logged of it.

Order of rows: the trained sides one after the other, in each the B items, in each item its G rollouts. An item of one
side is a prompt; a step has N = sides x B of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.reward import RewardWeights, score_rewrites_
from rime_fast.ops.reward.weights import TERM_NAMES

OPPOSITE = {"query": "target", "target": "query"}
DEGENERATE = 1e-6  # a group whose rewards' standard deviation is below this has nothing to say
# Logged as means over the rollouts that have an embedding and an anchor; without one these terms are 0.
_OF_VALID = ("rank", "hit", "positive", "negative")


def negatives_mask(own: Tensor, others: Tensor) -> Tensor:
    """Say which anchors may be negatives of which items: where no hash is equal. own [B, 2], others [A, 2] -> [B, A]
    bool."""
    return (own[:, None] != others[None]).all(dim=-1)


def cut(rows: Tensor, width: int | None) -> Tensor:
    """Cut embeddings to their first ``width`` columns as fp32 unit rows (Matryoshka); None: the rows as they are."""
    return rows if width is None else torch.nn.functional.normalize(rows[:, :width].float(), dim=1)


@dataclass(frozen=True)
class SideAnchors:
    """What the rollouts of one trained side are scored against; the B items in order.

    rows: [A, D], on the rollouts' device, or in (pinned) host memory from which they stream; with ``group`` this rank's
    part of a bank sharded over it. positive: [B] int64, each item's own anchor in the whole bank. own: [B, D], these
    anchors, for the refine term; None leaves it out. mask: [B, whole bank] bool, see ``negatives_mask``; None: none is
    left out. largest_norm: see ``score_rewrites_``.
    """

    rows: Tensor
    positive: Tensor
    own: Tensor | None = None
    mask: Tensor | None = None
    group: dist.ProcessGroup | None = None
    largest_norm: Tensor | None = None


@dataclass(frozen=True)
class RewardBuffers:
    """The rewards and advantages [N, G] fp32 of a step, and each term of ``TERM_NAMES``, written in place."""

    rewards: Tensor
    advantages: Tensor
    terms: dict[str, Tensor]

    @classmethod
    def make(cls, prompts: int, group_size: int, device: torch.device) -> RewardBuffers:
        """Make room for ``prompts`` groups."""
        rewards, advantages = torch.zeros(2, prompts * group_size, device=device).unbind()
        return cls.over(rewards, advantages, group_size)

    @classmethod
    def over(cls, rewards: Tensor, advantages: Tensor, group_size: int) -> RewardBuffers:
        """Make views on a rollout buffer's own [N G] fp32; only the terms are new."""
        terms = rewards.new_zeros(len(TERM_NAMES), *rewards.unflatten(0, (-1, group_size)).shape)
        rewards, advantages = (x.unflatten(0, (-1, group_size)) for x in (rewards, advantages))
        return cls(rewards, advantages, dict(zip(TERM_NAMES, terms.unbind(), strict=True)))

    def degenerate(self) -> Tensor:
        """Say which groups' rollouts all have the same reward, [N] bool."""
        return self.terms["group_std"][:, 0] < DEGENERATE

    def metrics(self) -> dict[str, Tensor]:
        """Average for the log, 0-d: the reward and its terms over all rollouts; rank, hit and the similarities over
        those whose embedding is there ("reward/nan": the share of the others); "group_std" and "degenerate_groups" (a
        share) over the groups."""
        found = {"reward/total": self.rewards.mean()}
        valid = 1.0 - self.terms["nan"]
        count = valid.sum().clamp(min=1.0)
        for name, buffer in self.terms.items():
            if name != "group_std":
                found[f"reward/{name}"] = (buffer * valid).sum() / count if name in _OF_VALID else buffer.mean()
        found["group_std"] = self.terms["group_std"][:, 0].mean()
        found["degenerate_groups"] = self.degenerate().float().mean()
        return found


class Rewarder:
    """Scores rollouts side by side, in place.

    weights: the reward. trained: the sides, in row order. group_size: G. width: at which all is compared (Matryoshka);
    anchors have it already (``cut``).
    """

    def __init__(
        self, weights: RewardWeights, trained: Sequence[str], group_size: int, width: int | None = None
    ) -> None:
        self.weights, self.trained, self.group_size, self.width = weights, tuple(trained), group_size, width

    def __call__(
        self,
        into: RewardBuffers,
        anchors: Mapping[str, SideAnchors],
        gen: Tensor,
        disc: Tensor,
        format_ok: Tensor,
        lengths: Tensor,
        first: int = 0,
    ) -> None:
        """Rewards and advantages of the n prompts from the ``first``-th on; waits for no device.

        anchors: trained side -> ``SideAnchors`` of all its B items. gen [n G, D] unit, not finite where missing;
        disc [n, D] unit: the prompts' own discriminative embeddings; without one a rollout counts as missing.
        format_ok [n G] bool, lengths [n G] rewrite tokens. Where a side's bank is sharded, every rank of its group
        must call with the same n and first.
        """
        gen, disc = cut(gen, self.width), cut(disc, self.width)
        size = self.group_size
        prompts, items = into.rewards.shape[0], into.rewards.shape[0] // len(self.trained)
        stop = first + gen.shape[0] // size
        if gen.shape[0] % size or stop > prompts or disc.shape[0] != stop - first:
            raise ValueError(
                f"gen has {gen.shape[0]} rows and disc {disc.shape[0]}; expected {size} and 1 for each prompt from "
                f"{first} to at most {prompts}"
            )
        gen, format_ok, lengths = (x.unflatten(0, (-1, size)) for x in (gen, format_ok, lengths))
        for place, name in enumerate(self.trained):
            begin, end = max(first, place * items), min(stop, (place + 1) * items)
            if begin >= end:
                continue
            rows, mine = slice(begin, end), slice(begin - first, end - first)
            among = slice(begin - place * items, end - place * items)
            self._score(into, rows, anchors[name], among, gen[mine], disc[mine], format_ok[mine], lengths[mine])

    def _score(
        self,
        into: RewardBuffers,
        rows: slice,
        anchors: SideAnchors,
        items: slice,
        gen: Tensor,
        disc: Tensor,
        format_ok: Tensor,
        lengths: Tensor,
    ) -> None:
        """Prompts ``rows`` of the buffers, which are the side's ``items``."""
        similarity = None
        if anchors.own is not None:
            similarity = (disc.float() * anchors.own[items].float()).sum(dim=-1)
            gen = gen.masked_fill(~similarity.isfinite()[:, None, None], torch.nan)
            similarity = similarity.nan_to_num()
        score_rewrites_(
            into.rewards[rows],
            into.advantages[rows],
            gen=gen,
            anchors=anchors.rows,
            positive=anchors.positive[items],
            format_ok=format_ok,
            lengths=lengths,
            disc_similarity=similarity,
            negatives_mask=None if anchors.mask is None else anchors.mask[items],
            largest_norm=anchors.largest_norm,
            weights=self.weights,
            group=anchors.group,
            terms={name: buffer[rows] for name, buffer in into.terms.items()},
        )
