"""A Refine-RL step in parts: the loss, gradients and metrics of the whole; refilled groups; one pass of the tower."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from refine_ranks_worker import Dictated

from rime_fast.engine.packed_batch import plan_micro_batches
from rime_fast.trainers.config import RefineConfig
from rime_fast.trainers.refine import RefineRLTrainer

QUIET = {
    "save_strategy": "no",
    "logging_steps": 1,
    "progress": "none",
    "per_device_train_batch_size": 3,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "num_generations": 3,
    "max_completion_length": 6,
    "lr_scheduler_type": "constant",
}


def trainer(tiny, folder, *, more=None, **settings):
    args = RefineConfig(output_dir=str(folder), **(QUIET | settings))
    processor = tiny.processor()
    return RefineRLTrainer(
        tiny.model(processor), args, tiny.pairs(6), processing_class=processor, template=tiny.template, **(more or {})
    )


def test_parts_are_as_few_as_neighbours_allow():
    costs = [5, 5, 1, 9, 20, 3, 3]
    assert plan_micro_batches(costs, 11, neighbours=True) == [[0, 1, 2], [3], [4], [5, 6]]
    whole = [list(range(7))]
    assert plan_micro_batches(costs, None) == plan_micro_batches(costs, 46, neighbours=True) == whole
    assert len(plan_micro_batches(costs, 1, neighbours=True)) == 7


class Stepped:
    """One step on given rollouts: loss, gradients, metrics, policy forwards."""

    def __init__(self, tiny, folder, rollouts=None, *, updates=1, **settings):
        self.run = run = trainer(tiny, folder, **settings)
        run.model.double()
        if run.reference.copy is not None:
            run.reference.copy.double()
        run.make_banks(run.model)
        inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
        torch.manual_seed(3)
        self.rollouts = rollouts or run.generator.generate(run.policy, inputs["sides"], inputs["prompts"])
        run.generator.generate = lambda *_: self.rollouts
        run.model.train()
        run.current_gradient_accumulation_steps = 1
        self.forwards = []
        run.model.register_forward_pre_hook(
            lambda _, args, given: self.forwards.append(given["input_ids"].shape[0]), with_kwargs=True
        )
        for _ in range(updates):
            run.model.zero_grad()
            self.loss = run.training_step(run.model, inputs)
        self.gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
        self.metrics = run.sums.drain(torch.device("cpu"))

    def equals(self, other, bound):
        assert float(self.loss) == pytest.approx(float(other.loss), rel=bound, abs=bound)
        assert self.gradients.keys() == other.gradients.keys()
        for name, want in other.gradients.items():
            error = float((self.gradients[name] - want).norm() / want.norm().clamp(min=1e-9))
            assert error <= bound, f"{name}: {error:.1e}"
        assert self.metrics.keys() == other.metrics.keys()
        for name, want in other.metrics.items():
            if name not in ("samples", "tokens", "kl"):
                assert self.metrics[name] == pytest.approx(want, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "token_mean", "trained_sides": "query"},
        {"loss_type": "dr_grpo", "scale_rewards": False, "anchor_pool": "batch"},
        {"anchors": "policy", "trained_sides": "target"},
        {"shared_prefix": False},
    ],
    ids=str,
)
def test_a_step_in_parts_is_the_step(tiny, tmp_path, settings):
    whole = Stepped(tiny, tmp_path, beta=0.1, **settings)
    prompts = 3 if "trained_sides" in settings else 6
    for budget, parts in ((1, prompts), (max(whole.forwards) // 2 + 20, 2 if prompts == 6 else None)):
        cut = Stepped(tiny, tmp_path, whole.rollouts, beta=0.1, micro_batch_tokens=budget, **settings)
        cut.equals(whole, 1e-6)
        extra = 1 if "anchors" in settings else 0
        assert parts is None or len(cut.forwards) == parts + extra
    assert whole.metrics["ratio"] == 1.0


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "micro_batch_tokens": 1}], ids=str)
@pytest.mark.parametrize("loss_type", ["token_mean", "ume_r1"])
def test_accumulated_batches_are_the_step(tiny, tmp_path, loss_type, settings):
    """The mean over all tokens, or rollouts, of the step, not of its batches' means; at the end of an epoch too, where
    a step has a batch of four prompts and one of two."""
    found = []
    for batch, accumulated in ((3, 1), (1, 3)) if settings else ((3, 1), (1, 3), (6, 1), (4, 2)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        order = {"train_sampling_strategy": "sequential", "optim": "sgd", "max_steps": 3, "max_completion_length": 9}
        run = trainer(tiny, tmp_path, loss_type=loss_type, **(order | sizes | settings))
        run.model.double()
        run.reference.copy.double()
        run.generator.backend = Dictated(run.processing_class.tokenizer)
        start = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.train()
        moved = {name: value - start[name] for name, value in run.model.state_dict().items()}
        found.append((moved, [entry["loss"] for entry in run.state.log_history[:-1]]))
    for (whole, losses), (parts, parted) in zip(found[::2], found[1::2], strict=True):
        assert parted == pytest.approx(losses, rel=1e-4, abs=1e-6)
        for name, want in whole.items():
            assert (parts[name] - want).norm() <= 1e-4 * want.norm() + 1e-9, name
        assert sum(bool(want.norm() > 1e-6) for want in whole.values()) > 20


@pytest.mark.parametrize("settings", [{"reward_mode": "ume_r1"}, {"anchors": "policy"}], ids=str)
def test_rewards_that_need_the_whole_batch_come_from_decoding(tiny, tmp_path, settings):
    """In parts they are those of a whole step that takes g from decoding, as one with several updates does."""
    whole = Stepped(tiny, tmp_path, num_iterations=2, **settings)
    assert whole.rollouts.has_states
    rewards = whole.rollouts.rewards.clone()
    for updates in ({}, {"num_iterations": 2}):
        cut = Stepped(tiny, tmp_path, whole.rollouts, micro_batch_tokens=1, **updates, **settings)
        assert torch.equal(cut.rollouts.rewards, rewards)
        cut.equals(whole, 1e-6)
    plain = Stepped(tiny, tmp_path, whole.rollouts, **settings)  # g of the forward that is trained on
    torch.testing.assert_close(plain.rollouts.rewards, rewards, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_tokens": 1},
        {"num_iterations": 2, "micro_batch_tokens": 150},
        {"beta": 0.0, "rollout_batch": 3},
    ],
    ids=str,
)
def test_a_frozen_vision_tower_sees_an_image_once(tiny, tmp_path, settings):
    run = trainer(tiny, tmp_path, max_steps=2, anchors="policy", trained_sides="query", **settings)
    seen = []
    tower = run.model.model.visual
    tower.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    patches = inputs["prompts"]["pixel_values"].shape[0]
    run.current_gradient_accumulation_steps = 1
    run.model.train()
    run.training_step(run.model, inputs)
    assert sum(seen) == patches
    tower.requires_grad_(True)
    run.training_step(run.model, inputs) if "num_iterations" in settings else None
    before = sum(seen)
    run.training_step(run.model, inputs)
    assert sum(seen) - before > patches  # rollout, reference and policy each see them
