"""Checkpoints of models sharded by FSDP2, which each rank writes its shards of while training goes on.

``torch.distributed.checkpoint.async_save`` copies the shards to the host and writes them in a thread. The folders are
those of accelerate's sharded state dicts, so accelerate reads them, on any number of ranks. The model that is left at
the end is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter, async_save
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import is_peft_available

from rime_fast.engine.finite import NonFiniteError, all_finite
from rime_fast.ops.collectives import of_all_ranks

MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # where accelerate's loaders look


class BackgroundSave:
    """Writes one checkpoint at a time: ``begin``, then ``then``, and ``finish`` once ``done``; all ranks call them
    together.

    A rank's shards are held on the host (pinned, for CUDA) from the first save on.
    """

    def __init__(self) -> None:
        self._groups: list[Any] = []
        self._stager: DefaultStager | None = None
        self._running: list[Future[Any]] = []

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and not finished: the same on every rank."""
        return bool(self._running)

    def begin(self, states: Mapping[Path, Mapping[str, Any]], device: torch.device) -> None:
        """Copy state dicts to the host and begin to write each into its folder. They may change afterwards."""
        if self._stager is None:
            # a group each, and one for the ranks' main threads: what threads say in one group would cross
            self._groups = [dist.new_group(backend="gloo") for _ in range(len(states) + 1)]
            cuda = device.type == "cuda"
            options = {"use_pinned_memory": cuda, "use_non_blocking_copy": cuda}
            self._stager = DefaultStager(StagingOptions(use_shared_memory=False, use_async_staging=False, **options))
        for group, (folder, state) in zip(self._groups[1:], states.items(), strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            writer: Any = FileSystemWriter(folder)
            found: Any = async_save(dict(state), storage_writer=writer, process_group=group, async_stager=self._stager)
            self._running.append(found)

    def then(self, last: Callable[[], None] | None) -> None:
        """Have ``last`` called in the background when every rank's shards are on the disk."""
        written = list(self._running)

        def finish() -> None:
            for one in written:  # a rank's ends when all ranks have written
                one.result()
            if last is not None:
                last()

        pool = ThreadPoolExecutor(1, "checkpoint")
        self._running.append(pool.submit(finish))
        pool.shutdown(wait=False)

    def done(self) -> bool:
        """Whether every rank is through; costs one number on the wire."""
        flag = torch.tensor(float(all(one.done() for one in self._running)))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._groups[0])
        return bool(flag)

    def wait(self) -> list[str]:
        """Wait for this rank's part alone; gives what it failed with."""
        running, self._running = self._running, []
        failed = [error for one in running if (error := one.exception()) is not None]
        return [f"{type(error).__name__}: {error}" for error in failed[:1]]

    def finish(self) -> None:
        """Wait until it is there. Raises RuntimeError on every rank where one failed."""
        if self.pending and (failed := of_all_ranks(self.wait(), self._groups[0])):
            raise RuntimeError(f"a checkpoint could not be written: {'; '.join(failed)}")


class ShardedCheckpoints(Trainer):
    """The Trainer of transformers, with checkpoints by ``BackgroundSave`` where accelerate's state dicts are sharded,
    which ``args.async_save`` sets.

    A checkpoint of either form, whole or sharded, is resumed from. ``save_model`` writes one whole model, never of
    weights that are not finite. Raises ValueError where accelerate does not shard, though FSDP was asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.background, self._in_checkpoint = BackgroundSave(), False
        super().__init__(*args, **kwargs)
        if self.args.async_save and not self._sharded:  # type: ignore[attr-defined]
            raise ValueError("async_save is True, but this run is not sharded: accelerate runs FSDP on no CPU")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers' ``train`` does. An error does not break off a checkpoint that is being written."""
        try:
            return super().train(*args, **kwargs)
        except Exception:
            self.background.wait()
            raise

    def publish(self, work: Callable[[], None] | None) -> None:
        """Call ``work`` (of the rank that has any), which makes a checkpoint count, when all of it is written: now, or
        in the background."""
        if self.background.pending:
            self.background.then(work)
            return
        if work is not None:
            work()
        self.accelerator.wait_for_everyone()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.background.pending and self.background.done():
            self.background.finish()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.background.finish()
        return super()._finalize_training(*args, **kwargs)

    # --- writing -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        model: Any = self.model
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        # the model's first: it puts back the shards of what an evaluation left gathered, which the optimizer's are by
        states = {folder / MODEL: {"model": _weights(model)}}
        states[folder / OPTIMIZER] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        self.background.begin(states, self.args.device)
        if self.args.should_save:
            torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model as transformers' ``save_model`` does, gathered from its shards. Raises NonFiniteError
        for weights that are not finite."""
        if not self._in_checkpoint:  # whose weights were looked at
            together = self.is_fsdp_enabled or self.is_deepspeed_enabled  # else rank 0 may be alone here
            self.require_finite(dist.group.WORLD if together and self.args.world_size > 1 else None)
        if not self._sharded:
            super().save_model(output_dir, _internal_call)
        elif self._in_checkpoint:  # whose weights are the shards
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            if self.args.should_save:
                self.accelerator.unwrap_model(self.model).config.save_pretrained(folder)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
        else:
            with self._states(sharded=False):
                super().save_model(output_dir, _internal_call)

    def require_finite(self, group: dist.ProcessGroup | None) -> None:
        """Raise NonFiniteError where a weight is not finite on any rank of ``group``."""
        model: Any = self.model
        if not all_finite(model.parameters(), group):
            raise NonFiniteError(f"the weights are not finite after step {self.state.global_step}; they were not saved")

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    @contextmanager
    def _states(self, sharded: bool) -> Iterator[None]:
        """Have accelerate read and write state dicts of one form in this block."""
        if not self.is_fsdp_enabled:
            yield
            return
        plugin = self.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type("SHARDED_STATE_DICT" if sharded else "FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config = before

    # --- reading -----------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._states(_is_sharded(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._states(_is_sharded(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        with self._states(_is_sharded(self.state.best_model_checkpoint)):
            super()._load_best_model()


def _is_sharded(folder: str | None) -> bool:
    return folder is not None and (Path(folder) / MODEL).is_dir()


def _weights(model: Any) -> dict[str, Any]:
    """A model's shards by name; of an adapter's model the adapter's, under the names that accelerate loads."""
    if is_peft_available():
        from peft import PeftModel, get_peft_model_state_dict

        if isinstance(model, PeftModel):
            return get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return get_model_state_dict(model)
