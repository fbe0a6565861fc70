"""Rewards and advantages of a Refine-RL batch: which embeddings they come from, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rime_fast.recipe.group_rewards import RewardBuffers, SideAnchors
from rime_fast.trainers.policy_batch import Part
from rime_fast.trainers.rollout_phase import Rollouts

if TYPE_CHECKING:
    from rime_fast.trainers.refine_step import RefineStep
    from rime_fast.trainers.refine_trainer import RefineRLTrainer


class StepScores:
    """Rewards and advantages of a batch: from the policy forward's own g, or from the rollouts' before it."""

    def __init__(
        self, step: RefineStep, model: Any, inputs: dict[str, Any], rollouts: Rollouts, others: Tensor | None
    ) -> None:
        self.step, self.model, self.inputs, self.rollouts, self.others = step, model, inputs, rollouts, others
        trainer = step.trainer
        kept = rollouts.buffer
        self.buffers = RewardBuffers.over(kept.rewards, kept.advantages, trainer.args.num_generations)
        self.anchors: dict[str, SideAnchors] | None = None
        if not trainer.source.together:
            self.anchors = trainer.source.anchors(inputs, opposite=others)
        self.done = False

    def before(self, parts: list[Part]) -> None:
        """The whole batch at once, from the states that decoding left (or, where it left none, a forward for them)."""
        self._score(*(self.rollouts.embeddings() or self._encoded(parts)))
        self.done = True

    def after(self, part: Part, gen: Tensor, disc: Tensor) -> None:
        """A part's rollouts, from the forward that is about to be trained on."""
        self._score(gen, disc, part)

    def metrics(self) -> dict[str, Tensor]:
        return self.buffers.metrics() | {"rewrite_tokens": self.rollouts.lengths.float().mean()}

    def _score(self, gen: Tensor, disc: Tensor, part: Part | None = None) -> None:
        trainer, rollouts = self.step.trainer, self.rollouts
        anchors = self.anchors
        if anchors is None:
            anchors = trainer.source.anchors(self.inputs, gen, disc, self.others)
        rows = slice(None) if part is None else part.rows(trainer.args.num_generations)
        first = 0 if part is None else part.first
        trainer.rewarder(self.buffers, anchors, gen, disc, rollouts.format_ok[rows], rollouts.lengths[rows], first)

    @torch.no_grad()
    def _encoded(self, parts: list[Part]) -> tuple[Tensor, Tensor]:
        gens, discs = [], []
        for part in parts:
            batch = self.step.policy_batch(self.inputs, self.rollouts, part)
            batch.inputs.pop("targets")
            out = self.model(**batch.inputs, pools=batch.pools)
            if not part.idle:
                gens.append(out.embeddings["gen"])
                discs.append(batch.prompts(out.embeddings["disc"]))
        return torch.cat(gens), torch.cat(discs)


class DegenerateGroups:
    """Which prompts' groups say nothing, by the rewards of the states that decoding left."""

    def __init__(self, trainer: RefineRLTrainer, inputs: dict[str, Any], others: Tensor | None) -> None:
        self.trainer, self.inputs, self.others = trainer, inputs, others
        self.anchors: dict[str, SideAnchors] | None = None

    def __call__(self, rollouts: Rollouts) -> Tensor:
        trainer, found = self.trainer, rollouts.embeddings()
        if found is None:
            raise ValueError(
                f"refill_degenerate: {type(trainer.phase.backend).__name__} gives no gen_states and disc_states; "
                "expected a backend that does, such as LocalBackend, or refill_degenerate=0"
            )
        if self.anchors is None:
            self.anchors = trainer.source.anchors(self.inputs, *found, self.others)
        buffers = RewardBuffers.make(rollouts.buffer.prompts, trainer.args.num_generations, rollouts.lengths.device)
        trainer.rewarder(buffers, self.anchors, *found, rollouts.format_ok, rollouts.lengths)
        return buffers.degenerate()
