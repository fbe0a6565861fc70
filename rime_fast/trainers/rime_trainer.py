"""RimeTrainer: joint training of a dual-mode model on pairs, as a transformers Trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rime_fast.data.collate import Collator
from rime_fast.recipe.joint import joint_loss, scored_tokens, side_cross_entropy, token_weights
from rime_fast.trainers.base import DualModeTrainer
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.setup import as_pairs, prepare_model
from rime_fast.trainers.temperature import LearnableTemperature

# Batch entries that are for the loss, not for the model.
LOSS_KEYS = ("side", "query_ids", "key_ids", "negative_ids", "negative_of", "prompt_lengths", "dropped")


class RimeTrainer(DualModeTrainer):
    """Joint training: cross-entropy on both rewrites, contrast in both modes, Cross-Mode Alignment (recipe, 3).

        RimeTrainer("Qwen/Qwen2-VL-2B-Instruct", RimeConfig(output_dir="out"), train_dataset="pairs.json").train()

    model: directory or hub name, a stock Qwen2-VL / Qwen2.5-VL / Qwen3-VL, a DualModeModel, or a peft model of these.
    args: RimeConfig. train_dataset: a file of any supported format or a list of files, a list of Pair, a
        datasets.Dataset or any map-style dataset whose rows are Pair or rows of a supported format. eval_dataset: the
        same, or a dict of them.
    processing_class (or ``processor``): with ``tokenizer`` and ``image_processor``; default: the one beside the model.
    template: a Template, in place of ``args.template``. peft_config: train an adapter. Everything else goes to Trainer.

    One forward a step serves both sides, both modes and the cross-entropy. Checkpoints, resume, callbacks, loggers,
    DDP, FSDP and DeepSpeed work as in Trainer; ``save_model`` writes a directory that stock transformers loads.
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
            processor, args.template if template is None else template, model.config, max_length=args.max_length,
            ids=args.mask_false_negatives,
        )  # fmt: skip
        rewrites = self.collator.template.filler is None
        train, self.bad_rows = as_pairs(train_dataset, "train_dataset", args, self.collator, rewrites=rewrites)

        def opened(source: Any, name: str) -> Any:
            return as_pairs(source, name, args, self.collator, rewrites=rewrites)[0]

        evaluation: Any = opened(None if isinstance(eval_dataset, dict) else eval_dataset, "eval_dataset")
        if isinstance(eval_dataset, dict):
            evaluation = {name: opened(part, name) for name, part in eval_dataset.items()}
        kwargs.setdefault("data_collator", PairBatches(self.collator, args.hard_negatives))
        super().__init__(
            model=model, args=args, train_dataset=train, eval_dataset=evaluation, processing_class=processor,
            callbacks=callbacks, **kwargs,
        )  # fmt: skip
        self.weights = args.weights()
        self.temperature: LearnableTemperature | None = None
        if args.learnable_temperature:
            self.temperature = LearnableTemperature(args.temperature, args.temperature_learning_rate, args.device)
            self.add_callback(_TemperatureSteps(self))

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        """The joint loss of one packed batch: one forward, and the recipe's functions on what it returns."""
        group, world = self.group, max(self.args.world_size, 1)
        loss_inputs = {key: inputs.pop(key) for key in LOSS_KEYS if key in inputs}
        negatives = loss_inputs["negative_of"].shape[0] if "negative_of" in loss_inputs else 0
        n = (len(inputs["lengths"]) - negatives) // 2
        query_rows = sum(inputs["lengths"][:n])
        modes = self.weights.modes()
        pools = {mode: inputs.pop(f"{mode}_index") for mode in ("disc", "gen")}
        targets = inputs.pop("targets")
        scored = self.weights.ce_query > 0 or self.weights.ce_target > 0
        metrics: dict[str, Tensor] = {}
        if scored:
            counts = scored_tokens(targets, query_rows, group)
            weight = token_weights(targets, query_rows, counts, self.weights, world)
            inputs |= {"targets": targets, "token_weight": weight}
        out = model(**inputs, pools={mode: pools[mode] for mode in modes})
        if scored:
            for name, value in side_cross_entropy(out.logp.detach(), query_rows, counts, world).items():
                metrics[name.replace("_", "/")] = value
        queries, keys = _sides(out.embeddings, pools["gen"] if negatives else None, n)
        ids = loss_inputs.get("key_ids")
        tau = self.args.temperature if self.temperature is None else self.temperature.value()
        joint = joint_loss(
            out.loss if scored else targets.new_zeros((), dtype=torch.float32),
            queries,
            keys,
            weights=self.weights,
            temperature=tau,
            symmetric=self.args.symmetric,
            detach_disc=self.args.detach_disc_in_cross,
            # a key is no negative when it equals the query's own positive
            query_ids=ids,
            key_ids=torch.cat([ids, loss_inputs["negative_ids"]]) if ids is not None and negatives else ids,
            margin=self.args.false_negative_margin,
            group=group,
        )
        metrics |= {f"contrast/{name}": value for name, value in joint.terms.items()}
        metrics |= {f"hit@1/{name}": value for name, value in joint.accuracy.items()}
        if isinstance(tau, Tensor):
            metrics["temperature"] = tau
        self.observe(metrics, samples=n, tokens=inputs["input_ids"].shape[0])
        return (joint.total, out) if return_outputs else joint.total

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


Rows = dict[str, Tensor]


def _sides(embeddings: Rows, gen_index: Tensor | None, n: int) -> tuple[Rows, Rows]:
    """Queries' and keys' rows per mode. gen_index is given where there are hard negatives: one without a rewrite has
    no g, and its d stands in as a candidate of the generative terms [ours]."""
    queries = {mode: rows[:n] for mode, rows in embeddings.items()}
    keys = {mode: rows[n:] for mode, rows in embeddings.items()}
    if gen_index is not None and "gen" in keys and "disc" in keys:
        keys["gen"] = torch.where((gen_index[n:] >= 0)[:, None], keys["gen"], keys["disc"])
    return queries, keys


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
