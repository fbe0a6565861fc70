"""RimeTrainer: joint training of a dual-mode model on pairs, as a transformers Trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rime_fast.data.collate import Collator
from rime_fast.recipe.joint import side_cross_entropy
from rime_fast.trainers.base import DualModeTrainer
from rime_fast.trainers.cached_step import CachedTraining
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.pair_loss import PairBatch, joint_metrics
from rime_fast.trainers.setup import as_pairs, prepare_model
from rime_fast.trainers.temperature import LearnableTemperature


class RimeTrainer(DualModeTrainer):
    """Joint training: cross-entropy on both rewrites, contrast in both modes, Cross-Mode Alignment (recipe, 3).

        RimeTrainer("Qwen/Qwen2-VL-2B-Instruct", RimeConfig(output_dir="out"), train_dataset="pairs.json").train()

    model: directory or hub name, a stock Qwen2-VL / Qwen2.5-VL / Qwen3-VL, a DualModeModel, or a peft model of these.
    args: RimeConfig. train_dataset: a file of any supported format or a list of files, a list of Pair, a
        datasets.Dataset or any map-style dataset whose rows are Pair or rows of a supported format. eval_dataset: the
        same, or a dict of them.
    processing_class (or ``processor``): with ``tokenizer`` and ``image_processor``; default: the one beside the model.
    template: a Template, in place of ``args.template``. peft_config: train an adapter. Everything else goes to Trainer.

    One forward a step serves both sides, both modes and the cross-entropy; with ``args.contrastive_batch_size`` and
    ``args.micro_batch_tokens`` the contrast runs over any number of pairs (docs/grad_cache.md). Checkpoints, resume,
    callbacks, loggers, DDP, FSDP and DeepSpeed work as in Trainer; ``save_model`` writes a directory that stock
    transformers loads.
    """

    title = "joint training"
    args: RimeConfig

    def __init__(
        self,
        model: Any,
        args: RimeConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        processor: Any = None,
        template: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = RimeConfig(output_dir="rime-output") if args is None else args
        if not isinstance(args, RimeConfig):
            raise TypeError(f"args is {type(args).__name__}; expected RimeConfig")
        model, processor, _ = prepare_model(model, processing_class or processor, args, peft_config)
        self.collator = Collator(
            processor,
            args.template if template is None else template,
            model.config,
            max_length=args.max_length,
            ids=args.mask_false_negatives,
        )
        rewrites = self.collator.template.filler is None
        train, self.bad_rows = as_pairs(train_dataset, "train_dataset", args, self.collator, rewrites=rewrites)

        def opened(source: Any, name: str) -> Any:
            return as_pairs(source, name, args, self.collator, rewrites=rewrites)[0]

        evaluation: Any = opened(None if isinstance(eval_dataset, dict) else eval_dataset, "eval_dataset")
        if isinstance(eval_dataset, dict):
            evaluation = {name: opened(part, name) for name, part in eval_dataset.items()}
        kwargs.setdefault("data_collator", PairBatches(self.collator, args.hard_negatives))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processor,
            callbacks=callbacks,
            **kwargs,
        )
        self.weights = args.weights()
        self.temperature: LearnableTemperature | None = None
        if args.learnable_temperature:
            self.temperature = LearnableTemperature(args.temperature, args.temperature_learning_rate, args.device)
            self.add_callback(_TemperatureSteps(self))
        # without a contrast a batch's parts have nothing to do with each other: a plain step serves
        cached = args.micro_batch_tokens is not None and bool(self.weights.modes())
        self.cached = CachedTraining(self) if cached else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The joint loss of one packed batch: one forward, and the recipe's functions on what it returns."""
        group, world = self.group, max(self.args.world_size, 1)
        pairs = PairBatch.of(inputs, self.args, group)
        out = model(**pairs.model_inputs, pools=pairs.pools)
        metrics: dict[str, Tensor] = {}
        if pairs.counts is not None:
            found = side_cross_entropy(out.logp.detach(), pairs.query_rows, pairs.counts, world)
            metrics = {name.replace("_", "/"): value for name, value in found.items()}
        ce = inputs["targets"].new_zeros((), dtype=torch.float32) if pairs.counts is None else out.loss
        tau = self.args.temperature if self.temperature is None else self.temperature.value()
        joint = pairs.joint(ce, out.embeddings, self.args, tau, group)
        metrics |= joint_metrics(joint, tau)
        self.observe(metrics, samples=pairs.n, tokens=inputs["input_ids"].shape[0])
        return (joint.total, out) if return_outputs else joint.total

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As transformers', or through the gradient cache (``micro_batch_tokens``)."""
        if self.cached is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        return self.cached.step(model, self._prepare_inputs(inputs))

    # --- the temperature is part of a checkpoint ---------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.temperature is not None and self.args.should_save:
            self.temperature.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.temperature is not None and checkpoint is not None:
            self.temperature.load(Path(checkpoint))


class PairBatches:
    """The DataLoader's collate function: at most ``hard_negatives`` of each pair (None: all), then the collator."""

    def __init__(self, collator: Collator, hard_negatives: int | None) -> None:
        self.collator, self.hard_negatives = collator, hard_negatives

    def __call__(self, pairs: list[Any]) -> dict[str, Any]:
        if self.hard_negatives is not None:
            few = self.hard_negatives
            pairs = [replace(p, negatives=p.negatives[:few]) if len(p.negatives) > few else p for p in pairs]
        return self.collator.collate_pairs(pairs)


class _TemperatureSteps(TrainerCallback):
    """Steps the temperature with the model's optimizer, at the schedule's share of its own learning rate."""

    def __init__(self, trainer: RimeTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        assert trainer.temperature is not None
        peak = args.learning_rate
        factor = trainer._get_learning_rate() / peak if peak > 0 else 1.0
        trainer.temperature.step(factor, trainer.group)
