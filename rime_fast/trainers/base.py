"""What both trainers share: metrics read at logging steps only, rates, progress, Ctrl-C, and a plain start-up."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial as bind
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from rime_fast.data.records import DataError
from rime_fast.data.row_guard import BAD, LEFT_OUT, GuardedRows
from rime_fast.data.workers import worker_context
from rime_fast.engine import checkpoint
from rime_fast.engine.finite import FiniteGuard, NonFiniteError, describe_step
from rime_fast.engine.launch import pass_on
from rime_fast.engine.resume import ResumedRuns
from rime_fast.engine.wrappers import GradSync, grad_sync
from rime_fast.model.card import write_card
from rime_fast.ops.collectives import of_all_ranks
from rime_fast.trainers.callbacks import (
    EndsCallback,
    InterruptCallback,
    MetricSums,
    ProgressCallback,
    StepClock,
    card_facts,
    rates,
    settings_that_count,
    tell,
    tokens_of,
)
from rime_fast.trainers.config import CommonConfig

logger = logging.get_logger(__name__)
RATES = ("learning_rate", "temperature_learning_rate")
LENGTHS = ("max_steps", "num_train_epochs")


class DualModeTrainer(ResumedRuns):
    """The base of both trainers: transformers' Trainer over a DualModeModel and packed batches; subclasses give
    ``step`` and ``compute_loss``.

    A subclass adds 0-d tensors to ``self.sums`` in its step (see ``MetricSums``); they appear in the next log beside
    ``samples_per_second`` and ``tokens_per_second``. Whoever overrides ``compute_loss`` is trained by that, in the way
    of transformers' Trainer: one forward, one backward.
    """

    title = "training"
    args: CommonConfig
    model: Any
    optimizer: Any
    peak: float | None = None  # FLOP/s of a device, where the subclass counts its FLOP
    again = staticmethod("resume_from_checkpoint={!r}".format)  # how a person goes on from a checkpoint

    def __init__(
        self, model: Any, args: CommonConfig, callbacks: list[TrainerCallback] | None = None, **kwargs: Any
    ) -> None:
        if args.n_gpu > 1:
            logger.warning("%d GPUs are visible but one process runs: one is used; launch with torchrun", args.n_gpu)
            args._n_gpu = 1
        if args.should_save:
            checkpoint.check_writable(str(args.output_dir))
        # what is not finite in a step that is left out counts in no mean
        self.sums, self.eval_sums = MetricSums(finite=args.on_nonfinite == "skip"), MetricSums()
        self.losses, self.clock = MetricSums(finite=True), StepClock()  # losses: of a run that leaves steps out
        super().__init__(model=model, args=args, callbacks=callbacks, **kwargs)
        self.accelerator.state.dynamo_plugin.backend = "NO"  # prepare_model has compiled the layers
        # our loss is a mean over its micro-batch: the Trainer divides it by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self._replace_progress()
        self.interrupt = InterruptCallback(lambda: self.background.pending)
        self.add_callback(self.interrupt)
        self.add_callback(EndsCallback())
        self._parameter_count: int | None = None
        self._synced: tuple[nn.Module, GradSync] | None = None
        self.finite = FiniteGuard(args.device, self.group)
        self._bad_terms: set[str] = set()  # not finite in the last log, which may come before a step's verdict
        self._rows: list[str] = []  # of the step that runs
        self._left_out: set[str] = set()  # rows that were told of
        self._data: dict[str, Any] | None = None  # what is known of the training set
        self._model: dict[str, Any] = {}  # and of the model, as it was at the start
        self._partial: str | None = None  # where a checkpoint is being written

    def _replace_progress(self) -> None:
        from transformers import PrinterCallback
        from transformers.trainer_callback import ProgressCallback as TqdmCallback

        for callback in (PrinterCallback, TqdmCallback):
            self.remove_callback(callback)
        self.progress = None
        if self.args.progress != "none":
            self.progress = ProgressCallback(self.title, self.args.progress)
            self.add_callback(self.progress)

    # --- running -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as transformers' ``train`` does; ``resume_from_checkpoint`` is a checkpoint's folder, or True or "last"
        for the newest of output_dir that is whole (none: a fresh start). Ctrl-C ends the run after the current step: a
        checkpoint is saved, a message says how to go on, and SystemExit(130) is raised.

        Before step 1, ValueError: nothing to train on, an output_dir that cannot be written or holds another run (see
        ``overwrite_output_dir``), a checkpoint that is damaged or of another run (see ``accept_changes``).
        """
        self.check_start()
        chosen = resume_from_checkpoint, str(self.args.output_dir), self.args.overwrite_output_dir
        resume, lines = checkpoint.choose_together(*chosen, self.group)
        self._tell(*lines)
        self.interrupt.requested = self.interrupt.stopped = False
        self.finite = FiniteGuard(self.args.device, self.group)
        self.losses = MetricSums(finite=True)
        self.clock.restart()
        self.before_training(resume)
        try:
            with self.interrupt.listening():
                result = super().train(resume, *args, **kwargs)
                self._settle()
                self.require_finite(self.group)
        except Exception as error:
            self._fail(error)
            raise
        finally:
            if self.progress is not None:
                self.progress.close()
        if self.interrupt.stopped:
            if self.is_world_process_zero():
                saved = str(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")
                print(f"stopped at step {self.state.global_step}; checkpoint: {saved}\ngo on with {self.again(saved)}")
            raise SystemExit(130)
        return result._replace(training_loss=result.metrics["train_loss"])

    def _fail(self, error: Exception) -> None:
        """Tell the other ranks what failed, or raise what failed on another one, where this one's part broke off."""
        if self.group is not None:
            rows = f" (rows {', '.join(self._rows[:8])})" if self._rows else ""
            pass_on(error, self.args.process_index, f"step {self.state.global_step + 1}{rows}")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as transformers' ``evaluate`` does; its time does not count in the training rates."""
        with self.clock.paused():
            return super().evaluate(*args, **kwargs)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def before_training(self, resume: str | None) -> None:
        """Called between the choice of a checkpoint and its comparison with this run. Subclasses extend."""
        if not self._model:
            self._model = self.model_facts()
        if resume is not None:
            if not self.args.trust_checkpoint:
                checkpoint.check_trust(resume, str(self.args.output_dir))
            self._tell(self.compared(resume, self.run_facts()))

    def _tell(self, *lines: str) -> None:
        if self.is_world_process_zero():
            tell("\n".join(line for line in lines if line))

    def run_facts(self) -> dict[str, Any]:
        """Collect what a resumed run must share with the one that made its checkpoint, and what may change."""
        free = {name: getattr(self.args, name) for name in (*RATES, *LENGTHS) if hasattr(self.args, name)}
        if self._data is None:  # rows that are made on the fly need not be the same twice
            self._data = checkpoint.data_facts(self.train_dataset, rows=self.args.check_data)
        free |= {name: self._data[name] for name in checkpoint.MENDED if name in self._data}
        fixed = {name: value for name, value in self._data.items() if name not in free}
        return settings_that_count(self.args) | fixed | self._model | {checkpoint.MAY_CHANGE: free}

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else self._partial

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers', as a transaction (see rime_fast/engine/checkpoint.py): never of weights that are not
        finite, and older ones go when it is complete."""
        with self.clock.paused():
            self._settle()
            self.background.finish()
            self.require_finite(self.group)
            run = Path(self._get_output_dir(trial))
            partial = run / checkpoint.PARTIAL
            if self.args.should_save:
                checkpoint.remove(partial)
            self.accelerator.wait_for_everyone()
            self.interrupt.saving, self._partial = True, str(partial)
            try:
                super()._save_checkpoint(model, trial)
                self._partial = None
                self.accelerator.wait_for_everyone()
                checkpoint.place_best(self.state, partial, run, self.args.should_save)
                work = None
                if self.args.should_save:
                    how = self.run_facts(), self.args.save_total_limit, self.state.best_model_checkpoint
                    work = bind(checkpoint.publish, partial, run / f"checkpoint-{self.state.global_step}", *how)
                self.publish(work)
            except Exception as error:
                raise RuntimeError(f"a checkpoint could not be written: {error!r} (under {partial})") from error
            finally:
                self.interrupt.saving, self._partial = False, None

    def check_start(self) -> None:
        """Refuse by a ValueError what would end the run later, or train nothing."""
        dataset: Any = self.train_dataset
        if dataset is None or len(dataset) == 0:
            raise ValueError("train_dataset is empty; expected at least one row")
        step = self.args.train_batch_size * max(self.args.world_size, 1)
        if self.args.dataloader_drop_last and len(dataset) < step:
            raise ValueError(
                f"train_dataset has {len(dataset)} rows, a batch of all ranks {step}, and "
                "dataloader_drop_last leaves an incomplete one out: nothing would be trained"
            )

    # --- steps that are not finite -----------------------------------------------------------------------------------

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As transformers'; here, before the optimizer's step, a step that is not finite ends."""
        norm = super()._get_grad_norm(model, grad_norm)
        rows, self._rows = self._rows, []
        if not self.args.fp16:  # its loss scale finds overflows by itself
            step = self.state.global_step + 1
            bad = self.finite.step(norm, self.optimizer, (step, norm, rows))
            if bad is not None:
                self._not_finite(*bad)
                if bad[0] == step:
                    model.zero_grad()
        return norm

    def _settle(self) -> None:
        """The last step's verdict, where the host did not wait for it."""
        if (bad := self.finite.settle()) is not None:
            self._not_finite(*bad)

    def _not_finite(self, step: int, norm: Any, rows: list[str]) -> None:
        what = describe_step(step, norm, rows)
        if self.args.on_nonfinite == "skip":
            self.sums.count(skipped_steps=1.0 / max(self.args.world_size, 1))
            tell(f"{what}: left out")
            return
        means = self.sums.drain(self.args.device, self.group)
        terms = sorted({name for name, value in means.items() if not math.isfinite(value)} | self._bad_terms)
        raise NonFiniteError(what, terms, taken=self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_card(output_dir or str(self.args.output_dir), self.facts())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card in place of transformers' (its ``push_to_hub`` asks for one)."""
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), self.facts())

    def facts(self) -> dict[str, Any]:
        """What the model card says of this run (see rime_fast/model/card.py)."""
        return {"title": self.title} | card_facts(self.model, self.args, self.state, self.train_dataset)

    # --- rows that turn out bad ------------------------------------------------------------------------------------

    def guarded(self, dataset: Any) -> GuardedRows:
        """Wrap rows for a DataLoader that says which of them a batch fails at (see rime_fast/data/row_guard.py)."""
        return GuardedRows(dataset, self.data_collator, self.args.on_bad_row == "skip")

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        rows, collate, method = self.guarded(dataset), self.data_collator, self.args.dataloader_multiprocessing_context
        context: Any = worker_context(self.args.dataloader_num_workers, method)
        self.data_collator, self.args.dataloader_multiprocessing_context = rows.collate, context
        try:
            return super()._get_dataloader(rows, *args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_multiprocessing_context = collate, method

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Draw the batches of a step as transformers' does. A row that no batch can be made of ends the run on every
        rank, with a checkpoint."""
        begin = time.perf_counter()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.sums.count(data_wait=time.perf_counter() - begin)
        bad = self._look_at_rows(batches, self.sums)
        if bad:
            self._end_at_rows(bad, f"the batch of step {self.state.global_step + 1}")
        return batches, items

    def _end_at_rows(self, bad: str, found_in: str) -> NoReturn:
        """Raise DataError for rows that no batch can be made of, after a checkpoint of this step."""
        step = self.state.global_step
        place = Path(self._get_output_dir(None)) / f"checkpoint-{step}"
        if step > 0:
            self._settle()
            self.background.finish()
            if not place.is_dir():
                self._save_checkpoint(self.model_wrapped, None)
        after = f"; checkpoint: {place}" if step > 0 else ""
        raise DataError(f"{bad}\n(found in {found_in}{after}; on_bad_row='skip' leaves such out)")

    def _look_at_rows(self, batches: Sequence[Any], sums: MetricSums) -> str:
        """Tell and count the rows of batches that were left out; what no rank's batch could be made of, "" for none."""
        taken = [part for batch in batches if isinstance(batch, dict) for part in batch.pop(LEFT_OUT, ())]
        if self.args.on_bad_row == "skip":
            sums.count(left_out_rows=len(taken))
        for row in sorted(set(taken) - self._left_out):
            tell(f"left out, and another row taken in its place: {row}")
        self._left_out.update(taken)
        return "\n".join(of_all_ranks([text for batch in batches for text in batch.get(BAD, ())], self._talk()))

    def _talk(self) -> dist.ProcessGroup | None:
        """The group for words between ranks: on the host where there is one."""
        return self.interrupt.hosts or self.group

    def _prepare_input(self, data: Any) -> Any:
        """As transformers', but lists stay as they are: ours hold host numbers (lengths, grids) and sides."""
        return data if isinstance(data, list) else super()._prepare_input(data)

    # --- the step ----------------------------------------------------------------------------------------------------

    def step(self, model: Any, inputs: dict[str, Any], scale: float) -> torch.Tensor:
        """Run forward and backward of one batch, gradients times ``scale`` (1 / accumulation steps); returns the loss
        times it."""
        raise NotImplementedError

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Train on a batch as transformers' does, by ``step``."""
        self._rows += [str(row) for row in inputs.get("rows", ())]
        if self._loss_is_overridden():
            return self._seen(super().training_step(model, inputs, num_items_in_batch))
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        scale = 1.0 / self.current_gradient_accumulation_steps
        loss = self._seen(self.step(model, self._prepare_inputs(inputs), scale))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return loss

    def _seen(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss for transformers' sum. Where steps are left out, theirs would count as 0 in its mean: ``log`` tells
        ours in its place."""
        self.finite.see(loss)
        if self.args.on_nonfinite != "skip":
            return loss
        batches = self.current_gradient_accumulation_steps
        for sums in (self.sums, self.losses):
            sums.add({"loss": loss * batches}, weight=1.0 / batches)
        return torch.where(loss.isfinite(), loss, 0.0)

    def _loss_is_overridden(self) -> bool:
        """Whether ``compute_loss`` comes from somebody who did not give the ``step`` that belongs to it."""
        owners = [next(kind for kind in type(self).__mro__ if name in vars(kind)) for name in ("compute_loss", "step")]
        return "compute_loss" in vars(self) or owners[0] is not owners[1]

    def grad_sync(self, model: nn.Module, *, alike: bool) -> GradSync:
        """Say how this model's gradients travel. alike: every rank runs equally many micro-batches by itself."""
        if self._synced is None or self._synced[0] is not model:
            # transformers turns this division off for DeepSpeed; the scale of the step is the only one
            options = {"scale_wrt_gas": False} if hasattr(model, "zero_optimization_stage") else {}
            made = grad_sync(model, backward=lambda loss: self.accelerator.backward(loss, **options))
            made.lockstep = made.lockstep and not alike
            self._synced = model, made
        return self._synced[1]

    # --- metrics -----------------------------------------------------------------------------------------------------

    def observe(self, values: dict[str, torch.Tensor], *, samples: int, tokens: int) -> None:
        """Add a step's metrics (0-d tensors) and its host-side counts; those of evaluation are kept apart, and are
        means over samples, as its loss is: the last batch may be a short one."""
        training = self.model.training
        sums = self.sums if training else self.eval_sums
        sums.add(values, 1.0 if training else float(samples))
        sums.count(samples=samples, tokens=tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics gathered since the last log: the only place where they leave the device."""
        skips = self.args.on_nonfinite == "skip"
        if skips and ("loss" in logs or "train_loss" in logs):
            self._settle()  # so that a step that was left out is counted where it belongs
        if skips and "train_loss" in logs:
            logs["train_loss"] = self.losses.drain(self.args.device, self.group).get("loss", math.nan)
            if skipped := self.sums.drain(self.args.device, self.group).get("skipped_steps"):
                logs["skipped_steps"] = skipped
        if "loss" in logs:
            gathered = self.sums.drain(self.args.device, self.group)
            seconds = self.clock.lap()
            logs.update(rates(gathered, seconds, max(self.args.world_size, 1), self.peak))
            if not gathered.get(LEFT_OUT, 1.0):
                del gathered[LEFT_OUT]
            logs.update(gathered)
            self._bad_terms = {name for name, value in gathered.items() if not math.isfinite(value)}
            if warning := self.warning_of(logs):
                if self.progress is None:
                    logger.warning("step %d: %s", self.state.global_step, warning)
                else:
                    self.progress.warning = warning
        super().log(logs, start_time)

    def warning_of(self, logs: dict[str, float]) -> str:
        """The warning that stands beside these numbers on the progress line; "" for none. Subclasses give it."""
        return ""

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Compute the loss of one evaluation batch."""
        if bad := self._look_at_rows([inputs], self.eval_sums):
            if self.is_in_train:
                self._end_at_rows(bad, f"the evaluation after step {self.state.global_step}")
            raise DataError(bad)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs)
        loss = loss.detach()
        if self.group is not None:  # a rank's loss is its part, and of a batch that was filled up some ranks' is cut
            dist.all_reduce(loss, group=self.group)
            loss /= self.args.world_size
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as transformers' loop does, and add every metric of the step under ``metric_key_prefix``."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        gathered = self.eval_sums.drain(self.args.device, self.group)
        for name in ("samples", "tokens", *(() if gathered.get(LEFT_OUT) else (LEFT_OUT,))):
            gathered.pop(name, None)
        metrics = (output.metrics or {}) | {f"{metric_key_prefix}_{name}": value for name, value in gathered.items()}
        return output._replace(metrics=metrics)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count 6 x parameters x tokens of the packed batch (transformers counts the parameters anew each step)."""
        if self._parameter_count is None:
            embedding = self.model.get_input_embeddings().weight
            self._parameter_count = sum(p.numel() for p in self.model.parameters()) - embedding.numel()
        return 6 * self._parameter_count * tokens_of(inputs)
