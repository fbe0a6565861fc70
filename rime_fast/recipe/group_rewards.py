"""Rewards of a Refine-RL step: which anchors each trained side is scored against, and what is logged of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.reward import RewardWeights, score_rewrites_
from rime_fast.ops.reward.weights import TERM_NAMES

OPPOSITE = {"query": "target", "target": "query"}
Anchors = tuple[Tensor, Tensor, Tensor]


def negatives_mask(own: Tensor, others: Tensor) -> Tensor:
    """True where anchor j may be a negative of item i: no hash of it is equal. own [B, 2], others [A, 2] -> [B, A]."""
    return (own[:, None] != others[None]).all(dim=-1)


class Rewarder:
    """Scores the rollouts of a step, side by side, into one buffer of rewards and one of advantages.

    trained: the sides, in row order. group_size: G.
    """

    def __init__(self, weights: RewardWeights, trained: Sequence[str], group_size: int) -> None:
        self.weights, self.trained, self.group_size = weights, tuple(trained), group_size

    def __call__(
        self,
        gen: Tensor,
        disc: Tensor,
        anchors: Mapping[str, Anchors] | None,
        format_ok: Tensor,
        lengths: Tensor,
        metrics: dict[str, Tensor],
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Advantages [rows] fp32; fills ``metrics`` with 0-d means of every reward term.

        gen, disc [rows, D] unit; format_ok [rows] bool, lengths [rows] tokens. anchors: side -> (anchors [A, D],
        positive [B], ids [A, 2]); None scores each side against the other's rewrites (UME-R1).
        """
        sides, size = len(self.trained), self.group_size
        count = gen.shape[0] // (sides * size)
        gen, disc = (x.view(sides, count, size, -1) for x in (gen, disc))
        format_ok, lengths = (x.view(sides, count, size) for x in (format_ok, lengths))
        rewards = torch.empty(sides, count, size, device=gen.device)
        advantages = torch.empty_like(rewards)
        terms = {name: torch.empty_like(rewards) for name in TERM_NAMES}
        for i, side in enumerate(self.trained):
            mask = similarity = None
            if anchors is None:
                rows, positive = self._other_group(gen[1 - i], group)
            else:
                rows, positive, ids = anchors[OPPOSITE[side]]
                mask = negatives_mask(ids.index_select(0, positive), ids)
                own = rows.index_select(0, positive).float()
                similarity = torch.einsum("bgd,bd->bg", disc[i].float(), own)
            score_rewrites_(
                rewards[i],
                advantages[i],
                gen=gen[i],
                anchors=rows,
                positive=positive,
                format_ok=format_ok[i],
                lengths=lengths[i],
                disc_similarity=similarity,
                negatives_mask=mask,
                weights=self.weights,
                terms={name: buffer[i] for name, buffer in terms.items()},
            )
        metrics["reward/total"] = rewards.mean()
        metrics |= {f"reward/{name}": buffer.mean() for name, buffer in terms.items() if name != "group_std"}
        spread = terms["group_std"][..., 0]
        metrics["group_std"] = spread.mean()
        metrics["degenerate_groups"] = (spread < 1e-6).float().mean()
        metrics["rewrite_tokens"] = lengths.float().mean()
        return advantages.view(-1)

    def _other_group(self, gen: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """The other side's rewrites of all ranks as anchors [A, D], and each item's first."""
        count, size, width = gen.shape
        rows, first = gen.reshape(count * size, width), 0
        if group is not None:
            everyone = rows.new_empty(dist.get_world_size(group) * len(rows), width)
            dist.all_gather_into_tensor(everyone, rows.contiguous(), group=group)
            rows, first = everyone, dist.get_rank(group) * len(rows)
        return rows, first + size * torch.arange(count, device=gen.device)
