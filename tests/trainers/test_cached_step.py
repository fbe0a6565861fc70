"""RimeTrainer through the gradient cache: the same weights and logs as the plain step."""

from __future__ import annotations

import math

import pytest
import torch

from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.rime_trainer import RimeTrainer

QUIET = {"save_strategy": "no", "logging_steps": 1, "progress": "none", "per_device_train_batch_size": 6,
         "learning_rate": 5e-3, "warmup_steps": 0, "temperature": 0.1, "max_steps": 2}  # fmt: skip


def trained(tiny, folder, more=None, *, negatives=1, **settings) -> RimeTrainer:
    args = RimeConfig(output_dir=str(folder), **(QUIET | settings))
    processor = tiny.processor()
    run = RimeTrainer(tiny.model(processor), args, tiny.pairs(12, negatives=negatives), processing_class=processor,
                      template=tiny.template, **(more or {}))  # fmt: skip
    run.train()
    return run


def assert_same(ours: RimeTrainer, plain: RimeTrainer) -> None:
    for mine, wanted in zip(ours.state.log_history, plain.state.log_history, strict=True):
        compared = {k for k in wanted if "per_second" not in k and "runtime" not in k}
        assert mine.keys() == wanted.keys()
        assert {k: mine[k] for k in compared} == pytest.approx({k: wanted[k] for k in compared}, rel=2e-4, abs=1e-6)
    other = dict(plain.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert (parameter - other[name]).norm() <= 2e-3 * other[name].norm(), name


SETTINGS = {
    "small": {"micro_batch_tokens": 60},
    "kept": {"micro_batch_tokens": 60, "kept_graphs_gib": math.inf},
    "one_part": {"micro_batch_tokens": 10**6},
    "accumulated": {"micro_batch_tokens": 60, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3,
                    "learnable_temperature": True},
    "checkpointed": {"micro_batch_tokens": 60, "gradient_checkpointing": True, "freeze_vision": False},
    "no_tokens": {"micro_batch_tokens": 60, "ce_query_weight": 0.0, "ce_target_weight": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_cached_steps_equal_plain_steps(tiny, tmp_path, settings):
    """Hard negatives, some without a rewrite; SGD, whose update is the gradient."""
    settings = settings | {"optim": "sgd", "learning_rate": 0.05}
    cache_only = ("micro_batch_tokens", "kept_graphs_gib")
    plain = trained(tiny, tmp_path, **{k: v for k, v in settings.items() if k not in cache_only})
    ours = trained(tiny, tmp_path, **settings)
    assert ours.cached is not None
    assert plain.cached is None
    assert_same(ours, plain)


def test_lora_with_dropout_trains(tiny, tmp_path):
    from peft import LoraConfig

    more = {"peft_config": LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])}
    run = trained(tiny, tmp_path, more, micro_batch_tokens=60, max_steps=3)
    assert all(math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)
    moved = [p for n, p in run.model.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 0 for p in moved)


def test_the_contrast_is_sized_by_its_own_setting(tmp_path):
    args = RimeConfig(output_dir=str(tmp_path), contrastive_batch_size=1024, per_device_train_batch_size=4)
    assert args.per_device_train_batch_size == 1024
    assert args.micro_batch_tokens == 16384
    for wrong in ({"contrastive_batch_size": 0}, {"micro_batch_tokens": 0}, {"kept_graphs_gib": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RimeConfig(output_dir=str(tmp_path), **wrong)


def test_evaluation_is_plain(tiny, tmp_path):
    more = {"eval_dataset": tiny.pairs(6, seed=5)}
    run = trained(tiny, tmp_path, more, micro_batch_tokens=60, eval_strategy="steps", eval_steps=1)
    assert all(math.isfinite(e["eval_loss"]) for e in run.state.log_history if "eval_loss" in e)
    assert torch.is_grad_enabled()
