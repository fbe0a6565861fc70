"""Runs of RimeTrainer under FSDP2 whose checkpoints are written in the background; run by test_async_save.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))
from cached_ranks_worker import SAME, TEMPLATE, fresh_state, make_pairs, shard_on_the_cpu

from rime_fast.cli.training import TrainingOptions, save_outputs
from rime_fast.engine import checkpoint
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer

SETTINGS: dict[str, Any] = {
    "fsdp": True,
    "async_save": True,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
}


class At(TrainerCallback):
    """Calls ``work`` as step ``step`` begins."""

    def __init__(self, step: int, work: Any) -> None:
        self.step, self.work = step, work

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.work()


def make(
    folder: Path, *callbacks: TrainerCallback, lora: bool = False, sharded: bool = True, **settings: Any
) -> RimeTrainer:
    """A run from the model ``start`` beside its folder."""
    fresh_state()
    args = RimeConfig(output_dir=str(folder), ddp_backend="gloo", **(SAME | SETTINGS | settings))
    if sharded:
        shard_on_the_cpu()
    more: dict[str, Any] = {"callbacks": list(callbacks)}
    if lora:
        from peft import LoraConfig

        torch.manual_seed(0)
        more["peft_config"] = LoraConfig(init_lora_weights=False, r=4, target_modules=["q_proj", "v_proj"])
    if settings.get("eval_strategy"):
        more["eval_dataset"] = make_pairs(4, negatives=1)
    start = str(folder.parent / "start")
    return RimeTrainer(start, args, make_pairs(24, negatives=1), template=TEMPLATE, **more)


def ended(run: RimeTrainer, resume: str | None = None) -> RimeTrainer:
    """Train to the end and leave the model; with LoRA as ``rime-fast train`` does."""
    run.train(resume_from_checkpoint=resume)
    folder = str(run.args.output_dir)
    if hasattr(run.model, "peft_config"):
        start = str(Path(folder).parent / "start")
        options = TrainingOptions(model=start, train_data=[], output_dir=folder, lora_rank=1, report=False)
        save_outputs(run, options, run.args, "SFT")
    else:
        run.save_model(folder)
    return run


def steps(folder: Path) -> list[int]:
    found = checkpoint.checkpoints(folder)
    assert [checkpoint.fault(path) for path in found] == [None] * len(found)
    return [checkpoint.step_of(path) for path in found]


def trains_while_it_is_written(folder: Path) -> None:
    """Nothing of checkpoint-2 counts until step 4 begins, and by the end it does."""
    go_on, seen, commit = threading.Event(), [], checkpoint.commit

    def held(*args: Any) -> None:
        assert go_on.wait(100)
        commit(*args)

    def look() -> None:
        seen.append((folder / "checkpoint-2").exists())
        go_on.set()

    with mock.patch.object(checkpoint, "commit", held):
        run = ended(make(folder, At(4, look), save_steps=2))
    assert run.args.process_index or seen == [False]
    assert steps(folder) == [2, 4]


def fails_is_stopped_and_goes_on(rank: int, folder: Path) -> None:
    """A disk that is full at checkpoint-2, SIGTERM twice in step 2 of the next run, and a third one to the end."""
    commit = checkpoint.commit

    def full(partial: Path, *args: Any) -> None:
        if partial.name == "checkpoint-2":
            raise OSError("disk full")
        commit(partial, *args)

    with (
        mock.patch.object(checkpoint, "commit", full),
        pytest.raises(RuntimeError, match="could not be written: rank 0: OSError: disk full"),
    ):
        make(folder).train()
    assert steps(folder) == [1]

    def press() -> None:
        for _ in range(2 * rank):  # of one rank; both stop
            os.kill(os.getpid(), signal.SIGTERM)

    run = make(folder, At(2, press))
    with pytest.raises(SystemExit):
        run.train(resume_from_checkpoint="last")
    press()  # as late as this
    assert steps(folder) == [1, 2]
    ended(make(folder), "last")
    assert steps(folder) == [3, 4]


def main(rank: int, world: int, folder: str) -> None:
    trains_while_it_is_written(Path(folder) / "whole")
    fails_is_stopped_and_goes_on(rank, Path(folder) / "broken")


def more(rank: int, world: int, folder: str) -> None:
    """Both forms of a checkpoint go on as each other; an adapter's; the best one; a run that is not sharded."""
    root = Path(folder)
    with pytest.raises(ValueError, match="async_save is True, but this run is not sharded"):
        make(root / "cpu", sharded=False)
    ended(make(root / "whole"))
    for name, first in {"to-shards": False, "from-shards": True}.items():
        with pytest.raises(SystemExit):
            make(root / name, At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)), async_save=first).train()
        ended(make(root / name, async_save=not first), "last")
    ended(make(root / "lora", lora=True))
    run = make(root / "lora-resumed", At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)), lora=True)
    with pytest.raises(SystemExit):
        run.train()
    ended(make(root / "lora-resumed", lora=True), "last")
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    run = ended(make(root / "best", metric_for_best_model="eval_loss", greater_is_better=True, **best))
    assert run.state.best_model_checkpoint == str(root / "best" / "checkpoint-1")
    assert steps(root / "best") == [1]


def alone(rank: int, world: int, folder: str) -> None:
    """One rank takes up what two wrote."""
    settings = {"per_device_train_batch_size": 4, "accept_changes": True}
    ended(make(Path(folder) / "whole", **settings), "last")
