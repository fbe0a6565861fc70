"""RimeTrainer through the gradient cache: the same weights and logs as the plain step."""

from __future__ import annotations

import math

import pytest
import torch

from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer

QUIET = {
    "save_strategy": "no",
    "logging_steps": 1,
    "progress": "none",
    "per_device_train_batch_size": 6,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "temperature": 0.1,
    "max_steps": 2,
}


def trained(tiny, folder, more=None, *, negatives=1, **settings) -> RimeTrainer:
    args = RimeConfig(output_dir=str(folder), **(QUIET | settings))
    processor = tiny.processor()
    run = RimeTrainer(
        tiny.model(processor),
        args,
        tiny.pairs(12, negatives=negatives),
        processing_class=processor,
        template=tiny.template,
        **(more or {}),
    )
    run.parts = spied(run.cache)
    run.train()
    return run


def spied(cache) -> list[int]:
    """Filled with the number of micro-batches of every step."""
    step, counts = cache.step, []

    def counted(parts, **options):
        counts.append(len(parts))
        return step(parts, **options)

    cache.step = counted
    return counts


def assert_same(ours: RimeTrainer, plain: RimeTrainer) -> None:
    for mine, wanted in zip(ours.state.log_history, plain.state.log_history, strict=True):
        compared = {k for k in wanted if not any(word in k for word in ("per_second", "runtime", "data_wait"))}
        assert mine.keys() == wanted.keys()
        assert {k: mine[k] for k in compared} == pytest.approx({k: wanted[k] for k in compared}, rel=2e-4, abs=1e-6)
    other = dict(plain.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert (parameter - other[name]).norm() <= 2e-3 * other[name].norm(), name


# hard negatives, some without a rewrite; SGD, whose update is the gradient
SGD = {"optim": "sgd", "learning_rate": 0.05}
TWICE = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "learnable_temperature": True}
SETTINGS = {
    "small": ({}, {"micro_batch_tokens": 60}),
    "kept": ({}, {"micro_batch_tokens": 60, "kept_graphs_gib": math.inf}),
    "one_part": ({}, {"contrastive_batch_size": 6, "vision_features_on_host": True}),
    "accumulated": (TWICE, {"micro_batch_tokens": 60}),
    "checkpointed": ({"freeze_vision": False}, {"micro_batch_tokens": 60, "gradient_checkpointing": True}),
    "no_tokens": ({"ce_query_weight": 0.0, "ce_target_weight": 0.0}, {"micro_batch_tokens": 60}),
}
plain_runs: dict[str, RimeTrainer] = {}


def plain_run(tiny, folder, settings) -> RimeTrainer:
    """Trained once for every set of settings."""
    if str(settings) not in plain_runs:
        plain_runs[str(settings)] = trained(tiny, folder, **(SGD | settings))
    return plain_runs[str(settings)]


@pytest.mark.parametrize(("settings", "cache"), SETTINGS.values(), ids=SETTINGS)
def test_cached_steps_equal_plain_steps(tiny, tmp_path, settings, cache):
    plain = plain_run(tiny, tmp_path, settings)
    ours = trained(tiny, tmp_path, **(SGD | settings | cache))
    assert set(plain.parts) == {1}
    assert (max(ours.parts) > 1) == ("contrastive_batch_size" not in cache)
    assert_same(ours, plain)


def test_bf16_autocast_is_as_exact_as_the_plain_step(tiny, tmp_path):
    """Both against the plain fp32 step: updates of all parameters, and the first loss."""
    wide = plain_run(tiny, tmp_path, {})
    start = tiny.model(tiny.processor()).state_dict()

    def error(run: RimeTrainer) -> tuple[float, float]:
        want = dict(wide.model.named_parameters())
        off = [(p - want[name]).detach().norm() for name, p in run.model.named_parameters()]
        size = [(p - start[name]).detach().norm() for name, p in want.items() if p.shape == start[name].shape]
        losses = [one.state.log_history[0]["loss"] for one in (run, wide)]
        return float(torch.stack(off).norm() / torch.stack(size).norm()), abs(losses[0] / losses[1] - 1)

    plain = error(trained(tiny, tmp_path, bf16=True, **SGD))
    ours = error(trained(tiny, tmp_path, bf16=True, micro_batch_tokens=60, **SGD))
    assert 1e-5 < plain[0] < 0.1
    assert ours[0] <= 2 * plain[0]
    assert ours[1] <= 2 * plain[1] + 1e-2


def test_resume_to_the_bit_with_another_number_of_kept_graphs(tiny, tmp_path):
    """LoRA's dropout draws numbers; the first step after a start measures a graph and keeps one, later ones more."""
    from peft import LoraConfig

    def run(folder: str, resume: str | None = None) -> RimeTrainer:
        lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])
        args = RimeConfig(
            output_dir=str(tmp_path / folder),
            micro_batch_tokens=60,
            kept_graphs_gib=0.0005,
            seed=3,
            learnable_temperature=True,
            **(QUIET | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}),
        )
        processor = tiny.processor()
        made = RimeTrainer(
            tiny.model(processor),
            args,
            tiny.pairs(12),
            processing_class=processor,
            template=tiny.template,
            peft_config=lora,
        )
        step, kept = made.cache.step, []

        def counted(*args, **options):
            kept.append(step(*args, **options))
            return kept[-1]

        made.cache.step = counted
        made.train(resume_from_checkpoint=resume)
        made.kept = [done.kept for done in kept]
        return made

    straight = run("a")
    resumed = run("b", str(tmp_path / "a" / "checkpoint-2"))
    assert straight.kept[0] == resumed.kept[0] == 1 < straight.kept[2]
    timed = ("per_second", "data_wait", "runtime", "flos", "train_loss")
    curves = [
        [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in one.state.log_history]
        for one in (straight, resumed)
    ]
    assert curves[0] == curves[1]
    other = dict(resumed.model.named_parameters())
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, other[name]), name


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


def test_whoever_overrides_the_loss_is_trained_by_it(tiny, tmp_path):
    class Louder(RimeTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, out = super().compute_loss(model, inputs, return_outputs=True)
            assert out.embeddings["gen"].requires_grad
            return (3.0 * loss, out) if return_outputs else 3.0 * loss

    settings = {"save_strategy": "no", "progress": "none", "logging_steps": 1, "max_steps": 1}
    logs = []
    for kind in (RimeTrainer, Louder):
        processor = tiny.processor()
        args = RimeConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, **settings)
        run = kind(tiny.model(processor), args, tiny.pairs(4), processing_class=processor, template=tiny.template)
        run.train()
        logs.append(run.state.log_history[0])
    assert logs[1]["loss"] == pytest.approx(3 * logs[0]["loss"], rel=1e-5)
    assert logs[1]["grad_norm"] == pytest.approx(3 * logs[0]["grad_norm"], rel=1e-3)


def test_without_a_contrast_one_micro_batch_serves(tiny, tmp_path):
    only = {"disc_weight": 0.0, "gen_weight": 0.0, "cross_weight": 0.0}
    run = trained(tiny, tmp_path, micro_batch_tokens=60, **only)
    assert set(run.parts) == {1}
    assert not any(name.startswith("contrast") for name in run.state.log_history[0])


def test_cross_entropy_over_accumulated_batches_is_the_mean_over_the_steps_tokens(tiny, tmp_path):
    """Not the mean of each batch's mean: rewrites are of unequal lengths."""
    pairs = tiny.pairs(8)
    for i, pair in enumerate(pairs):
        pair.query.rewrite = "red " * (1 + 5 * (i % 8 < 4))
    only = {"disc_weight": 0.0, "gen_weight": 0.0, "cross_weight": 0.0, "train_sampling_strategy": "sequential"}
    runs = []
    for size, accumulation in ((8, 1), (4, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        processor = tiny.processor()
        args = RimeConfig(output_dir=str(tmp_path), **(QUIET | SGD | only | sizes))
        run = RimeTrainer(tiny.model(processor), args, pairs, processing_class=processor, template=tiny.template)
        run.train()
        runs.append(run)
    assert_same(*runs)
