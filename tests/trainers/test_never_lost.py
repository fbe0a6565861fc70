"""Training is never lost: steps that are not finite, checkpoints, resumed runs, signals, starts that cannot go well."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import AutoConfig, TrainerCallback

from rime_fast.data.workers import worker_context

sys.path.insert(0, str(Path(__file__).parent))
from conftest import TEMPLATE, make_model, make_pairs, make_processor

from rime_fast.engine import checkpoint
from rime_fast.engine.finite import NonFiniteError, all_finite
from rime_fast.trainers.callbacks import InterruptCallback, On
from rime_fast.trainers.config import RefineConfig, RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from rime_fast.trainers.refine import RefineRLTrainer
from tests.ranks import run_ranks

QUIET = {
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "progress": "none",
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "temperature": 0.1,
    "train_sampling_strategy": "sequential",
}
CE_ONLY = {"disc_weight": 0.0, "gen_weight": 0.0, "cross_weight": 0.0}


def trainer(tiny, folder, pairs=None, *, more=None, **settings) -> RimeTrainer:
    args = RimeConfig(output_dir=str(folder), **(QUIET | settings))
    processor = tiny.processor()
    pairs = tiny.pairs(8) if pairs is None else pairs
    model = tiny.model(processor)
    return RimeTrainer(model, args, pairs, processing_class=processor, template=tiny.template, **(more or {}))


def weights(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


class Spoil(TrainerCallback):
    """Makes one gradient of step ``at`` not finite."""

    def __init__(self, run, at):
        self.at, self.now = at, 0
        weight = run.model.model.language_model.norm.weight
        weight.register_hook(lambda g: g * math.nan if self.now == self.at else g)
        run.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1


@pytest.mark.parametrize("settings", [{}, CE_ONLY, {"optim": "sgd"}, {"micro_batch_tokens": 40}], ids=str)
def test_a_step_that_is_not_finite_ends_the_run_before_it_is_taken(tiny, tmp_path, settings):
    run = trainer(tiny, tmp_path, max_steps=4, save_total_limit=1, **settings)
    Spoil(run, 3)
    with pytest.raises(NonFiniteError, match=r"step 3 is not finite \(gradient norm nan; rows of this rank: 4, 5\)"):
        run.train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]
    assert checkpoint.fault(tmp_path / "checkpoint-2") is None
    again = trainer(tiny, tmp_path, max_steps=4, **settings)
    again.train(resume_from_checkpoint=True)  # nothing spoils it now
    assert all(p.isfinite().all() for p in again.model.parameters())


def test_the_terms_that_are_not_finite_are_named(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=2)
    step = run.step

    def spoiled(*args):
        loss = step(*args)
        run.sums.add({"contrast/gen-gen": torch.tensor(math.inf)})
        return loss * math.nan

    run.step = spoiled
    with pytest.raises(NonFiniteError, match="not finite among the logged terms: contrast/gen-gen"):
        run.train()
    assert checkpoint.checkpoints(tmp_path) == []


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_or_it_is_left_out_and_counted(tiny, tmp_path, optim, capsys):
    run = trainer(tiny, tmp_path, max_steps=4, on_nonfinite="skip", optim=optim, learnable_temperature=True)
    Spoil(run, 2)
    kept = []
    run.add_callback(Keep(run, kept))
    run.train()
    for name, value in kept[1].items():
        assert torch.equal(value, kept[0][name]), name
    assert any(not torch.equal(value, kept[1][name]) for name, value in kept[2].items())
    assert sum(entry.get("skipped_steps", 0) for entry in run.state.log_history) == 1
    assert "step 2 is not finite" in capsys.readouterr().err
    assert math.isfinite(run.state.log_history[-1]["train_loss"])


class Keep(TrainerCallback):
    def __init__(self, run, kept):
        self.run, self.kept = run, kept

    def on_step_end(self, args, state, control, **kwargs):
        self.kept.append(weights(self.run))


class SpoilForward(TrainerCallback):
    """Makes activations of step ``at`` NaN, of all forwards or only of decoding (which runs in eval mode)."""

    def __init__(self, run, at, *, decoding=False):
        self.at, self.now, self.decoding = at, 0, decoding
        run.model.model.language_model.layers[0].register_forward_hook(self.spoil)
        run.add_callback(self)

    def spoil(self, module, inputs, output):
        if self.now != self.at or (self.decoding and module.training):
            return output
        return output * math.nan

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1


CONTRASTS = [{}, {"micro_batch_tokens": 40}, {"matryoshka_dims": [16, 32], "int8_weight": 0.5}]


@pytest.mark.parametrize("settings", CONTRASTS, ids=str)
def test_embeddings_that_are_not_finite_make_such_a_step(tiny, tmp_path, settings):
    run = trainer(tiny, tmp_path / "a", max_steps=4, **settings)
    SpoilForward(run, 2)
    wanted = r"step 2 is not finite \(.* rows of this rank: 2, 3\); .*: ce/query, .*contrast/gen-gen"
    with pytest.raises(NonFiniteError, match=wanted):
        run.train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "a")] == ["checkpoint-1"]
    run = trainer(tiny, tmp_path / "b", max_steps=4, on_nonfinite="skip", learnable_temperature=True, **settings)
    SpoilForward(run, 2)
    kept, taus = [], []
    run.add_callback(Keep(run, kept))
    run.add_callback(On(on_step_end=lambda: taus.append(run.temperature.value().item())))
    run.train()
    assert all(torch.equal(value, kept[0][name]) for name, value in kept[1].items())
    assert taus[0] == taus[1] != taus[2]
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_steps_that_are_left_out_count_in_no_mean(tiny, tmp_path):
    """The window's means are those of the steps that were taken, and so is the run's."""

    def logs(name, **settings):
        run = trainer(tiny, tmp_path / name, max_steps=4, save_strategy="no", on_nonfinite="skip", **settings)
        SpoilForward(run, 2)
        done = run.train()
        return run.state.log_history, done

    each, _ = logs("each")
    assert math.isnan(each[1]["loss"])
    assert each[1]["skipped_steps"] == 1
    (whole, end), done = logs("whole", logging_steps=4)
    for name in ("loss", "ce/query", "contrast/gen-gen", "hit@1/gen-gen"):
        wanted = sum(each[i][name] for i in (0, 2, 3)) / 3
        assert whole[name] == pytest.approx(wanted, rel=1e-5), name
    assert whole["skipped_steps"] == 1
    assert end["train_loss"] == done.training_loss == pytest.approx(whole["loss"], rel=1e-5)
    (accumulated, _), _ = logs("acc", logging_steps=4, gradient_accumulation_steps=2)
    assert math.isfinite(accumulated["loss"])


@pytest.mark.parametrize("logging_steps", [4, 3])
def test_a_last_step_that_is_left_out_is_counted(tiny, tmp_path, logging_steps):
    settings = {"max_steps": 4, "save_strategy": "no", "logging_steps": logging_steps}
    run = trainer(tiny, tmp_path, on_nonfinite="skip", **settings)
    Spoil(run, 4)
    run.train()
    assert sum(entry.get("skipped_steps", 0) for entry in run.state.log_history) == 1


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=2, save_total_limit=1)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    run.model.lm_head.weight[0, 0] = math.inf

    run.add_callback(Break())
    with pytest.raises(NonFiniteError, match="the weights are not finite after step 2"):
        run.train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_nor_at_the_end_of_the_run(tiny, tmp_path):
    huge = {"learning_rate": 1e38, "weight_decay": 10.0, "lr_scheduler_type": "constant"}
    run = trainer(tiny, tmp_path, max_steps=1, save_strategy="no", **huge)
    with pytest.raises(NonFiniteError, match="the weights are not finite after step 1"):
        run.train()
    with pytest.raises(NonFiniteError, match="the weights are not finite after step 1"):
        run.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_parameter_of_zero3_is_looked_at_by_its_part():
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.tensor([1.0, math.inf])
    assert not all_finite([parameter])


def two_ranks(rank: int, world: int, folder: str) -> None:
    """The activations of one rank are NaN in step 2."""
    own = {"ddp_backend": "gloo", "use_cpu": True, "max_steps": 3, "save_strategy": "no"}
    builders = SimpleNamespace(pairs=make_pairs, model=make_model, processor=make_processor, template=TEMPLATE)
    for more in ({"micro_batch_tokens": 40}, {"on_nonfinite": "skip", "learnable_temperature": True}):
        run = trainer(builders, folder, make_pairs(12), **own, **more)
        if rank == 1:
            SpoilForward(run, 2)
        if "on_nonfinite" not in more:
            with pytest.raises(NonFiniteError, match=r"step 2 is not finite .*contrast/gen-gen"):
                run.train()
            continue
        run.train()
        assert sum(entry.get("skipped_steps", 0) for entry in run.state.log_history) == 1
        mine = torch.cat([p.detach().flatten() for p in (*run.model.parameters(), run.temperature.log)])
        others = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(others, mine)
        assert mine.isfinite().all()
        assert torch.equal(*others)


@pytest.mark.dist
def test_all_ranks_see_the_same(tmp_path):
    run_ranks(two_ranks, 2, str(tmp_path))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_one_named(tiny, tmp_path, capsys):
    straight = trainer(tiny, tmp_path / "a", max_steps=4)
    straight.train()
    trainer(tiny, tmp_path / "b", max_steps=4).train()
    for step in (3, 4):
        (tmp_path / "b" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    again = trainer(tiny, tmp_path / "b", max_steps=4)
    again.train(resume_from_checkpoint=True)
    told = capsys.readouterr().err
    assert "checkpoint-4 is left out: optimizer.pt is missing" in told
    assert f"resuming from {tmp_path / 'b' / 'checkpoint-2'}" in told
    for name, value in weights(straight).items():
        assert torch.equal(value, dict(again.model.named_parameters())[name]), name
    assert checkpoint.fault(tmp_path / "b" / "checkpoint-4") is None  # written anew in its place
    (tmp_path / "b" / "checkpoint-3" / "model.safetensors").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: model.safetensors has 1 bytes"):
        trainer(tiny, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))


def test_every_run_tells_its_last_step(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=3, logging_steps=2)
    run.train()
    assert [log["step"] for log in run.state.log_history if "loss" in log] == [2, 3]
    run = trainer(tiny, tmp_path / "never", max_steps=3, logging_steps=2, logging_strategy="no")
    run.train()
    assert not [log for log in run.state.log_history if "loss" in log]


def test_a_short_run_tells_its_ends_and_a_resumed_one_its_step(tiny, tmp_path, capsys):
    run = trainer(tiny, tmp_path, max_steps=3, logging_steps=10, save_steps=2)
    run.train()
    assert [log["step"] for log in run.state.log_history if "loss" in log] == [1, 3]
    capsys.readouterr()
    again = trainer(tiny, tmp_path, max_steps=3, logging_steps=10, save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    told = capsys.readouterr().err
    assert f"resuming from {tmp_path / 'checkpoint-2'}, step 2" in told
    assert "missing" not in told


def test_a_folder_with_a_run_is_not_written_over_by_accident(tiny, tmp_path, capsys):
    run = trainer(tiny, tmp_path, max_steps=3)
    run.train(resume_from_checkpoint="last")
    assert "no checkpoint there, a fresh start" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds a run \(checkpoint-3\); resume it"):
        trainer(tiny, tmp_path, max_steps=1).train()
    trainer(tiny, tmp_path, max_steps=1, overwrite_output_dir=True).train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_the_best_checkpoint_is_named_by_its_place_and_kept(tiny, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    more = {"eval_dataset": tiny.pairs(4, seed=3)}
    run = trainer(tiny, tmp_path, max_steps=3, metric_for_best_model="eval_loss", more=more, **settings)
    run.train()
    assert run.state.best_model_checkpoint in {str(path) for path in checkpoint.checkpoints(tmp_path)}


@pytest.mark.parametrize("model_only", [False, True])
def test_the_best_model_has_the_numbers_of_its_own_step(tiny, tmp_path, model_only):
    """Temperature and step of int8 are trained beside the model, and go back with it."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 3}
    settings |= {"metric_for_best_model": "eval_int8_step", "greater_is_better": True, "save_only_model": model_only}
    settings |= {"int8_weight": 1.0, "learnable_temperature": True, "temperature_learning_rate": 0.1}
    run = trainer(tiny, tmp_path, more={"eval_dataset": tiny.pairs(2, seed=3)}, **settings)
    run.train()
    found = {entry["step"]: entry for entry in run.state.log_history if "eval_int8_step" in entry}
    best = found[max(found, key=lambda step: found[step]["eval_int8_step"])]
    assert Path(run.state.best_model_checkpoint).name == f"checkpoint-{best['step']}" != "checkpoint-3"
    assert run.int8.value().item() == pytest.approx(best["eval_int8_step"], rel=1e-6)
    assert run.temperature.value().item() == pytest.approx(best["eval_temperature"], rel=1e-6)
    run.save_model(str(tmp_path / "final"))
    assert AutoConfig.from_pretrained(tmp_path / "final").int8_step == run.int8.value().item()


class StopAt(TrainerCallback):
    """Asks a run to stop after step ``at``, as a signal does."""

    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("saved", ["steps", "best"])
def test_a_stopped_run_keeps_the_checkpoint_that_it_goes_on_from(tiny, tmp_path, saved):
    """transformers removes all but the best at the end of a run with save_total_limit=1, and saves none else with
    save_strategy "best"."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "eval_samples_per_second", "max_steps": 5}
    settings |= {"save_strategy": saved}
    more = {"eval_dataset": tiny.pairs(2, seed=3), "callbacks": [StopAt(3)]}
    run = trainer(tiny, tmp_path, more=more, **settings)
    evaluate, scores = run.evaluate, iter((9.0, 1.0, 1.0))
    run.evaluate = lambda *args, **options: evaluate(*args, **options) | {"eval_samples_per_second": next(scores)}
    with pytest.raises(SystemExit):
        run.train()
    assert {path.name for path in checkpoint.checkpoints(tmp_path)} == {"checkpoint-1", "checkpoint-3"}
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    trained = weights(run)
    again = trainer(tiny, tmp_path, more=more | {"callbacks": []}, **settings | {"max_steps": 3})
    again._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(trained[name], value) for name, value in weights(again).items())


@pytest.mark.parametrize(("at", "saved"), [(3, "epoch"), (4, "steps")])
def test_a_stop_ends_no_epoch_and_loses_none(tiny, tmp_path, at, saved):
    """The figures of each epoch are those of a run that was not stopped, and in the checkpoint where it was its end."""
    settings: dict[str, Any] = dict.fromkeys(("eval_strategy", "logging_strategy"), "epoch")
    settings |= {"num_train_epochs": 3, "per_device_train_batch_size": 4, "save_steps": 100, "save_strategy": saved}
    more = {"eval_dataset": tiny.pairs(2, seed=3)}
    with pytest.raises(SystemExit):
        trainer(tiny, tmp_path, more=more | {"callbacks": [StopAt(at)]}, **settings).train()
    run = trainer(tiny, tmp_path, more=more, **settings)
    run.train(resume_from_checkpoint=True)
    history = run.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4, 6]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6]


# --- resumed runs that differ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": 4}, "seed"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"gen_weight": 0.5}, "gen_weight"),
        ({"learnable_temperature": True}, "learnable_temperature"),
        ({"hard_negatives": 0}, "hard_negatives"),
        ({"max_length": 512}, "max_length"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type"),
        ({"warmup_steps": 1}, "warmup_steps"),
        ({"adam_beta2": 0.5}, "adam_beta2"),
        ({"adam_epsilon": 1e-3}, "adam_epsilon"),
        ({"lr_scheduler_kwargs": {"num_cycles": 3}}, "lr_scheduler_kwargs"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
    ],
    ids=str,
)
def test_a_resumed_run_that_differs_is_refused_by_name(tiny, tmp_path, settings, named):
    trainer(tiny, tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match=rf"was made by a run that differs: .*{named} .* -> .*accept_changes"):
        trainer(tiny, tmp_path, max_steps=2, **settings).train(resume_from_checkpoint=True)


def lora(**options) -> dict:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return {"peft_config": peft.LoraConfig(**(settings | options))}


def test_another_adapter_or_another_base_is_refused_by_name(tiny, tmp_path, monkeypatch):
    trainer(tiny, tmp_path, max_steps=1, more=lora()).train()

    def refused(named, match="was made by a run that differs", more=None, **settings):
        with pytest.raises(ValueError, match=rf"{match}.*{named}"):
            trainer(tiny, tmp_path, max_steps=2, more=more, **settings).train(resume_from_checkpoint=True)

    for options, named in (
        ({"lora_alpha": 64}, "adapter.lora_alpha 8 -> 64"),
        ({"use_rslora": True}, "adapter.use_rslora None -> True"),
        ({"lora_dropout": 0.5}, "adapter.lora_dropout"),
        ({"r": 8}, "adapter.r 4 -> 8"),
        ({"target_modules": ["q_proj"]}, "adapter.target_modules"),
        ({"modules_to_save": ["merger"]}, "adapter.modules_to_save"),
    ):
        refused(named, more=lora(**options))
    refused("adapter .* -> None")
    refused("adapter.r 4 -> 8", "the weights of .* do not fit", more=lora(r=8), accept_changes=True)
    refused("they are an adapter's", "the weights of .* do not fit", accept_changes=True)
    make = tiny.model
    monkeypatch.setattr(tiny, "model", lambda processor: make(processor, init_std=0.2))
    refused("base model", more=lora())
    trainer(tiny, tmp_path, max_steps=2, more=lora(), accept_changes=True).train(resume_from_checkpoint=True)


def test_another_template_is_refused_by_its_texts(tiny, tmp_path):
    trainer(tiny, tmp_path, max_steps=1).train()
    tiny.template = replace(tiny.template, instruction="which one")
    with pytest.raises(ValueError, match=r"differs: prompts.instruction 'describe' -> 'which one'"):
        trainer(tiny, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_an_accepted_setting_of_the_optimizer_is_used_and_another_optimizer_refused(tiny, tmp_path):
    trainer(tiny, tmp_path, max_steps=1).train()
    settings = {"max_steps": 2, "accept_changes": True}
    for name, match in (("sgd", "without dampening, momentum"), ("adafactor", "without beta1")):
        with pytest.raises(ValueError, match=rf"optimizer's states of .* do not fit this run: .*{match}.*; .*: optim "):
            trainer(tiny, tmp_path, optim=name, **settings).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"do not fit this run: .*; .*: freeze_vision True -> False"):
        trainer(tiny, tmp_path, freeze_vision=False, **settings).train(resume_from_checkpoint=True)
    new = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3, "weight_decay": 0.1}
    run = trainer(tiny, tmp_path, **new, **settings)
    run.train(resume_from_checkpoint=True)
    group = run.optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.1)


def test_a_checkpoint_of_the_model_alone_wants_to_be_accepted(tiny, tmp_path, capsys):
    settings = {"learnable_temperature": True}
    trainer(tiny, tmp_path, max_steps=1, save_only_model=True, **settings).train()
    with pytest.raises(ValueError, match=r"checkpoint-1 holds no optimizer's state .* accept_changes"):
        trainer(tiny, tmp_path, max_steps=2, **settings).train(resume_from_checkpoint=True)
    run = trainer(tiny, tmp_path, max_steps=2, accept_changes=True, **settings)
    run.train(resume_from_checkpoint=True)
    assert "going on with a fresh optimizer and schedule" in capsys.readouterr().err
    assert run.state.global_step == 2


def small_refine(tiny, folder, noise=0.0, **settings) -> RefineRLTrainer:
    plan = {"num_generations": 2, "max_completion_length": 4, "report_to": "none"} | settings
    own = {name: value for name, value in QUIET.items() if name != "temperature"}
    processor = tiny.processor()
    model = tiny.model(processor)
    with torch.no_grad():
        model.lm_head.weight.add_(noise)
    args = RefineConfig(output_dir=str(folder), **(own | plan))
    return RefineRLTrainer(model, args, tiny.pairs(4), processing_class=processor, template=tiny.template)


def test_refine_goes_on_with_its_own_reference_and_anchors_only(tiny, tmp_path):
    small_refine(tiny, tmp_path / "a", max_steps=1).train()
    small_refine(tiny, tmp_path / "b", max_steps=1, noise=0.1).train()
    checkpoint_1 = str(tmp_path / "a" / "checkpoint-1")
    with pytest.raises(ValueError, match="differs: base model"):
        small_refine(tiny, tmp_path / "a", noise=0.1, max_steps=2).train(checkpoint_1)
    small_refine(tiny, tmp_path / "a", max_steps=2).train(checkpoint_1)
    bank, other = (tmp_path / name / "anchors" / "train-query.safetensors" for name in "ab")
    own = bank.read_bytes()
    bank.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"differs: anchors of.query.digest .*; anchors of.query.model"):
        small_refine(tiny, tmp_path / "a", max_steps=2).train(checkpoint_1)
    bank.write_bytes(own[: -len(own) // 4] + bytes(len(own) // 4 + 1))
    with pytest.raises(ValueError, match=r"train-query.safetensors: (damaged|not an) anchor bank"):
        small_refine(tiny, tmp_path / "a", max_steps=2).train(checkpoint_1)


def test_a_longer_run_is_told_of(tiny, tmp_path, capsys):
    trainer(tiny, tmp_path, max_steps=1).train()
    run = trainer(tiny, tmp_path, max_steps=3, learning_rate=1e-3)
    run.train(resume_from_checkpoint=True)
    assert "going on with learning_rate 0.005 -> 0.001; max_steps 1 -> 3\n" in capsys.readouterr().err
    assert run.state.global_step == 3
    with pytest.raises(ValueError, match="checkpoint-3 is after the last of 2 steps"):
        trainer(tiny, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    fewer = trainer(tiny, tmp_path, num_train_epochs=2, per_device_train_batch_size=8, accept_changes=True)
    with pytest.raises(ValueError, match="checkpoint-3 is after the last of 2 steps"):
        fewer.train(resume_from_checkpoint=True)
    again = trainer(tiny, tmp_path, max_steps=3, learning_rate=1e-3)  # a requeued job that was through
    again.train(resume_from_checkpoint=True)
    assert torch.equal(again.model.lm_head.weight, run.model.lm_head.weight)


def test_a_checkpoint_of_pickles_wants_trust(tiny, tmp_path):
    trainer(tiny, tmp_path / "a", max_steps=1).train()
    found = tmp_path / "a" / "checkpoint-1"
    (found / "global_step1").mkdir()
    (found / "global_step1" / "zero_pp_rank_0.pt").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="trust_checkpoint"):
        trainer(tiny, tmp_path / "b", max_steps=2).train(resume_from_checkpoint=str(found))
    trainer(tiny, tmp_path / "b", max_steps=2, trust_checkpoint=True).train(resume_from_checkpoint=str(found))


def test_a_full_disk_is_told_of_as_a_checkpoint_that_could_not_be_written(tiny, tmp_path, monkeypatch):
    run = trainer(tiny, tmp_path, max_steps=3)
    sync = os.fsync

    def full(handle: int) -> None:
        if run.state.global_step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    told = r"a checkpoint could not be written: OSError\(28, 'No space left on device'\) \(under .*\.partial\)"
    with pytest.raises(RuntimeError, match=told):
        run.train()
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-1"


def test_other_data_is_refused_or_accepted_by_name(tiny, tmp_path, capsys):
    pairs = tiny.pairs(8)
    trainer(tiny, tmp_path, pairs, max_steps=1).train()
    for other in (pairs[::-1], pairs[:4], tiny.pairs(8, seed=2)):
        with pytest.raises(ValueError, match="was made by a run that differs: data"):
            trainer(tiny, tmp_path, other, max_steps=2).train(resume_from_checkpoint=True)
    trainer(tiny, tmp_path, pairs[:6], max_steps=2, accept_changes=True).train(resume_from_checkpoint=True)
    assert "data rows 8 -> 6" in capsys.readouterr().err


def test_a_changed_learning_rate_takes_effect(tiny, tmp_path):
    """On the model and, by the same factor, on the learnable temperature."""
    rates = {"lr_scheduler_type": "constant", "learnable_temperature": True, "max_steps": 2}
    trainer(tiny, tmp_path, **rates | {"max_steps": 1}).train()
    run = trainer(tiny, tmp_path, **rates, **{"learning_rate": 1e-2})
    run.train(resume_from_checkpoint=True)
    assert run.state.log_history[-2]["learning_rate"] == pytest.approx(1e-2)
    assert run.temperature.learning_rate == pytest.approx(2e-3)
    assert run.temperature.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)
    again = trainer(tiny, tmp_path, **rates | {"max_steps": 3}, **{"learning_rate": 1e-2})
    again.train(resume_from_checkpoint=True)
    assert again.temperature.learning_rate == pytest.approx(2e-3)
    both = {"learning_rate": 2e-2, "temperature_learning_rate": 3e-2}  # asked for, the temperature's own alone counts
    last = trainer(tiny, tmp_path, **rates | {"max_steps": 4}, **both)
    last.train(resume_from_checkpoint=True)
    assert last.temperature.learning_rate == pytest.approx(3e-2)


@pytest.mark.parametrize(("steps", "changed"), [(2, {"max_steps": 5}), (3, {"lr_scheduler_type": "linear"})], ids=str)
def test_a_changed_schedule_counts_from_the_first_step_on(tiny, tmp_path, steps, changed):
    """The next rate in the checkpoint is of the old one: 0 at its end, or another form's."""
    before = {"max_steps": steps, "save_steps": 2}
    trainer(tiny, tmp_path / "a", **before).train()
    run, straight = (trainer(tiny, tmp_path / name, accept_changes=True, **before | changed) for name in "ab")
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    straight.train()

    def rates(of: RimeTrainer) -> list[float]:
        return [entry["learning_rate"] for entry in of.state.log_history if entry["step"] > 2 and "loss" in entry]

    assert rates(run) == rates(straight) != []


# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_second_signal_does_not_cancel_the_saving(tiny, tmp_path, monkeypatch):
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)

    run = trainer(tiny, tmp_path, max_steps=6, logging_steps=100, save_steps=100, more={"callbacks": [Press()]})
    commit = checkpoint.commit

    def slow(*args):
        run.interrupt.since -= 60  # long after the first
        os.kill(os.getpid(), signal.SIGTERM)
        commit(*args)

    monkeypatch.setattr(checkpoint, "commit", slow)
    with pytest.raises(SystemExit):
        run.train()
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-2", {})


def test_a_signal_that_comes_after_the_run_counts_as_the_one_before():
    """As late as the interpreter's end: the exit code stays the run's."""
    interrupt, heard = InterruptCallback(lambda: False), []
    before = signal.signal(signal.SIGTERM, lambda *args: heard.append("before"))
    try:
        with mock.patch("atexit.register", heard.append), interrupt.listening():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        (shut,) = heard
        interrupt.since -= 60
        shut()  # too late for it
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard[1:] == ["before"]
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interrupt.listening():  # nothing was asked for in this one
            interrupt.requested = False
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard[1:] == ["before"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


PRESSED = """
import atexit, os, signal
from rime_fast.trainers.callbacks import InterruptCallback
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
interrupt = InterruptCallback(lambda: False)
with interrupt.listening():
    os.kill(os.getpid(), signal.SIGTERM)
raise SystemExit(130)
"""


@pytest.mark.slow
def test_no_signal_changes_the_exit_code():
    done = subprocess.run([sys.executable, "-c", PRESSED], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 130, done.stderr


def test_a_signal_to_the_whole_group_leaves_the_workers_alive():
    """A worker that died of it would end the run before its checkpoint; its parent's word still ends it."""
    loader = workers_loader(signalled, "fork")
    rows = iter(loader)
    first = next(rows)
    (worker,) = rows._workers
    for number in (signal.SIGTERM, signal.SIGINT):
        subprocess.run(["bash", "-c", f"kill -{number.value} {worker.pid}"], check=True)
    assert [first, *rows] == list(range(9))
    again = iter(loader)
    next(again)
    (worker,) = again._workers
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def workers_loader(begin: Any, method: str) -> Any:
    context = worker_context(1, method)
    return DataLoader(range(9), batch_size=None, num_workers=1, worker_init_fn=begin, multiprocessing_context=context)


def signalled(_: int) -> None:
    """Before a worker's first row."""
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_so_it_is_however_workers_are_started(method):
    again = iter(workers_loader(signalled, method))
    assert next(again) == 0
    (worker,) = again._workers
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_a_signal_that_comes_while_a_worker_starts_reaches_the_parent(monkeypatch):
    heard, start = [], ForkProcess.start

    def signalled_start(worker: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        start(worker)

    monkeypatch.setattr(ForkProcess, "start", signalled_start)
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("once"))
    try:
        assert list(workers_loader(None, "fork")) == list(range(9))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["once"]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


@pytest.mark.parametrize("mixed", [False, True], ids=["one set", "a mixture"])
def test_the_trainers_workers_are_such(tiny, tmp_path, mixed):
    pairs = [{"path": tiny.pairs(8), "name": "a"}] if mixed else None
    run = trainer(tiny, tmp_path, pairs, max_steps=1, dataloader_num_workers=1, **({"block": 1} if mixed else {}))
    for loader in (run.get_train_dataloader(), run.get_eval_dataloader(tiny.pairs(4))):
        assert loader.multiprocessing_context.Process is worker_context(1, None).Process
    assert run.args.dataloader_multiprocessing_context is None


# --- starts that cannot go well --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"per_device_train_batch_size": -4}, "per_device_train_batch_size is -4"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"learning_rate": -1e-5}, "learning_rate is -1e-05"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"max_steps": 1.5}, "max_steps is 1.5; expected a whole number"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps is 1.5; expected a whole number"),
        ({"num_train_epochs": math.inf}, "num_train_epochs is inf; expected a finite number > 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"adam_beta1": 1.0}, "adam_beta1 is 1.0; expected a number >= 0 and < 1"),
        ({"adam_beta2": 1.5}, "adam_beta2 is 1.5"),
        ({"seed": -1}, "seed is -1; expected a number >= 0 and <= 4294967295"),
        ({"data_seed": 2**32}, "data_seed is 4294967296"),
        ({"save_steps": 0}, "save_steps is 0; expected a number > 0"),
        ({"save_steps": -0.5}, "save_steps is -0.5"),
        ({"logging_steps": -2}, "logging_steps is -2"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps is 0"),
        ({"eval_delay": -1}, "eval_delay is -1"),
        ({"dataloader_prefetch_factor": 0, "dataloader_num_workers": 1}, "dataloader_prefetch_factor is 0"),
        ({"on_nonfinite": "go on"}, "on_nonfinite is 'go on'"),
        ({"on_nonfinite": "skip", "fp16": True}, "on_nonfinite is 'skip'"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [RimeConfig, RefineConfig])
def test_bad_values_are_refused(tmp_path, settings, name, config):
    with pytest.raises(ValueError, match=name):
        config(output_dir=str(tmp_path), **settings)


def test_values_that_have_a_meaning_are_taken(tmp_path):
    steps = {"save_steps": 0.1, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": None}
    never = {"save_strategy": "no", "save_steps": 0, "logging_strategy": "no", "logging_steps": 0}
    for settings in (steps, never, {"max_grad_norm": math.inf, "warmup_steps": 0.5, "seed": 2**32 - 1}):
        RimeConfig(output_dir=str(tmp_path), **settings)
    RefineConfig(output_dir=str(tmp_path), epsilon_high=math.inf)
    with pytest.raises(ValueError, match=r"num_generations is 2.5; expected a whole number"):
        RefineConfig(output_dir=str(tmp_path), num_generations=2.5)
    with pytest.raises(ValueError, match=r"hit_k is 1.5; expected a whole number"):
        RefineConfig(output_dir=str(tmp_path), hit_k=1.5)


def test_what_would_train_nothing_is_refused_before_step_one(tiny, tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        trainer(tiny, tmp_path, check_data=False, pairs=[]).train()
    with pytest.raises(ValueError, match="has 8 rows, a batch of all ranks 9"):
        trainer(tiny, tmp_path, per_device_train_batch_size=9, dataloader_drop_last=True).train()
    run = trainer(tiny, tmp_path)
    collate = run.collator.collate_pairs
    run.collator.collate_pairs = lambda rows: collate(rows) | {"targets": torch.full((9,), -100)}
    with pytest.raises(ValueError, match="no token of rows all over train_dataset is scored"):
        run.train()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .* cannot be written"):
        trainer(tiny, tmp_path / "file" / "run").train()


CONTRAST_ONLY = {"ce_query_weight": 0.0, "ce_target_weight": 0.0}


@pytest.mark.parametrize("case", ["a batch of one", "one row", "one item"])
def test_a_contrast_without_negatives_is_refused_or_told_of(tiny, tmp_path, case, capsys):
    pairs, settings = tiny.pairs(4), {"max_steps": 1}
    if case == "a batch of one":
        settings["per_device_train_batch_size"] = 1
    else:
        pairs = pairs[:1] if case == "one row" else [replace(pair, target=pairs[0].target) for pair in pairs]
    why = "all rows looked at have the same target" if case == "one item" else "a batch of all ranks is one pair"
    with pytest.raises(ValueError, match=f"nothing to learn, its loss is 0: {why}"):
        trainer(tiny, tmp_path / "a", pairs, **settings, **CONTRAST_ONLY).train()
    trainer(tiny, tmp_path / "b", pairs, **settings).train()
    assert f"warning: the contrast has nothing to learn, its loss is 0: {why}" in capsys.readouterr().err
    trainer(tiny, tmp_path / "c", pairs, **settings, **CE_ONLY).train()
    assert "warning" not in capsys.readouterr().err


def test_one_other_item_is_a_negative(tiny, tmp_path, capsys):
    pairs = tiny.pairs(4)
    alone = {"max_steps": 1, "per_device_train_batch_size": 1, **CONTRAST_ONLY}
    pairs[3] = replace(pairs[3], negatives=[pairs[3].target])  # the positive is none
    with pytest.raises(ValueError, match="nothing to learn"):
        trainer(tiny, tmp_path / "a", pairs, **alone).train()
    pairs[3] = replace(pairs[3], negatives=[pairs[0].target])
    with pytest.raises(ValueError, match="nothing to learn"):
        trainer(tiny, tmp_path / "b", pairs, **alone, hard_negatives=0).train()
    trainer(tiny, tmp_path / "c", pairs, **alone).train()
    same = [replace(pair, target=pairs[0].target) for pair in pairs[:3]]
    trainer(tiny, tmp_path / "d", [*same, pairs[3]], max_steps=1, **CONTRAST_ONLY).train()
    trainer(tiny, tmp_path / "e", same, max_steps=1, mask_false_negatives=False, **CONTRAST_ONLY).train()
    assert "warning" not in capsys.readouterr().err


def test_the_seed_reaches_an_adapters_first_values(tiny, tmp_path):
    from peft import LoraConfig

    def first(seed):
        torch.manual_seed(torch.seed() % 1000)
        more = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
        run = trainer(tiny, tmp_path, more=more, seed=seed)
        return torch.cat([p.flatten() for name, p in run.model.named_parameters() if "lora_A" in name])

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


# --- Refine-RL -------------------------------------------------------------------------------------------------------


def refine(tiny, folder, **settings) -> RefineRLTrainer:
    own = {"num_generations": 2, "max_completion_length": 4, "trained_sides": "query"}
    shared = {name: value for name, value in QUIET.items() if name not in ("temperature", "train_sampling_strategy")}
    args = RefineConfig(output_dir=str(folder), **(shared | own | settings))
    processor = tiny.processor()
    model = tiny.model(processor)
    return RefineRLTrainer(model, args, tiny.pairs(6), processing_class=processor, template=tiny.template)


@pytest.mark.parametrize("progress", ["plain", "none"])
def test_malformed_rollouts_are_warned_of_with_the_likeliest_cause(tiny, tmp_path, capsys, caplog, progress):
    refine(tiny, tmp_path, max_steps=1, progress=progress, save_strategy="no").train()
    told = capsys.readouterr().err + caplog.text
    assert "100% of the rollouts are malformed" in told
    assert "max_completion_length (4) may be too short" in told


@pytest.mark.parametrize("decoding", [False, True])
def test_a_policy_that_is_not_finite_makes_such_a_step(tiny, tmp_path, decoding):
    """Also where only decoding was not: what it drew is of no distribution."""
    run = refine(tiny, tmp_path / "a", max_steps=3)
    SpoilForward(run, 2, decoding=decoding)
    with pytest.raises(NonFiniteError, match=r"step 2 is not finite \(.*\); .*policy_loss"):
        run.train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "a")] == ["checkpoint-1"]
    run = refine(tiny, tmp_path / "b", max_steps=3, on_nonfinite="skip", num_iterations=2 if decoding else 1)
    SpoilForward(run, 1, decoding=decoding)
    run.train()
    assert sum(entry.get("skipped_steps", 0) for entry in run.state.log_history) == run.args.num_iterations
    assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"seed": 1}, "seed"), ({"trained_sides": "target"}, "trained_sides"), ({"beta": 0.5}, "beta")],
    ids=str,
)
def test_refine_between_two_updates_goes_on_with_its_own_settings_only(tiny, tmp_path, settings, named):
    refine(tiny, tmp_path, num_iterations=2, max_steps=1).train()
    with pytest.raises(ValueError, match=rf"was made by a run that differs: .*{named}"):
        refine(tiny, tmp_path, num_iterations=2, max_steps=2, **settings).train(resume_from_checkpoint=True)
