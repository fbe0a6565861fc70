"""RefineRLTrainer: rewrites are sampled, scored against stable anchors, and reinforced, as a transformers Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from rime_fast.data.collate import Collator
from rime_fast.engine.anchor_bank import AnchorBank
from rime_fast.engine.rollout_backend import LocalBackend, RolloutBackend, Sampling
from rime_fast.recipe.group_rewards import Rewarder
from rime_fast.trainers.anchor_source import AnchorSource
from rime_fast.trainers.base import DualModeTrainer
from rime_fast.trainers.config import RefineConfig
from rime_fast.trainers.policy_batch import use_packed_attention
from rime_fast.trainers.reference import Reference
from rime_fast.trainers.refine_step import RefineStep
from rime_fast.trainers.rollout_batch import IndexedPairs, PromptBatches, RepeatedBatches
from rime_fast.trainers.rollout_phase import RolloutPhase, Rollouts
from rime_fast.trainers.rollout_store import RolloutStore
from rime_fast.trainers.setup import as_pairs, prepare_model


class RefineRLTrainer(DualModeTrainer):
    """Refine-RL (recipe, 4): G rewrites per prompt, rewards to discriminative anchors, clipped policy loss, KL.

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
        _no_dropout(model)
        if args.shared_prefix:
            use_packed_attention(model)
        self.trained = ("query", "target") if args.trained_sides == "both" else (args.trained_sides,)
        chosen = args.template if template is None else template
        self.collator = Collator(processor, chosen, model.config, max_length=args.max_length, ids=False)

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
        self.phase = RolloutPhase(backend, self.collator, processor.tokenizer, sampling, args.refill_degenerate)
        self.reference = Reference(self.model, args.reference, args.beta)
        self.source = AnchorSource(args, self.trained, self.collator, self.group)
        self.rewarder = Rewarder(args.reward_weights(), self.trained, args.num_generations)
        self.store = RolloutStore(self)
        self.step = RefineStep(self)
        self.resuming = False
        self.add_callback(_BanksAtStart(self))

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

    # --- anchors -----------------------------------------------------------------------------------------------------

    @property
    def banks(self) -> dict[tuple[str, str], AnchorBank]:
        """(name of the set: "train", "eval", ..; side) -> its bank, as it is stored."""
        return self.source.banks

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``RimeTrainer.train``; first the anchors are computed, or read back when the run is resumed."""
        self.resuming = bool(resume_from_checkpoint)  # from here on the weights may be a checkpoint's
        self.store.clear()
        if not self.sharded:
            self.make_banks(self.model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers' ``evaluate``: rewards and lengths of sampled rewrites on the evaluation pairs.

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
                    self.source.make(model, self.policy, pairs, resuming=self.resuming, sharded_model=self.sharded)

    # --- the step ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Rollout, reference, policy forward, reward in place, policy loss (first update on a batch); or the policy
        forward and loss on stored rollouts (later updates)."""
        done = self.step.run(model, inputs)
        return (done.loss, done.out) if return_outputs else done.loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As transformers', or a part of the batch at a time (``micro_batch_tokens``)."""
        if self.args.micro_batch_tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        return self.step.train(model, self._prepare_inputs(inputs))

    def observe_step(
        self,
        metrics: dict[str, Tensor],
        of_tokens: dict[str, Tensor],
        drawn: Rollouts | None,
        *,
        samples: int,
        scored: int,
        tokens: int,
    ) -> None:
        """Add a step's metrics, and the counts of its rollouts where it drew them (``drawn``).

        of_tokens: those that are means over the step's ``scored`` tokens. tokens: rows of its policy forwards.
        """
        sums = self.sums if self.model.training else self.eval_sums
        sums.add(of_tokens, weight=scored)
        self.observe(metrics, samples=samples, tokens=tokens)
        if drawn is not None:
            counts = {"format_failed": drawn.format_failed, "unfinished": drawn.unfinished}
            if self.args.refill_degenerate and self.model.training:
                counts["refilled_groups"] = drawn.refilled
            sums.count(**counts)

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
        self.store.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.store.load(Path(checkpoint))


class _BanksAtStart(TrainerCallback):
    """Where a wrapper owns the parameters, the anchors need it in place: they are made when training begins."""

    def __init__(self, trainer: RefineRLTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.make_banks(self.trainer.model_wrapped)


def _no_dropout(model: nn.Module) -> None:
    """Switch dropout off: one forward serves the reward and the update, and the ratio to itself is exactly 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
