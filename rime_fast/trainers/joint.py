"""RimeTrainer: joint training of a dual-mode model on pairs, as a transformers Trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from rime_fast.data.mixture import MixtureDataset
from rime_fast.data.mixture_run import MixtureRun
from rime_fast.data.prompts import PairBatches, without_negatives
from rime_fast.data.records import DataError
from rime_fast.data.row_guard import BAD, GuardedRows
from rime_fast.engine import checkpoint
from rime_fast.engine.finite import finite_rows
from rime_fast.engine.grad_cache import Encoded, GradCache
from rime_fast.engine.packed_batch import Batch, PackedEncoder, Part, part_tokens
from rime_fast.engine.teacher import TeacherRows
from rime_fast.engine.wrappers import dual_mode_of
from rime_fast.model.flops import StepFlops, peak_flops, recomputed
from rime_fast.model.latent import own_targets
from rime_fast.recipe.blocks import by_block
from rime_fast.recipe.distill import bank_distillation, score_distillation
from rime_fast.recipe.false_negatives import mask_ids_of
from rime_fast.recipe.int8 import fake_int8
from rime_fast.recipe.joint import JointLoss, joint_loss, scored_tokens, side_cross_entropy, token_weights
from rime_fast.recipe.set_scores import set_scores
from rime_fast.trainers.anchors import bank_file
from rime_fast.trainers.base import DualModeTrainer
from rime_fast.trainers.callbacks import On
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.policy import use_packed_attention
from rime_fast.trainers.setup import as_pairs, make_collator, prepare_model
from rime_fast.trainers.temperature import Int8Step, LearnableScalar, LearnableTemperature

# Batch entries that are for the loss, not for the model.
LOSS_KEYS = (
    *("side", "query_ids", "key_ids", "negative_ids", "negative_of", "prompt_lengths", "dropped", "rows"),
    *("query_contents", "key_contents", "other_ids", "other_of", "scores", "sets", "blocks"),
)

Rows = dict[str, Tensor]


class RimeTrainer(DualModeTrainer):
    """Trains a dual-mode model on pairs: cross-entropy on both rewrites, contrast in both modes, Cross-Mode Alignment
    (recipe, 3).

        RimeTrainer("Qwen/Qwen2-VL-2B-Instruct", RimeConfig(output_dir="out"), train_dataset="pairs.json").train()

    model: directory or hub name, a stock Qwen2-VL / Qwen2.5-VL / Qwen3-VL, a DualModeModel, or a peft model of these.
    args: RimeConfig. train_dataset: a file of any supported format or a list of files, a list of Pair, a
        datasets.Dataset or any map-style or iterable dataset whose rows are Pair or rows of a supported format; or a
        mixture: a list of sets (MixtureSet, or dicts with its fields). eval_dataset: the same, or a dict of them.
    processing_class (or ``processor``): with ``tokenizer`` and ``image_processor``; default: the one beside the model.
    template: a Template, in place of ``args.template``. peft_config: train an adapter. Everything else goes to Trainer.

    One forward serves both sides, both modes and the cross-entropy. A step goes through the gradient cache: of one
    micro-batch, the plain step, or with ``args.contrastive_batch_size`` and ``args.micro_batch_tokens`` of many, for a
    contrast over any number of pairs (docs/grad_cache.md). Checkpoints, resume,
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
        config = model.config
        self.widths = args.contrast_widths(config.get_text_config().hidden_size)
        if self.widths is not None:
            config.is_matryoshka, config.matryoshka_dimensions = True, self.widths[0]
        chosen, ids = args.template if template is None else template, args.mask_false_negatives or args.teacher_bank
        self.collator = make_collator(processor, chosen, model.config, args, ids=bool(ids))
        if "disc" in args.weights().modes() and not self.collator.template.with_disc:
            raise ValueError(
                f"template {self.collator.template.name!r} has no <disc_emb>; set disc_weight, cross_weight and "
                "same_item_weight to 0, or args.template to 'tte'"
            )
        # without a term that trains or reads rewrites, prompts up to <disc_emb> are all that is needed
        answers = args.weights().scores_tokens() or {"gen", "latent"} & set(args.weights().modes())
        rewrites = bool(answers) and self.collator.template.filler is None
        train, self.bad_rows = as_pairs(train_dataset, "train_dataset", args, self.collator, rewrites=rewrites)

        def opened(source: Any, name: str) -> Any:
            return as_pairs(source, name, args, self.collator, rewrites=rewrites)[0]

        evaluation: Any = opened(None if isinstance(eval_dataset, dict) else eval_dataset, "eval_dataset")
        if isinstance(eval_dataset, dict):
            evaluation = {name: opened(part, name) for name, part in eval_dataset.items()}
        latents = args.latent_tokens > 0
        if latents:
            use_packed_attention(model)
        kwargs.setdefault("data_collator", PairBatches(self.collator, args.hard_negatives, bool(answers), latents))
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
        self.flops, known = StepFlops(model), peak_flops(args.device)
        self.peak = known if args.peak_tflops is None else args.peak_tflops * 1e12
        self.scalars: list[LearnableScalar] = []
        self.temperature: LearnableTemperature | None = None
        if args.learnable_temperature:
            self.temperature = LearnableTemperature(args.temperature, args.temperature_learning_rate, args.device)
            self.scalars.append(self.temperature)
        self.int8: Int8Step | None = None
        if args.int8_weight > 0 and self.weights.modes():
            width, before = config.get_text_config().hidden_size, getattr(config, "int8_step", None)
            self.int8 = Int8Step(width, args.device, before)
            self.scalars.append(self.int8)
        if self.scalars:
            self.add_callback(On(on_optimizer_step=self._step_scalars))
        self.teacher: dict[str, TeacherRows] | None = None
        if args.teacher_bank is not None:
            self.teacher = {
                side: TeacherRows(bank_file(args.teacher_bank, side), args.device) for side in ("query", "target")
            }
        self.mixture = MixtureRun(train, args) if isinstance(train, MixtureDataset) else None
        if self.mixture is not None:
            sampler = self.mixture.sampler
            self.add_callback(On(on_epoch_begin=lambda: sampler.resume(self.state.global_step)))
        elif args.block:
            raise ValueError(f"block is {args.block}; it is for a mixture: a train_dataset that is a list of sets")
        self.cache = GradCache(keep_bytes=args.kept_graphs_gib * 2**30, cost=part_tokens)
        self._step_tokens: Tensor | None = None
        # without a contrast a batch's micro-batches have nothing to do with each other: one serves
        self.micro_batch_tokens = args.micro_batch_tokens if self.weights.modes() else None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Draw the batches of a step as transformers' does. The cross-entropy is the mean over the tokens of all
        accumulated batches together, while each one's loss is divided by their number: so each counts the step's tokens
        over that number."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_tokens = None
        if len(batches) > 1 and self.weights.scores_tokens():
            rows = [sum(batch["lengths"][: _sizes(batch)[0]]) for batch in batches]
            parts = [scored_tokens(own_targets(batch), n) for batch, n in zip(batches, rows, strict=True)]
            total = torch.stack(parts).sum(0).to(self.args.device, non_blocking=True)
            if self.group is not None:
                dist.all_reduce(total, group=self.group)
            self._step_tokens = total / len(batches)
        return batches, items

    def step(self, model: Any, inputs: dict[str, Any], scale: float) -> Tensor:
        """Run the gradient cache's two passes over the batch's micro-batches; a single one keeps its graph and is
        encoded once."""
        encoder, loss, metrics = self._batch(model, inputs, self.micro_batch_tokens)

        def encode(part: Part, scored: bool) -> Encoded:
            with self.compute_loss_context_manager():
                return encoder(part, scored)

        self.cache.sync = self.grad_sync(model, alike=self.micro_batch_tokens is None)
        done = self.cache.step(
            encoder.parts, encode=encode, loss=loss, scale=scale, synchronise=self.accelerator.sync_gradients
        )
        self._observe(inputs, metrics | done.metrics)
        again = max(done.encoded - len(encoder.parts), 0) / max(len(encoder.parts), 1)
        needed, executed = self.flops.of(inputs, again, recomputed(self.model))
        self.sums.count(flop=needed, executed_flop=executed)
        return done.loss * scale

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the joint loss of one packed batch in one forward, with its graph: of evaluation, and for who
        overrides it.

        With return_outputs also what was encoded (``Encoded``).
        """
        encoder, loss, metrics = self._batch(model, inputs, None)
        out = encoder(encoder.parts[0], True)
        total = loss(out.embeddings)
        if out.loss is not None:
            total = total + out.loss
        self._observe(inputs, metrics | out.metrics)
        return (total, out) if return_outputs else total

    def _batch(
        self, model: Any, inputs: dict[str, Any], max_tokens: int | None
    ) -> tuple[PackedEncoder, Callable[[Rows], Tensor], Rows]:
        """What the recipe makes of a batch of ``Collator.collate_pairs``: the encoder of its micro-batches, whose own
        loss is their cross-entropy; the contrast as a function of all embeddings; and what that will log."""
        args, weights, group, world = self.args, self.weights, self.group, max(self.args.world_size, 1)
        batch = {name: value for name, value in inputs.items() if name not in LOSS_KEYS}
        n, hard = _sizes(inputs)
        query_rows = sum(inputs["lengths"][:n])
        device = inputs["input_ids"].device
        targets, counts = batch.pop("targets", None), None
        if weights.scores_tokens():
            counts = self._step_tokens if self.model.training else None
            counts = scored_tokens(own_targets(inputs), query_rows, group) if counts is None else counts
            copies = inputs.get("condensed")
            batch["token_weight"] = token_weights(targets, query_rows, counts, weights, world, copies)
            batch["targets"] = targets
        tau = args.temperature if self.temperature is None else self.temperature.value()
        metrics: Rows = {"temperature": tau} if isinstance(tau, Tensor) else {}

        def cross_entropy(out: Any, part: Part, taken: Batch) -> Rows:
            # a micro-batch's sequences ascend: its queries come first
            rows = sum(length for length, i in zip(taken["lengths"], part.sequences, strict=True) if i < n)
            logp, copies = out.logp.detach(), taken.get("condensed")
            found: Rows = {}
            parts = {"ce": logp} if copies is None else {"ce": logp * ~copies, "ce_latent": logp * copies}
            for name, part_logp in parts.items():
                sides = side_cross_entropy(part_logp, rows, counts, world)  # type: ignore[arg-type]
                found |= {side.replace("ce_", f"{name}/"): value for side, value in sides.items()}
            return found

        def contrast(rows: Rows) -> Tensor:
            rows, sound = finite_rows(encoder.in_order(rows), device)
            queries = {mode: x[:n] for mode, x in rows.items()}
            keys = {mode: x[n:] for mode, x in rows.items()}
            if hard and {"disc", "gen"} <= keys.keys():
                # a hard negative without a rewrite has no g: its d is the candidate of the generative terms [ours]
                keys["gen"] = torch.where((inputs["gen_index"][n:] >= 0)[:, None], keys["gen"], keys["disc"])
            ids = mask_ids_of(inputs, group) if args.mask_false_negatives else None

            def joint_of(queries: Rows, keys: Rows, own: Tensor | slice, among: Tensor | slice) -> JointLoss:
                return joint_loss(
                    torch.zeros((), device=device),
                    {mode: x[own] for mode, x in queries.items()},
                    {mode: x[among] for mode, x in keys.items()},
                    weights=weights,
                    temperature=tau,
                    symmetric=args.symmetric,
                    detach_disc=args.detach_disc_in_cross,
                    query_ids=None if ids is None else ids[0][own],
                    key_ids=None if ids is None else ids[1][among],
                    margin=args.false_negative_margin,
                    dims=None if self.widths is None else self.widths[0],
                    dim_weights=None if self.widths is None else self.widths[1],
                    group=group,
                )

            def compare(queries: Rows, keys: Rows) -> JointLoss:
                of = partial(joint_of, queries, keys)
                with self.compute_loss_context_manager():
                    if args.contrast_scope == "block" and "blocks" in inputs:
                        owners = inputs["negative_of"].tolist() if hard else []
                        return by_block(inputs["blocks"], owners, of, device)
                    return of(slice(None), slice(None))

            joint = compare(queries, keys)
            if self.mixture is not None and "sets" in inputs and self.model.training:
                self._score_sets(inputs, queries, keys, tau, ids, sound)
            found = {f"contrast/{name}": value for name, value in joint.terms.items()}
            found |= {f"hit@1/{name}": value for name, value in joint.accuracy.items()}
            found |= {f"contrast/all@{width}": value for width, value in joint.per_dim.items()}
            total = joint.total
            if self.int8 is not None:
                step = self.int8.value()
                rounded = compare(*({mode: fake_int8(x, step) for mode, x in side.items()} for side in (queries, keys)))
                total = total + args.int8_weight * rounded.total
                metrics["int8_step"] = step
                found |= {"contrast/all@int8": rounded.total.detach()}
                found |= {f"hit@1/{name}@int8": value for name, value in rounded.accuracy.items()}
            total = total + self._distilled(inputs, queries, keys, tau, found)
            metrics.update({name: value * sound for name, value in found.items()})
            return total * sound

        encoder = PackedEncoder(
            model,
            batch,
            max_tokens,
            modes=weights.modes(),
            metrics=cross_entropy,
            merge_size=self.collator.vision.merge_size,
            host_features=args.vision_features_on_host,
        )
        return encoder, contrast, metrics

    def _distilled(self, inputs: dict[str, Any], queries: Rows, keys: Rows, tau: Any, metrics: Rows) -> Tensor | float:
        """The teacher's part of the loss, weighted (0.0 without one); its terms go into ``metrics``."""
        args, n = self.args, _sizes(inputs)[0]
        total: Tensor | float = 0.0
        if args.distill_weight == 0:
            return total
        options: dict[str, Any] = {"temperature": tau, "group": self.group}
        if args.distill_temperature is not None:
            options["teacher_temperature"] = args.distill_temperature
        if self.teacher is not None:
            teacher = self.teacher["query"].of(inputs["query_ids"]), self.teacher["target"].of(inputs["key_ids"])
        for mode, rows in queries.items():
            with torch.autocast(rows.device.type, enabled=False):
                if self.teacher is not None:
                    found = bank_distillation(rows, keys[mode][:n], *teacher, **options)
                else:  # every rank takes part, also one whose rows have no scores
                    scores = inputs.get("scores", rows.new_full((len(keys[mode]),), torch.nan))
                    found = score_distillation(rows, keys[mode], scores, inputs.get("negative_of"), **options)
            metrics[f"distill/{mode}"] = found.detach()
            total = total + args.distill_weight * found
        return total

    def _score_sets(self, inputs: dict[str, Any], queries: Rows, keys: Rows, tau: Any, ids: Any, sound: Tensor) -> None:
        """Adds up loss and hit@1 of each set, of the term that a served embedding is compared by."""
        assert self.mixture is not None
        if (term := self.weights.served_term()) is None:
            return
        query, key = term
        blocks = None
        if self.args.contrast_scope == "block":
            blocks = torch.tensor(inputs["blocks"], device=self.mixture.sums.device)
            if "negative_of" in inputs:
                blocks = torch.cat([blocks, blocks[inputs["negative_of"]]])
        scores = set_scores(
            queries[query],
            keys[key],
            inputs["sets"],
            self.mixture.sums.shape[0],
            temperature=tau,
            query_ids=None if ids is None else ids[0],
            key_ids=None if ids is None else ids[1],
            blocks=blocks,
            group=self.group,
        )
        self.mixture.sums += torch.where(sound.isnan(), 0.0, scores)

    def get_train_dataloader(self) -> Any:
        """Make the loader as transformers' does, or the mixture's own, whose batches depend on seed and step alone."""
        if self.mixture is None:
            return super().get_train_dataloader()
        rows = self.guarded(self.train_dataset)
        return self.mixture.loader(rows, rows.collate)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures of each set of a mixture."""
        if "loss" in logs and self.mixture is not None:
            logs.update(self.mixture.drain(self.state.global_step, self.group))
        super().log(logs, start_time)

    def _observe(self, inputs: dict[str, Any], metrics: Rows) -> None:
        self.observe(metrics, samples=_sizes(inputs)[0], tokens=inputs["input_ids"].shape[0])

    # --- learnable scalars of the loss -------------------------------------------------------------------------------

    def _step_scalars(self) -> None:
        """With the model's optimizer, at the schedule's share of their own learning rates."""
        peak = self.args.learning_rate
        for scalar in self.scalars:
            scalar.step(self._get_learning_rate() / peak if peak > 0 else 1.0, self.group)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', with the step of int8 in the model's config; a checkpoint holds the scalars."""
        if self.int8 is not None:
            dual_mode_of(self.model).config.int8_step = self.int8.value().item()
        super().save_model(output_dir, _internal_call)
        for scalar in self.scalars if self._in_checkpoint and self.args.should_save else []:
            scalar.save(str(output_dir))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        for scalar in self.scalars:
            if (best / scalar.file).is_file():  # else of before an accepted change
                scalar.load(best)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(folder)
        if folder is None or not checkpoint.has_optimizer(folder):
            return
        for scalar in self.scalars:
            scalar.load(folder)
            if scalar is self.temperature and self.rate_change(folder, "temperature_learning_rate") != 1.0:
                scalar.learning_rate = self.args.temperature_learning_rate
            else:  # as the model's own is scaled
                scalar.learning_rate *= self.rate_change(folder, "learning_rate")

    def model_facts(self) -> dict[str, Any]:
        """Adds the teacher's banks."""
        banks = {} if self.teacher is None else {side: rows.digest for side, rows in self.teacher.items()}
        return super().model_facts() | {"teacher": banks}

    def check_start(self) -> None:
        super().check_start()
        self._check_contrast()
        scores = self.args.distill_weight > 0 and self.teacher is None
        if self.weights.scores_tokens() or scores:
            rows = GuardedRows(self.train_dataset, self.collator.collate_pairs, self.args.on_bad_row == "skip")
            batch = rows.collate([rows[i] for i in range(0, len(rows), max(1, len(rows) // 4))][:4])
            if BAD in batch:
                raise DataError("\n".join(batch[BAD]))
            if scores and "scores" not in batch:
                raise ValueError(
                    f"distill_weight is {self.args.distill_weight}, but no row looked at has scores; expected `scores` "
                    "in train_dataset (docs/data.md), or teacher_bank"
                )
            if self.weights.scores_tokens() and not bool((batch["targets"] >= 0).any()):
                raise ValueError(
                    "no token of rows all over train_dataset is scored: cross-entropy has nothing to train on; "
                    "expected rewrites, or ce_query_weight=0 and ce_target_weight=0"
                )

    def _check_contrast(self) -> None:
        """Refuse, or warn of where something else is trained, a contrast without negatives: its loss is 0."""
        args = self.args
        data: Any = self.train_dataset
        together = args.block if args.contrast_scope == "block" else args.train_batch_size * max(args.world_size, 1)
        together = min(together, len(data))
        if not self.weights.modes() or (self.weights.same_item > 0 and together > 1):
            return
        rows = GuardedRows(data, self.collator.collate_pairs, skip=True)
        looked_at = (rows[i][1] for i in range(0, len(data), -(-len(data) // 256)))
        most = sys.maxsize if args.hard_negatives is None else args.hard_negatives
        pairs = (row.with_negatives(most) for row in looked_at if not isinstance(row, DataError))
        if not without_negatives(pairs, together, args.mask_false_negatives):
            return
        why = "all rows looked at have the same target"
        if together == 1:
            why = "a batch of all ranks is one pair, and no row looked at has hard negatives"
        found = f"the contrast has nothing to learn, its loss is 0: {why}"
        if not self.weights.scores_tokens() and args.distill_weight == 0:
            raise ValueError(f"{found}; expected a larger per_device_train_batch_size, or other rows")
        self._tell(f"warning: {found}; the other terms are trained")


def _sizes(inputs: dict[str, Any]) -> tuple[int, int]:
    """(pairs, hard negatives) of a packed batch of pairs."""
    hard = inputs["negative_of"].shape[0] if "negative_of" in inputs else 0
    return (len(inputs["lengths"]) - hard) // 2, hard
