"""RefineRLTrainer: rewrites are generated, scored against stable anchors, and reinforced, as a transformers Trainer."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rime_fast.data.prompts import IndexedPairs, PromptBatches, RepeatedBatches
from rime_fast.engine.anchor_bank import AnchorBank
from rime_fast.engine.packed_batch import PackedBatch, plan_micro_batches
from rime_fast.engine.rollout import LocalBackend, RolloutBackend, Sampling
from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.engine.wrappers import GradSync, vision_tower, whole_parameters
from rime_fast.model.vision_cache import VisionCache, has_pixels, trunk_is_frozen
from rime_fast.recipe.group_rewards import RewardBuffers, Rewarder, SideAnchors
from rime_fast.recipe.refine import policy_loss
from rime_fast.trainers.anchors import AnchorSource
from rime_fast.trainers.base import DualModeTrainer
from rime_fast.trainers.callbacks import On
from rime_fast.trainers.config import RefineConfig
from rime_fast.trainers.policy import (
    PolicyBatch,
    Reference,
    no_dropout,
    policy_rows,
    separate_policy_batch,
    shared_policy_batch,
    use_packed_attention,
)
from rime_fast.trainers.rollouts import Drawn, Draws, RolloutGenerator, RolloutStore, malformed, mean_over_ranks
from rime_fast.trainers.setup import as_pairs, make_collator, prepare_model


class RefineRLTrainer(DualModeTrainer):
    """Trains by Refine-RL (recipe, 4): G rewrites per prompt, rewards to discriminative anchors, clipped policy loss,
    KL.

        RefineRLTrainer("runs/sft", RefineConfig(output_dir="runs/rl"), train_dataset="rl.json").train()

    Arguments as ``RimeTrainer``, and ``rollout_backend``: who decodes (default: the policy). The pairs need no
    rewrites. Start from a jointly trained model: its discriminative embeddings are the anchors, computed once for the
    whole set and kept in ``output_dir`` (or made before, ``args.anchor_bank``). A step is: rollout, one reference
    forward, one policy forward whose g is scored and whose log-probs are reinforced, one backward; a prompt's rows
    stand once for its G rewrites, and ``args.micro_batch_tokens`` cuts a large step into parts (docs/refine.md).
    """

    title = "Refine-RL"
    args: RefineConfig

    def __init__(
        self,
        model: Any,
        args: RefineConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        processor: Any = None,
        template: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        rollout_backend: RolloutBackend | None = None,
        **kwargs: Any,
    ) -> None:
        args = RefineConfig(output_dir="refine-output") if args is None else args
        if not isinstance(args, RefineConfig):
            raise TypeError(f"args is {type(args).__name__}; expected RefineConfig")
        if args.fsdp and int(args.fsdp_config.get("version", 2)) != 2:  # type: ignore[union-attr]
            raise ValueError("fsdp_config['version'] is 1; expected 2: rollouts gather the parameters by FSDP2's means")
        model, processor, tokens = prepare_model(model, processing_class or processor, args, peft_config)
        if args.anchor_dims is not None and args.anchor_dims > (size := model.config.get_text_config().hidden_size):
            raise ValueError(f"anchor_dims is {args.anchor_dims}; the model's embeddings have {size} numbers")
        no_dropout(model)
        if args.shared_prefix:
            use_packed_attention(model)
        self.trained = ("query", "target") if args.trained_sides == "both" else (args.trained_sides,)
        chosen = args.template if template is None else template
        self.collator = make_collator(processor, chosen, model.config, args, ids=False)

        self.args, self.bad_rows = args, 0
        train = self._opened(train_dataset, "train")
        evaluation: Any = self._opened(None if isinstance(eval_dataset, dict) else eval_dataset, "eval")
        if isinstance(eval_dataset, dict):
            evaluation = {name: self._opened(part, f"eval-{name}") for name, part in eval_dataset.items()}
        opposite = args.reward_mode == "anchor" and args.anchors == "policy" and len(self.trained) == 1
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processor,
            callbacks=callbacks,
            data_collator=PromptBatches(self.collator, self.trained, opposite),
            **kwargs,
        )
        sampling = Sampling(
            gen_id=tokens.gen_id,
            group_size=args.num_generations,
            max_new_tokens=args.max_completion_length,
            temperature=args.sampling_temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            repetition_limit=args.repetition_limit,
            pad_id=processor.tokenizer.pad_token_id or 0,
            suppress_ids=(self.collator.image_id, self.collator.video_id),
        )
        backend = rollout_backend or LocalBackend(args.rollout_batch)
        self.generator = RolloutGenerator(backend, self.collator, processor.tokenizer, sampling, args.refill_degenerate)
        self.reference = Reference(self.model, args.reference, args.beta)
        self.anchors = AnchorSource(args, self.trained, self.collator, self.group)
        self.rewarder = Rewarder(args.reward_weights(), self.trained, args.num_generations, args.anchor_dims)
        ahead, batches = args.loss_type == "token_mean", args.gradient_accumulation_steps
        self.store = RolloutStore(args.num_iterations, batches, args.device, args.process_index, ahead)
        self.draws = Draws()
        self.resuming = False
        # where a wrapper owns the parameters, the anchors need it in place
        self.add_callback(On(on_train_begin=lambda: self.make_banks(self.model_wrapped)))

    def _opened(self, source: Any, name: str) -> Any:
        pairs, bad = as_pairs(source, name, self.args, self.collator, rewrites=False)
        self.bad_rows += bad
        return None if pairs is None else IndexedPairs(pairs, name)

    @property
    def policy(self) -> Any:
        """The model without its wrappers."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def sharded(self) -> bool:
        """Whether a wrapper owns the parameters: a forward before training begins is then impossible."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    @property
    def gathers(self) -> bool:
        """Whether every forward gathers parameters from other ranks (ZeRO-3, FSDP2)."""
        plugin: Any = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (self.is_deepspeed_enabled and plugin.zero_stage == 3)

    # --- the banks of anchors ----------------------------------------------------------------------------------------

    @property
    def banks(self) -> dict[tuple[str, str], AnchorBank]:
        """The banks as they are stored, by (name of the set: "train", "eval", ..; side)."""
        return self.anchors.banks

    def before_training(self, resume: str | None) -> None:
        """Compute the anchors, or reads them back when the run is resumed."""
        self.resuming = resume is not None  # from here on the weights may be a checkpoint's
        self.store.clear()
        self.draws.expect(())
        if self.resuming or not self.sharded:  # a resumed run only reads those of a sharded model
            self.make_banks(self.model)
        super().before_training(resume)

    def frozen_part(self) -> Any:
        """As the base's, or the KL's reference where it is a copy of the model as it was at the start."""
        return super().frozen_part() if self.reference.copy is None else self.reference.copy

    def run_facts(self) -> dict[str, Any]:
        """Adds the training set's anchors."""
        return super().run_facts() | {"anchors of": self.anchors.facts()}

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as transformers' ``evaluate`` does: rewards and lengths of sampled rewrites on the evaluation pairs.

        The anchors of a dataset that the trainer was not made with are the current model's.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, (str, IndexedPairs)):
            eval_dataset = self._opened(eval_dataset, f"given-{len(self.banks)}")
        self.make_banks(self.model, eval_dataset if isinstance(eval_dataset, IndexedPairs) else None)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def make_banks(self, model: Any, more: IndexedPairs | None = None) -> None:
        """Compute the anchors that are not there yet, with ``model`` as it is now."""
        many = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        with self.clock.paused():
            for pairs in (self.train_dataset, *many.values(), more):
                if pairs is not None:
                    self.anchors.make(model, self.policy, pairs, resuming=self.resuming, sharded_model=self.sharded)

    # --- the step ----------------------------------------------------------------------------------------------------

    def step(self, model: Any, inputs: dict[str, Any], scale: float) -> Tensor:
        """Run a training step on one batch, a part of it at a time (``micro_batch_tokens``)."""
        sync = self.grad_sync(model, alike=self.args.micro_batch_tokens is None)
        return self.generate_score_reinforce(model, inputs, sync, scale) * scale

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of one batch with its graph: of evaluation, and for who overrides it. No
        outputs beside it."""
        loss = self.generate_score_reinforce(model, inputs)
        return (loss, {}) if return_outputs else loss

    def generate_score_reinforce(
        self, model: Any, inputs: dict[str, Any], sync: GradSync | None = None, scale: float = 1.0
    ) -> Tensor:
        """Run Refine-RL on one batch of N prompts, each with G rollouts (recipe, 4); returns its loss, 0-d.

        sync: runs each part's backward, of its loss times ``scale``; without it the loss keeps its graph.
        """
        args, training = self.args, self.model.training
        prompts, temperature, size = len(inputs["sides"]), args.sampling_temperature, args.num_generations
        frozen = args.shared_prefix and trunk_is_frozen(vision_tower(self.policy))
        with self.compute_loss_context_manager():
            # generate rollouts, or reuse those of the update before
            if training:
                drawn = self.draws.next(inputs, lambda batch: self._draw(model, self._prepare_inputs(batch), frozen))
            else:
                drawn = self._draw(model, inputs, frozen)
            inputs, rollouts, first_update, opposite = drawn.inputs, drawn.rollouts, drawn.first_update, drawn.opposite
            tokens = sum(map(len, rollouts.rewrites))

            # cut the batch into parts of neighbouring prompts
            packed = PackedBatch(inputs["prompts"], self.collator.vision.merge_size)
            parts, several, visual = self._cut(packed, rollouts, self.sharded if sync is None else sync.lockstep)
            frozen = frozen and (visual or not self.gathers)  # kept features run fewer modules: not while in step

            # anchors; where a reward needs the whole batch, or outlives the update, it is of the states of decoding
            scores = RewardBuffers.over(rollouts.rewards, rollouts.advantages, size)
            scored = not first_update
            anchors: dict[str, SideAnchors] | None = None
            if first_update and not self.anchors.together:
                anchors = self.anchors.of(inputs, opposite=opposite)
            if first_update and ((training and args.num_iterations > 1) or (several and self.anchors.together)):
                gen, disc = (
                    rollouts.embeddings()
                    if rollouts.has_states
                    else self._encode(model, inputs, packed, rollouts, parts, frozen)
                )
                anchors = anchors or self.anchors.of(inputs, gen, disc, opposite)
                self.rewarder(scores, anchors, gen, disc, rollouts.format_ok, rollouts.lengths)
                scored = True

        averaged = self.group if args.loss_type == "token_mean" else None  # as gradients are
        step_tokens = mean_over_ranks(drawn.tokens, averaged, args.device)
        valid = torch.where(rollouts.logp.isnan().any(), torch.nan, 1.0)  # NaN: tokens of no distribution
        loss: Any = 0.0
        policy: Any = 0.0
        sums: dict[str, Any] = defaultdict(float)  # of metrics over scored tokens
        rows_run = 0
        for turn, (part, idle) in enumerate(parts):
            rows = slice(part.start * size, part.stop * size)
            with self.compute_loss_context_manager(), nullcontext() if sync is None else sync.local():
                batch = self._policy_batch(inputs, packed, rollouts, part, frozen)

                # reference log-probs, and those of the first update
                if first_update:
                    old, reference = None, self.reference.logp(self.policy, batch.inputs, temperature)
                    reference = None if reference is None else batch.by_rollout(reference)
                else:
                    longest = batch.mask.shape[1]
                    old, reference = rollouts.old_logp[rows, :longest], rollouts.ref_logp[rows, :longest]
                    reference = None if self.reference.kind == "none" else reference

                # policy forward
                torch.clear_autocast_cache()  # weights cast without a graph (rollouts, adapter off) would cut this one
                pools = {} if scored else batch.pools
                out = model(**batch.inputs, pools=pools, temperature=temperature, entropy=True)
                logp = batch.by_rollout(out.logp)

                # score in place, by the very embeddings that this forward made
                if not (scored or idle):
                    gen, disc = out.embeddings["gen"].detach(), batch.prompts(out.embeddings["disc"].detach())
                    found_by = anchors or self.anchors.of(inputs, gen, disc, opposite)
                    ok, lengths = rollouts.format_ok[rows], rollouts.lengths[rows]
                    self.rewarder(scores, found_by, gen, disc, ok, lengths, part.start)

                # policy loss
                if idle:  # only keeps step with other ranks; its advantages need not be there yet
                    part_loss = logp.sum() * 0.0
                else:
                    part_loss, found = policy_loss(
                        logp,
                        old,
                        reference,
                        rollouts.advantages[rows],
                        batch.mask,
                        n_rows=drawn.prompts * size,
                        n_tokens=step_tokens,
                        clip_low=args.epsilon,
                        clip_high=args.epsilon_high,
                        beta=args.beta,
                        loss_type=args.loss_type,
                        max_completion_length=args.max_completion_length,
                    )
                    found["entropy"] = batch.token_mean(out.entropy.detach())
                    part_loss = part_loss * valid
                    policy = policy + found.pop("policy") * valid
                    loss = loss + (part_loss if sync is None else part_loss.detach())
                    part_tokens = sum(map(len, rollouts.rewrites[rows]))
                    for name, value in found.items():
                        sums[name] = sums[name] + value * part_tokens
                    rows_run += batch.inputs["input_ids"].shape[0]
                    if first_update:
                        rollouts.keep_logp(rows, logp.detach(), reference)

            # backward
            if sync is not None:
                last = turn == len(parts) - 1
                sync.backward(part_loss * scale, last=last and self.accelerator.sync_gradients)

        metrics = {"policy_loss": policy}
        if first_update:
            metrics |= scores.metrics() | {"rewrite_tokens": rollouts.lengths.float().mean()}
        target = self.sums if training else self.eval_sums
        target.add({name: total / tokens for name, total in sums.items()}, weight=tokens)
        self.observe(metrics, samples=prompts * size, tokens=rows_run)
        if first_update:
            target.count(format_failed=rollouts.format_failed, unfinished=rollouts.unfinished)
            target.count(rollouts=prompts * size)
            if args.refill_degenerate and training:
                target.count(refilled_groups=rollouts.refilled)
        return loss

    # --- its stations ------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any) -> Any:
        """Draw the batches of a step as transformers' does; rollouts of all come first where the loss needs them."""
        found = super().get_batch_samples(*args)
        self.draws.expect(found[0], ahead=self.args.loss_type == "token_mean")
        return found

    def _draw(self, model: Any, inputs: dict[str, Any], frozen: bool) -> Drawn:
        """A batch with its rollouts."""
        # a frozen vision tower sees an image once, for rollouts, reference and policy
        if frozen and not self.gathers and has_pixels(inputs["prompts"]):
            inputs = inputs | {"prompts": inputs["prompts"] | {"vision_cache": VisionCache(keep=True)}}
        kept, first = self.store.next(len(inputs["sides"])) if self.model.training else (None, True)
        opposite = self._opposite_anchors(model, inputs) if first else None
        return Drawn(inputs, self._generate(inputs, opposite, kept) if kept is None or first else kept, first, opposite)

    def _opposite_anchors(self, model: Any, inputs: dict[str, Any]) -> Tensor | None:
        """The current policy's anchors of a side that is not trained."""
        if "opposite" not in inputs:
            return None
        with torch.no_grad():
            return model(**inputs["opposite"]).embeddings["disc"]

    def _generate(self, inputs: dict[str, Any], opposite: Tensor | None, out: RolloutBuffer | None) -> RolloutBuffer:
        """G rollouts of every prompt; in training degenerate groups are drawn again (``refill_degenerate``)."""
        anchors: dict[str, SideAnchors] = {}

        def degenerate(rollouts: RolloutBuffer) -> Tensor:
            """Whose groups say nothing, by the rewards of the states that decoding left."""
            if not rollouts.has_states:
                raise ValueError(
                    f"refill_degenerate: {type(self.generator.backend).__name__} gives no gen_states and disc_states; "
                    "expected a backend that does, such as LocalBackend, or refill_degenerate=0"
                )
            gen, disc = rollouts.embeddings()
            anchors.update(anchors or self.anchors.of(inputs, gen, disc, opposite))
            scores = RewardBuffers.make(rollouts.prompts, self.args.num_generations, gen.device)
            self.rewarder(scores, anchors, gen, disc, rollouts.format_ok, rollouts.lengths)
            return scores.degenerate()

        refills = self.args.refill_degenerate and self.model.training
        with whole_parameters(self.policy):
            rollouts = self.generator.generate(
                self.policy, inputs["sides"], inputs["prompts"], out, degenerate if refills else None
            )
        if self.model.training:
            self.store.keep(rollouts)
        return rollouts

    def _cut(
        self, packed: PackedBatch, rollouts: RolloutBuffer, lockstep: bool
    ) -> tuple[list[tuple[range, bool]], bool, bool]:
        """(this rank's parts: the prompts, and whether it is idle, run only because other ranks have more; whether any
        rank has several; whether all parts of all ranks have an image)."""
        args = self.args
        costs = policy_rows(packed.lengths, rollouts.rewrites, args.shared_prefix)
        groups = plan_micro_batches(costs, args.micro_batch_tokens, neighbours=True)
        parts = [(range(group[0], group[-1] + 1), False) for group in groups]
        most, visual = len(parts), all(packed.has_pixels(part) for part, _ in parts)
        if self.group is not None and (args.micro_batch_tokens is not None or self.gathers):
            most, everywhere = GradSync(group=self.group).agree(most, int(visual))
            visual = bool(everywhere)
        if lockstep:
            cheapest = min((part for part, _ in parts), key=lambda part: sum(costs[i] for i in part))
            parts = [(cheapest, True)] * (most - len(parts)) + parts
        return parts, most > 1, visual

    def _policy_batch(
        self, inputs: dict[str, Any], packed: PackedBatch, rollouts: RolloutBuffer, part: range, frozen: bool
    ) -> PolicyBatch:
        """The packed batch of a part's prompts and rollouts."""
        size = self.args.num_generations
        rewrites = rollouts.rewrites[part.start * size : part.stop * size]
        if not self.args.shared_prefix:
            sides = inputs["sides"][part.start : part.stop]
            return separate_policy_batch(self.collator, sides, rewrites, self.args.device)
        prompts = packed.take(part)
        if frozen and "vision_cache" not in prompts and packed.has_pixels(part):
            prompts["vision_cache"] = VisionCache(keep=True)
        return shared_policy_batch(prompts, rewrites)

    @torch.no_grad()
    def _encode(
        self,
        model: Any,
        inputs: dict[str, Any],
        packed: PackedBatch,
        rollouts: RolloutBuffer,
        parts: list[tuple[range, bool]],
        frozen: bool,
    ) -> tuple[Tensor, Tensor]:
        """(g, d) of all rollouts and prompts by one more forward, where decoding left no states."""
        gens, discs = [], []
        for part, idle in parts:
            batch = self._policy_batch(inputs, packed, rollouts, part, frozen)
            batch.inputs.pop("targets")
            out = model(**batch.inputs, pools=batch.pools)
            if not idle:
                gens.append(out.embeddings["gen"])
                discs.append(batch.prompts(out.embeddings["disc"]))
        return torch.cat(gens), torch.cat(discs)

    def warning_of(self, logs: dict[str, float]) -> str:
        """Warn where (nearly) all rollouts are malformed, with the likeliest cause."""
        return malformed(logs, self.args.max_completion_length)

    # --- several updates per rollout batch ---------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.num_iterations == 1 or dataset is None:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * max(self.args.world_size, 1)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedBatches(len(dataset), rows, self.args.num_iterations, seed)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.store.save(Path(output_dir), self.state.global_step)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(folder)
        if folder is not None:
            for rollouts in self.store.load(Path(folder), self.state.global_step):
                self.generator.look_at(rollouts)
