"""What Refine-RL does with one batch: rollouts, then part by part a reference and a policy forward, reward, loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rime_fast.engine.gathered import whole_parameters
from rime_fast.engine.grad_sync import GradSync, grad_sync
from rime_fast.model.vision_cache import VisionCache, trunk_is_frozen
from rime_fast.recipe.refine import policy_loss
from rime_fast.trainers.policy_batch import (
    Part,
    PolicyBatch,
    has_pixels,
    plan_parts,
    policy_rows,
    separate_policy_batch,
    shared_policy_batch,
    take_prompts,
)
from rime_fast.trainers.rollout_phase import Rollouts
from rime_fast.trainers.rollout_store import Slot
from rime_fast.trainers.setup import vision_tower
from rime_fast.trainers.step_scores import DegenerateGroups, StepScores

if TYPE_CHECKING:
    from rime_fast.trainers.refine_trainer import RefineRLTrainer

# backward(loss, last): of one part; with last the step's gradients are exchanged.
Backward = Callable[[Tensor, bool], None]


@dataclass
class StepResult:
    """loss: 0-d, with its graph unless the parts' backwards have run. out: the model's output of the last part."""

    loss: Tensor
    out: Any


class RefineStep:
    """The step of a ``RefineRLTrainer``; its settings are the trainer's."""

    def __init__(self, trainer: RefineRLTrainer) -> None:
        self.trainer = trainer
        self._wrapped: nn.Module | None = None
        self._caching = False

    def train(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Forward and backward of one batch, a part at a time; the loss as ``Trainer.training_step`` returns it."""
        trainer, sync = self.trainer, self._sync(model)
        scale = 1.0 / trainer.current_gradient_accumulation_steps
        exchange = trainer.accelerator.sync_gradients

        def backward(loss: Tensor, last: bool) -> None:
            sync.backward(loss * scale, last=last and exchange)

        return self.run(model, inputs, backward, sync).loss * scale

    def run(
        self, model: Any, inputs: dict[str, Any], backward: Backward | None = None, sync: GradSync | None = None
    ) -> StepResult:
        """One batch. Without ``backward`` the parts' losses are added up with their graphs (evaluation, and a step of
        one part)."""
        trainer = self.trainer
        slot = trainer.store.next(len(inputs["sides"])) if trainer.model.training else None
        again = slot is not None and slot.again
        fresh = slot is None or not slot.filled
        with trainer.compute_loss_context_manager():
            inputs = self._see_once(inputs)
            others = self._opposite(model, inputs) if fresh else None
            rollouts = self._rollouts(inputs, others, slot)
            parts, several = self._parts(inputs, rollouts, trainer.sharded if sync is None else sync.lockstep)
            scores = StepScores(self, model, inputs, rollouts, others) if fresh else None
            if scores is not None and (again or (several and trainer.source.together)):
                scores.before(parts)
        tokens = sum(map(len, rollouts.responses))
        whole = {"n_rows": len(rollouts.responses), "n_tokens": self._global_tokens(tokens)}
        sums = _PolicySums()
        out = None
        for turn, part in enumerate(parts):
            with trainer.compute_loss_context_manager(), nullcontext() if sync is None else sync.local():
                loss, out = self._part(model, inputs, rollouts, part, scores, slot, fresh, whole, sums)
            if backward is None:
                sums.add_loss(loss, part)
                continue
            sums.add_loss(loss.detach(), part)
            backward(loss, turn == len(parts) - 1)
        if slot is not None:
            slot.filled = again
        metrics = {"policy_loss": sums.policy} | ({} if scores is None else scores.metrics())
        trainer.observe_step(
            metrics,
            sums.means(tokens),
            rollouts if fresh else None,
            scored=tokens,
            tokens=sums.rows,
            samples=len(rollouts.responses),
        )
        return StepResult(sums.loss, out)

    # --- the parts ---------------------------------------------------------------------------------------------------

    def _parts(self, inputs: dict[str, Any], rollouts: Rollouts, lockstep: bool) -> tuple[list[Part], bool]:
        """This rank's parts, and whether any rank has several. Ranks whose forwards are collective run equally many."""
        trainer, prompts = self.trainer, inputs["prompts"]
        costs = policy_rows(prompts["lengths"], rollouts.responses, trainer.args.shared_prefix)
        parts = plan_parts(costs, trainer.args.micro_batch_tokens)
        most = len(parts)
        if trainer.group is not None and (trainer.args.micro_batch_tokens is not None or trainer.gathers):
            visual = [has_pixels(prompts, part.first, part.stop) for part in parts]
            most, everywhere = GradSync(group=trainer.group).agree(len(parts), int(all(visual)))
            # A forward over kept features runs fewer modules than one without images: not while ranks must keep step.
            self._caching = self._caching and (bool(everywhere) or not trainer.gathers)
        if lockstep:
            cheapest = min(parts, key=lambda part: sum(costs[part.first : part.stop]))
            idle = Part(cheapest.first, cheapest.stop, idle=True)
            parts = [idle] * (most - len(parts)) + parts
        return parts, most > 1

    def _part(
        self,
        model: Any,
        inputs: dict[str, Any],
        rollouts: Rollouts,
        part: Part,
        scores: StepScores | None,
        slot: Slot | None,
        fresh: bool,
        whole: dict[str, Any],
        sums: _PolicySums,
    ) -> tuple[Tensor, Any]:
        """The loss of one part, its share of the step's. fresh: the first update on these rollouts."""
        trainer, args = self.trainer, self.trainer.args
        rows = part.rows(args.num_generations)
        batch = self.policy_batch(inputs, rollouts, part)
        policy, temperature = trainer.policy, args.sampling_temperature
        old = ref = None
        if fresh:
            packed = trainer.reference.logp(policy, batch.inputs, temperature)
            ref = None if packed is None else batch.by_rollout(packed)
        else:
            assert slot is not None
            old, ref = slot.logp(rows, batch.scored.shape[1])
            ref = None if trainer.reference.kind == "none" else ref
        reads = scores is not None and not scores.done
        torch.clear_autocast_cache()  # weights cast without a graph (rollouts, the adapter off) would cut this one
        out = model(**batch.inputs, pools=batch.pools if reads else {}, temperature=temperature)
        logp = batch.by_rollout(out.logp)
        if reads and not part.idle:
            assert scores is not None
            scores.after(part, out.embeddings["gen"].detach(), batch.prompts(out.embeddings["disc"].detach()))
        if part.idle:  # only keeps step with other ranks; its advantages need not be there yet
            return logp.sum() * 0.0, out
        if slot is not None and slot.again and fresh:
            slot.write(rows, logp.detach(), ref)
        loss, found = policy_loss(
            logp,
            old,
            ref,
            rollouts.buffer.advantages[rows],
            batch.mask,
            clip_low=args.epsilon,
            clip_high=args.epsilon_high,
            beta=args.beta,
            loss_type=args.loss_type,
            max_completion_length=args.max_completion_length,
            **whole,
        )
        sums.add(found, sum(map(len, rollouts.responses[rows])), batch.inputs["input_ids"].shape[0])
        return loss, out

    def policy_batch(self, inputs: dict[str, Any], rollouts: Rollouts, part: Part) -> PolicyBatch:
        """The packed batch of a part's prompts and rollouts."""
        trainer = self.trainer
        responses = rollouts.responses[part.rows(trainer.args.num_generations)]
        if not trainer.args.shared_prefix:
            sides = inputs["sides"][part.first : part.stop]
            return separate_policy_batch(trainer.collator, sides, responses, trainer.args.device)
        prompts = take_prompts(inputs["prompts"], range(part.first, part.stop), trainer.collator.vision.merge_size)
        if self._caching and "vision_cache" not in prompts and has_pixels(prompts):
            prompts = prompts | {"vision_cache": VisionCache(keep=True)}
        return shared_policy_batch(prompts, responses)

    # --- before them -------------------------------------------------------------------------------------------------

    def _see_once(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Lets a frozen vision tower run once for rollout, reference and policy."""
        trainer = self.trainer
        self._caching = trainer.args.shared_prefix and trunk_is_frozen(vision_tower(trainer.policy))
        prompts = inputs["prompts"]
        if not self._caching or trainer.gathers or not has_pixels(prompts):
            return inputs
        return inputs | {"prompts": prompts | {"vision_cache": VisionCache(keep=True)}}

    def _rollouts(self, inputs: dict[str, Any], others: Tensor | None, slot: Slot | None) -> Rollouts:
        if slot is not None and slot.rollouts is not None:
            return slot.rollouts
        trainer = self.trainer
        degenerate = None
        if trainer.args.refill_degenerate and trainer.model.training:
            degenerate = DegenerateGroups(trainer, inputs, others)
        with whole_parameters(trainer.policy):
            found = trainer.phase.draw(
                trainer.policy, inputs["sides"], inputs["prompts"], None if slot is None else slot.buffer, degenerate
            )
        if slot is not None:
            slot.rollouts = found
        return found

    def _opposite(self, model: Any, inputs: dict[str, Any]) -> Tensor | None:
        """The current policy's anchors of a side that is not trained."""
        if "opposite" not in inputs:
            return None
        with torch.no_grad():
            return model(**inputs["opposite"]).embeddings["disc"]

    def _global_tokens(self, tokens: int) -> Tensor | int:
        """Scored tokens of all ranks over the ranks (gradients are averaged), where the loss divides by them."""
        trainer = self.trainer
        if trainer.args.loss_type != "token_mean" or trainer.group is None:
            return tokens
        total = torch.tensor(float(tokens)).to(trainer.args.device, non_blocking=True)
        dist.all_reduce(total, group=trainer.group)
        return total / trainer.args.world_size

    def _sync(self, model: nn.Module) -> GradSync:
        if self._wrapped is not model:
            accelerator = self.trainer.accelerator
            # transformers turns this division off for DeepSpeed; the scale of the step is the only one
            options = {"scale_wrt_gas": False} if hasattr(model, "zero_optimization_stage") else {}
            self._made = grad_sync(model, backward=lambda loss: accelerator.backward(loss, **options))
            self._wrapped = model
        return self._made


class _PolicySums:
    """The step's loss and the policy's metrics over its parts."""

    def __init__(self) -> None:
        self.loss: Any = 0.0
        self.policy: Any = 0.0
        self.rows = 0
        self._sums: dict[str, Tensor] = {}

    def add_loss(self, loss: Tensor, part: Part) -> None:
        if not part.idle:
            self.loss = self.loss + loss

    def add(self, found: dict[str, Tensor], tokens: int, rows: int) -> None:
        """found: of ``policy_loss``; tokens: how many it scored; rows: of the forward."""
        self.rows += rows
        self.policy = self.policy + found.pop("policy")
        for name, value in found.items():
            share = value * tokens
            self._sums[name] = self._sums[name] + share if name in self._sums else share

    def means(self, tokens: int) -> dict[str, Tensor]:
        """Means over the scored tokens of the whole step."""
        return {name: total / tokens for name, total in self._sums.items()}
