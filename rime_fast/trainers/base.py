"""What both trainers share: metrics read at logging steps only, rates, progress, Ctrl-C, and a plain start-up."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, get_last_checkpoint
from transformers.utils import logging

from rime_fast.engine.wrappers import GradSync, grad_sync
from rime_fast.model.card import write_card
from rime_fast.trainers.callbacks import (
    InterruptCallback,
    MetricSums,
    ProgressCallback,
    StepClock,
    data_of,
    results_of,
    settings_of,
)
from rime_fast.trainers.config import CommonConfig

logger = logging.get_logger(__name__)


class DualModeTrainer(Trainer):
    """transformers' Trainer over a DualModeModel and packed batches; subclasses give ``step`` and ``compute_loss``.

    A subclass adds 0-d tensors to ``self.sums`` in its step (see ``MetricSums``); they appear in the next log beside
    ``samples_per_second`` and ``tokens_per_second``. Whoever overrides ``compute_loss`` is trained by that, in the way
    of transformers' Trainer: one forward, one backward.
    """

    title = "training"
    args: CommonConfig
    model: Any
    optimizer: Any

    def __init__(
        self, model: Any, args: CommonConfig, callbacks: list[TrainerCallback] | None = None, **kwargs: Any
    ) -> None:
        if args.n_gpu > 1:
            logger.warning("%d GPUs are visible but one process runs: one is used; launch with torchrun", args.n_gpu)
            args._n_gpu = 1
        self.sums, self.eval_sums, self.clock = MetricSums(), MetricSums(), StepClock()
        super().__init__(model=model, args=args, callbacks=callbacks, **kwargs)
        # our loss is a mean over its micro-batch: the Trainer divides it by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self._replace_progress()
        self.interrupt = InterruptCallback()
        self.add_callback(self.interrupt)
        self._parameter_count: int | None = None
        self._synced: tuple[nn.Module, GradSync] | None = None

    def _replace_progress(self) -> None:
        from transformers import PrinterCallback
        from transformers.trainer_callback import ProgressCallback as TqdmCallback

        for callback in (PrinterCallback, TqdmCallback):
            self.remove_callback(callback)
        self.progress = None
        if self.args.progress != "none":
            self.progress = ProgressCallback(self.title, self.args.progress)
            self.add_callback(self.progress)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share a global batch; None for one process."""
        return dist.group.WORLD if self.args.world_size > 1 else None

    # --- running -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers' ``train``. Ctrl-C ends the run after the current step: a checkpoint is saved, a message
        says how to go on, and SystemExit(130) is raised."""
        self.interrupt.requested = self.interrupt.stopped = False
        self.clock.restart()
        try:
            with self.interrupt.listening():
                result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.progress is not None:
                self.progress.close()
        if self.interrupt.stopped:
            if self.is_world_process_zero():
                saved = get_last_checkpoint(self.args.output_dir)
                print(
                    f"stopped at step {self.state.global_step}; checkpoint: {saved}\n"
                    f"go on with resume_from_checkpoint={saved!r}"
                )
            raise SystemExit(130)
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers' ``evaluate``; its time does not count in the training rates."""
        with self.clock.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_card(output_dir or str(self.args.output_dir), self.facts())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Our card in place of transformers' (its ``push_to_hub`` asks for one)."""
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), self.facts())

    def facts(self) -> dict[str, Any]:
        """What the model card says of this run (see rime_fast/model/card.py)."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return {
            "title": self.title,
            "base_model": getattr(base.config, "_name_or_path", "") or None,
            "template": self.args.template,
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "settings": settings_of(self.args),
            "data": data_of(self.train_dataset),
            "results": results_of(self.state.log_history),
        }

    def _prepare_input(self, data: Any) -> Any:
        """As transformers', but lists stay as they are: ours hold host numbers (lengths, grids) and sides."""
        return data if isinstance(data, list) else super()._prepare_input(data)

    # --- the step ----------------------------------------------------------------------------------------------------

    def step(self, model: Any, inputs: dict[str, Any], scale: float) -> torch.Tensor:
        """Forward and backward of one batch, gradients times ``scale`` (1 / accumulation steps); the loss times it."""
        raise NotImplementedError

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As transformers', by ``step``."""
        if self._loss_is_overridden():
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        loss = self.step(model, self._prepare_inputs(inputs), 1.0 / self.current_gradient_accumulation_steps)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return loss

    def _loss_is_overridden(self) -> bool:
        """Whether ``compute_loss`` comes from somebody who did not give the ``step`` that belongs to it."""
        owners = [next(kind for kind in type(self).__mro__ if name in vars(kind)) for name in ("compute_loss", "step")]
        return "compute_loss" in vars(self) or owners[0] is not owners[1]

    def grad_sync(self, model: nn.Module, *, alike: bool) -> GradSync:
        """How this model's gradients travel. alike: every rank runs equally many micro-batches by itself."""
        if self._synced is None or self._synced[0] is not model:
            # transformers turns this division off for DeepSpeed; the scale of the step is the only one
            options = {"scale_wrt_gas": False} if hasattr(model, "zero_optimization_stage") else {}
            made = grad_sync(model, backward=lambda loss: self.accelerator.backward(loss, **options))
            made.lockstep = made.lockstep and not alike
            self._synced = model, made
        return self._synced[1]

    # --- metrics -----------------------------------------------------------------------------------------------------

    def observe(self, values: dict[str, torch.Tensor], *, samples: int, tokens: int) -> None:
        """Add a step's metrics (0-d tensors) and its host-side counts; those of evaluation are kept apart."""
        sums = self.sums if self.model.training else self.eval_sums
        sums.add(values)
        sums.count(samples=samples, tokens=tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics gathered since the last log: the only place where they leave the device."""
        if "loss" in logs:
            gathered = self.sums.drain(self.args.device, self.group)
            seconds = self.clock.lap()
            for name in ("samples", "tokens"):
                logs[f"{name}_per_second"] = gathered.pop(name, 0.0) / seconds
            logs.update(gathered)
        super().log(logs, start_time)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of one evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As transformers' loop, plus every metric of the step under ``metric_key_prefix``."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        gathered = self.eval_sums.drain(self.args.device, self.group)
        for name in ("samples", "tokens"):
            gathered.pop(name, None)
        metrics = (output.metrics or {}) | {f"{metric_key_prefix}_{name}": value for name, value in gathered.items()}
        return output._replace(metrics=metrics)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x parameters x tokens of the packed batch (transformers counts the parameters anew each step)."""
        if self._parameter_count is None:
            embedding = self.model.get_input_embeddings().weight
            self._parameter_count = sum(p.numel() for p in self.model.parameters()) - embedding.numel()
        return 6 * self._parameter_count * tokens_of(inputs)


def tokens_of(inputs: dict[str, Any]) -> int:
    """Tokens of a packed batch, known on the host."""
    ids = inputs.get("input_ids")
    return 0 if ids is None else ids.shape[0]
