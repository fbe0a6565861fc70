"""Settings: defaults that are the recipe's, errors that name the field, a CPU that needs no fiddling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import HfArgumentParser

from rime_fast.ops.reward import RewardWeights
from rime_fast.recipe.joint import JointWeights
from rime_fast.trainers.config import RefineConfig, RimeConfig


def test_defaults_are_the_recipe(tmp_path):
    args = RimeConfig(output_dir=str(tmp_path))
    assert args.weights() == JointWeights()
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (5e-5, "cosine", 0.03)
    assert (args.weight_decay, args.max_grad_norm, args.temperature) == (0.0, 1.0, 0.02)
    assert args.freeze_vision
    assert not args.remove_unused_columns
    rl = RefineConfig(output_dir=str(tmp_path))
    assert (rl.num_generations, rl.learning_rate, rl.beta, rl.sampling_temperature) == (8, 1e-6, 0.04, 1.0)
    assert (rl.epsilon, rl.epsilon_high, rl.max_completion_length, rl.loss_type) == (0.2, 0.28, 512, "ume_r1")
    assert rl.reward_weights() == RewardWeights()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU default")
def test_the_cpu_needs_no_setting(tmp_path):
    args = RimeConfig(output_dir=str(tmp_path))
    assert args.use_cpu
    assert args.device.type == "cpu"
    assert not args.dataloader_pin_memory
    assert RimeConfig(output_dir=str(tmp_path), bf16=True).device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's answer")
def test_liger_says_that_it_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="use_liger_kernel"):
        RimeConfig(output_dir=str(tmp_path), use_liger_kernel=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cross_weight", -1.0),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("on_bad_row", "ignore"),
        ("progress", "fancy"),
        ("hard_negatives", -1),
        ("false_negative_margin", 3.0),
        ("remove_unused_columns", True),
        ("max_length", 2),
        ("max_pixels", 0),
        ("model_dtype", "int8"),
        ("learning_rate", None),
        ("max_grad_norm", None),
        ("save_steps", None),
        ("matryoshka_dims", 64),
        ("matryoshka_dims", ["64"]),
        ("matryoshka_weights", 1.0),
    ],
)
def test_bad_joint_settings_are_named(tmp_path, field, value):
    name = {"cross_weight": "cross"}.get(field, field)
    with pytest.raises(ValueError, match=name):
        RimeConfig(output_dir=str(tmp_path), **{field: value})


def test_nothing_to_train_is_an_error(tmp_path):
    off = dict.fromkeys(("ce_query", "ce_target", "disc", "gen", "cross"), 0.0)
    with pytest.raises(ValueError, match="all loss weights are 0"):
        RimeConfig(output_dir=str(tmp_path), **{f"{name}_weight": value for name, value in off.items()})


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"trained_sides": "left"}, "trained_sides"),
        ({"anchors": "old"}, "anchors"),
        ({"loss_type": "ppo"}, "loss_type"),
        ({"num_generations": 1}, "num_generations"),
        ({"reward_mode": "ume_r1", "trained_sides": "query"}, "reward_mode"),
        ({"reference": "none"}, "reference"),
        ({"rank_reward": "first"}, "rank_reward"),
        ({"length_weight": float("inf")}, "w_len"),
        ({"top_p": 0.0}, "top_p"),
        ({"sampling_temperature": 0.0}, "sampling_temperature"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"epsilon": 2.0}, "epsilon"),
    ],
)
def test_bad_refine_settings_are_named(tmp_path, settings, name):
    with pytest.raises(ValueError, match=name):
        RefineConfig(output_dir=str(tmp_path), **settings)


def test_reward_settings_reach_the_operator(tmp_path):
    args = RefineConfig(
        output_dir=str(tmp_path),
        rank_reward="hit",
        hit_k=3,
        negative_reduction="max",
        length_limit=9.0,
        length_weight=0.5,
        scale_rewards=False,
    )
    assert args.reward_weights() == RewardWeights(
        rank_reward="hit", hit_k=3, negative="max", length_limit=9.0, w_len=0.5, normalize_std=False
    )
    theirs = RefineConfig(output_dir=str(tmp_path), reward_mode="ume_r1", num_generations=4).reward_weights()
    assert (theirs.mode, theirs.positives, theirs.w_refine, theirs.w_len) == ("ume_r1", 4, 0.0, 0.0)


@pytest.mark.parametrize("config", [RimeConfig, RefineConfig])
def test_every_own_setting_explains_itself_and_parses(config, tmp_path):
    own = {f.name: f for f in dataclasses.fields(config)}
    for name in set(own) - {f.name for f in dataclasses.fields(config.__mro__[-2])}:
        assert len(own[name].metadata.get("help", "")) > 15, name
    (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--template", "cot", "--learning_rate", "1e-4", "--max_length", "64"]
    )
    assert (parsed.template, parsed.learning_rate, parsed.max_length) == ("cot", 1e-4, 64)


OLD_NAMES = {"negatives": ("anchor_pool", "batch"), "negative": ("negative_reduction", "max")}


@pytest.mark.parametrize(("old", "new", "value"), [(old, *rest) for old, rest in OLD_NAMES.items()])
def test_old_names_work_with_a_warning(tmp_path, old, new, value):
    """In Python, in a YAML file and on the command line."""
    from rime_fast.cli.refine import COMMAND
    from rime_fast.cli.values import build

    def check(make):
        with pytest.warns(FutureWarning, match=f"{old} is now called {new}"):
            args = make()
        assert getattr(args, new) == value
        assert getattr(args, old) is None

    check(lambda: RefineConfig(output_dir=str(tmp_path), **{old: value}))
    file = tmp_path / "refine.yaml"
    file.write_text(f"model: x\ntrain_data: y\n{old}: {value}\n")
    for words in (["--config", str(file)], ["--model", "x", "--train_data", "y", f"--{old}", value]):
        values = COMMAND.read([*words, "--output_dir", str(tmp_path)])
        check(lambda values=values: build(RefineConfig, values))
    with pytest.raises(ValueError, match=f"{old} is '{value}' and {new}, its new name"), pytest.warns(FutureWarning):
        RefineConfig(output_dir=str(tmp_path), **{old: value, new: "softmax" if new != "anchor_pool" else "other"})
