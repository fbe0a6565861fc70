"""RefineRLTrainer: what it reinforces, what it keeps fixed, how it resumes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rime_fast.trainers.config import RefineConfig
from rime_fast.trainers.refine import RefineRLTrainer

QUIET = {
    "save_strategy": "no",
    "logging_steps": 1,
    "progress": "none",
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "num_generations": 3,
    "max_completion_length": 5,
}


def trainer(tiny, folder, pairs=None, *, more=None, **settings) -> RefineRLTrainer:
    args = RefineConfig(output_dir=str(folder), **(QUIET | settings))
    processor = tiny.processor()
    return RefineRLTrainer(
        tiny.model(processor),
        args,
        tiny.pairs(8) if pairs is None else pairs,
        processing_class=processor,
        template=tiny.template,
        **(more or {}),
    )


def curve(run: RefineRLTrainer) -> list[dict[str, float]]:
    timed = ("per_second", "data_wait", "runtime", "total_flos", "train_loss")
    return [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in run.state.log_history]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trained_sides": "query"},
        {"trained_sides": "target", "anchors": "policy"},
        {"anchors": "policy"},
        {"anchor_pool": "batch", "loss_type": "token_mean"},
        {"reward_mode": "ume_r1", "loss_type": "dr_grpo", "scale_rewards": False},
        {"beta": 0.0},
    ],
    ids=str,
)
def test_every_switch_runs_and_logs(tiny, tmp_path, settings):
    run = trainer(tiny, tmp_path, max_steps=2, **settings)
    run.train()
    log = run.state.log_history[0]
    names = {
        "reward/total",
        "reward/format",
        "reward/score",
        "reward/refine",
        "reward/length",
        "rewrite_tokens",
        "kl",
        "entropy",
        "clip_fraction",
        "group_std",
        "degenerate_groups",
        "format_failed",
        "unfinished",
        "ratio",
    }
    assert names <= set(log)
    assert log["ratio"] == 1.0
    assert log["clip_fraction"] == 0.0
    assert 1 <= log["rewrite_tokens"] <= 5
    assert 0 < log["entropy"] <= math.log(run.model.config.get_text_config().vocab_size)
    assert all(math.isfinite(value) for value in log.values())
    sides = 1 if "trained_sides" in settings else 2
    assert 0 <= log["unfinished"] <= log["format_failed"] <= 2 * 3 * sides
    if settings.get("beta") == 0:
        assert run.reference.kind == "none"
    else:
        assert log["kl"] < 1e-9 < run.state.log_history[1]["kl"]


def test_anchors_stay_those_of_the_start(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=2)
    start = copy.deepcopy(run.model)
    run.train()
    pairs = tiny.pairs(8)
    for side in ("query", "target"):
        bank = run.banks["train", side]
        sides = [getattr(pair, side) for pair in pairs]
        with torch.no_grad():
            want, moved = (
                m.eval()(**run.collator.collate_prompts(sides, mode="disc")).embeddings["disc"]
                for m in (start, run.model)
            )
        torch.testing.assert_close(bank.anchors, want, rtol=1e-5, atol=1e-6)
        assert (bank.anchors - moved).abs().max() > 1e-3
        assert (tmp_path / "anchors" / f"train-{side}.safetensors").exists()


def test_it_raises_the_reward_it_is_given(tiny, tmp_path):
    """Only the length costs: rewrites must become shorter."""
    run = trainer(
        tiny,
        tmp_path,
        max_steps=12,
        format_weight=0,
        rank_weight=0,
        refine_weight=0,
        length_weight=1.0,
        length_limit=1.0,
        max_completion_length=8,
        beta=0.0,
        num_generations=8,
        trained_sides="query",
        per_device_train_batch_size=8,
    )
    run.train()
    lengths = [entry["rewrite_tokens"] for entry in run.state.log_history[:-1]]
    rewards = [entry["reward/total"] for entry in run.state.log_history[:-1]]
    assert sum(lengths[-3:]) < 0.8 * sum(lengths[:3])
    assert sum(rewards[-3:]) > sum(rewards[:3])


def test_the_reward_sees_true_negatives_only(tiny, tmp_path):
    """All pairs share one target: nothing is left to compete with, so every rank is 1."""
    pairs = tiny.pairs(6)
    for pair in pairs:
        pair.target = pairs[0].target
    run = trainer(tiny, tmp_path, pairs, max_steps=1, trained_sides="query")
    run.train()
    assert run.state.log_history[0]["reward/rank"] == 1.0
    for i, pair in enumerate(pairs):  # other ids, but the same text
        pair.target = replace(pair.target, id=f"own{i}")
    run = trainer(tiny, tmp_path, pairs, max_steps=1, trained_sides="query")
    run.train()
    assert run.state.log_history[0]["reward/rank"] == 1.0


def test_more_updates_per_rollout_batch_clip_against_the_stored_policy(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=6, num_iterations=3, learning_rate=2e-2)
    run.train()
    ratios = [entry["ratio"] for entry in run.state.log_history[:-1]]
    assert ratios[0] == ratios[3] == 1.0
    assert all(ratios[i] != 1.0 for i in (1, 2, 4, 5))
    assert any(run.state.log_history[i]["clip_fraction"] > 0 for i in (1, 2, 4, 5))
    assert ["reward/total" in entry for entry in run.state.log_history[:-1]] == [True, False, False] * 2


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({}, 3),
        ({"num_iterations": 2, "gradient_accumulation_steps": 2}, 3),
        ({"gradient_accumulation_steps": 2, "loss_type": "token_mean"}, 3),
        ({"num_iterations": 2, "gradient_accumulation_steps": 2, "loss_type": "token_mean"}, 3),
    ],
    ids=["one update", "inside a rollout batch", "drawn ahead", "drawn ahead, inside a rollout batch"],
)
def test_resume_reproduces_the_uninterrupted_run_to_the_bit(tiny, tmp_path, settings, at):
    settings = settings | {"max_steps": 5, "save_strategy": "steps", "save_steps": at}
    straight = trainer(tiny, tmp_path / "a", **settings)
    straight.train()
    resumed = trainer(tiny, tmp_path / "a", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{at}"))
    assert curve(resumed)[:-1] == curve(straight)[:-1]
    other = dict(resumed.model.named_parameters())
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, other[name]), name


def test_the_adapter_off_is_the_reference(tiny, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    run = trainer(tiny, tmp_path, max_steps=3, learning_rate=5e-2, more={"peft_config": config})
    assert run.reference.kind == "adapter"
    assert run.reference.copy is None
    run.train()
    first, *_, last = run.state.log_history[:-1]
    assert first["kl"] < 1e-9 < last["kl"]
    assert first["ratio"] == 1.0


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_taken_out_of_the_weights_is_no_reference_when_off(tiny, tmp_path, start):
    """What is left without it is another model: the first step has no KL to the start."""
    from peft import LoraConfig

    more = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)}
    run = trainer(tiny, tmp_path, max_steps=1, more=more)
    run.train()
    assert run.reference.kind == "copy"
    assert run.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' takes the adapter out"):
        trainer(tiny, tmp_path, reference="adapter", more=more)


def test_evaluation_reports_rewards(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=1, more={"eval_dataset": tiny.pairs(4, seed=9)})
    found = run.evaluate()
    names = {"eval_reward/total", "eval_rewrite_tokens", "eval_reward/hit"}
    assert names <= set(found)
    assert names <= set(run.evaluate(tiny.pairs(3, seed=8)))


def test_bfloat16_autocast_on_the_cpu(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=1, bf16=True)
    run.train()
    assert run.state.log_history[0]["ratio"] == 1.0


def test_a_stale_bank_is_an_error(tiny, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tiny, tmp_path, **settings).train()
    other = trainer(tiny, tmp_path, tiny.pairs(8, seed=4), **settings)
    with pytest.raises(ValueError, match="stale anchor bank: its data fingerprint"):
        other.train(resume_from_checkpoint=str(Path(tmp_path) / "checkpoint-1"))


def test_reference_errors_are_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="reference='adapter' needs a peft model"):
        trainer(tiny, tmp_path, reference="adapter")
    with pytest.raises(TypeError, match="expected RefineConfig"):
        RefineRLTrainer(tiny.model(tiny.processor()), 3)  # type: ignore[arg-type]
