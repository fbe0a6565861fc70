"""What Refine-RL does with bad input: a named error, or a fallback that is counted in the logs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rime_fast.engine.rollout import LocalBackend
from rime_fast.engine.rollout_buffer import RolloutBuffer
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
    "max_completion_length": 32,
    "trained_sides": "query",
    "max_steps": 1,
}
GEN, OPEN, CLOSE, RED = "<gen_emb>", "<rewrite>", "</rewrite>\n", "red"
GOOD = OPEN + RED + CLOSE + GEN


def trainer(tiny, folder, *, backend=None, **settings):
    args = RefineConfig(output_dir=str(folder), **(QUIET | settings))
    processor = tiny.processor()
    return RefineRLTrainer(
        tiny.model(processor),
        args,
        tiny.pairs(4),
        processing_class=processor,
        template=tiny.template,
        rollout_backend=backend,
    )


class Says:
    """A backend that gives these texts as the G responses to every prompt."""

    def __init__(self, *texts):
        self.texts, self.tokenizer = texts, None

    def refresh(self, policy):
        pass

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def generate(self, policy, sides, prompts, sampling, out=None):
        given = [self.ids(text) for text in self.texts]
        rows = given * len(sides)
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.tensor([row + [sampling.pad_id] * (int(max(lengths)) - len(row)) for row in rows])
        ended = torch.tensor([bool(row) and row[-1] == sampling.gen_id for row in rows])
        return RolloutBuffer(tokens, lengths, torch.zeros(tokens.shape), ended)


def logged(tiny, folder, *texts, prepare=None, **settings):
    backend = Says(*texts)
    run = trainer(tiny, folder, backend=backend, **settings)
    backend.tokenizer = run.processing_class.tokenizer
    if prepare is not None:
        prepare(run)
    run.train()
    log = run.state.log_history[0]
    assert all(math.isfinite(value) for value in log.values())
    return log


def test_rollouts_without_gen_emb_are_counted_and_have_no_format_reward(tiny, tmp_path):
    log = logged(tiny, tmp_path, GOOD, OPEN + RED + CLOSE, RED)
    assert (log["unfinished"], log["format_failed"]) == (4, 4)  # two of three, for each of two prompts
    assert log["reward/format"] == pytest.approx(1 / 3)
    assert log["reward/nan"] == 0


def test_empty_rewrites_are_format_failures(tiny, tmp_path):
    log = logged(tiny, tmp_path, GEN, OPEN + CLOSE + GEN, GOOD)
    assert (log["unfinished"], log["format_failed"]) == (0, 4)
    assert log["rewrite_tokens"] >= 1


def test_a_response_without_a_token_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="Says: rollout 1 is empty; expected at least one token"):
        logged(tiny, tmp_path, GOOD, "", GOOD)


def test_responses_above_the_cap_are_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="Says gave 22 tokens a rollout; max_completion_length is 16"):
        logged(tiny, tmp_path, GOOD, GOOD, GOOD, max_completion_length=16)


def test_missing_embeddings_are_counted_and_do_not_spread(tiny, tmp_path):
    def spoil(run):
        def hook(module, args, out):
            if "gen" in out.embeddings:
                out.embeddings["gen"] = out.embeddings["gen"].index_fill(0, torch.tensor([1]), torch.nan)

        run.model.register_forward_hook(hook)

    log = logged(tiny, tmp_path, GOOD, RED + GEN, OPEN + GEN, prepare=spoil)
    assert log["reward/nan"] == pytest.approx(1 / 6)
    assert log["reward/rank"] >= 1.0  # a missing row's rank of 0 is not in the mean


def test_a_pair_outside_the_bank_is_named(tiny, tmp_path):
    run = trainer(tiny, tmp_path)
    run.make_banks(run.model)
    bank = run.banks["train", "target"]
    run.banks["train", "target"] = replace(bank, anchors=bank.anchors[:2], ids=bank.ids[:2], total=2)
    with pytest.raises(ValueError, match="pair 3 has no anchor: the bank of 'train', side target, holds 2"):
        run.train()


def test_a_group_of_one(tiny, tmp_path):
    with pytest.raises(ValueError, match="num_generations is 1: a group of one has no advantage"):
        RefineConfig(output_dir=str(tmp_path), num_generations=1)
    log = logged(tiny, tmp_path, GOOD, num_generations=1, scale_rewards=False)
    assert log["degenerate_groups"] == 1.0
    assert log["policy_loss"] == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refill_degenerate": 1, "reward_mode": "ume_r1", "trained_sides": "both"}, "these rewards need all ranks"),
        ({"refill_degenerate": 1, "num_generations": 1, "scale_rewards": False}, "every group of one is degenerate"),
        ({"refill_degenerate": -1}, "refill_degenerate"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens"),
        ({"bank_storage": "disk"}, "bank_storage is 'disk'; expected one of 'device', 'host', 'sharded'"),
        ({"anchor_bank": "x", "anchors": "policy"}, "anchor_bank is set, but the reward uses no bank"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RefineConfig(output_dir=str(tmp_path), **settings)


class SameAtFirst(LocalBackend):
    """The first rollouts of a step are greedy: all of a group are the same."""

    calls = 0

    def generate(self, policy, sides, prompts, sampling, out=None):
        self.calls += 1
        self.asked = len(sides)
        sampling = replace(sampling, temperature=0.0 if self.calls == 1 else 1.0)
        return super().generate(policy, sides, prompts, sampling, out)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 2, "micro_batch_tokens": 1},
        {"anchors": "policy"},
    ],
    ids=str,
)
def test_degenerate_groups_are_counted_and_drawn_again(tiny, tmp_path, settings):
    counts = {}
    for refill in (0, 3):
        backend = SameAtFirst()
        more = {"refill_degenerate": refill, "rank_weight": 9.0} | settings
        run = trainer(tiny, tmp_path / str(refill), backend=backend, **more)
        run.train()
        counts[refill] = run.state.log_history[0]
        assert backend.calls == (1 if refill == 0 else backend.calls)
    assert counts[0]["degenerate_groups"] == 1.0
    assert "refilled_groups" not in counts[0]
    assert counts[0]["policy_loss"] == pytest.approx(0.0, abs=1e-6)
    assert counts[3]["degenerate_groups"] == 0.0
    assert counts[3]["refilled_groups"] >= 2
    assert counts[3]["ratio"] == 1.0


def test_refilling_needs_states(tiny, tmp_path):
    with pytest.raises(ValueError, match="refill_degenerate: Says gives no gen_states"):
        logged(tiny, tmp_path, GOOD, RED, GEN, refill_degenerate=1)


def test_a_backend_without_states_costs_one_more_forward(tiny, tmp_path):
    """UME-R1's reward in parts, and several updates: g comes from a forward before them."""
    log = logged(
        tiny,
        tmp_path,
        GOOD,
        RED + GEN,
        OPEN + GEN,
        trained_sides="both",
        reward_mode="ume_r1",
        micro_batch_tokens=1,
        num_iterations=2,
    )
    assert log["ratio"] == 1.0
    assert log["reward/nan"] == 0.0


def test_a_checkpoint_whose_rollouts_are_gone_is_named(tiny, tmp_path):
    settings = {"num_iterations": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer(tiny, tmp_path, **settings).train()
    for file in (tmp_path / "checkpoint-1").glob("rollouts-*"):
        file.unlink()
    assert not list((tmp_path / "checkpoint-2").glob("rollouts-*"))  # nothing to come on these
    with pytest.raises(ValueError, match=r"checkpoint-1 is damaged: rollouts-0-0.safetensors is missing"):
        trainer(tiny, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_fsdp1_is_refused_by_name(tiny, tmp_path):
    args = RefineConfig(output_dir=str(tmp_path), **QUIET)
    args.fsdp, args.fsdp_config = True, {"version": 1}
    with pytest.raises(ValueError, match=r"fsdp_config\['version'\] is 1; expected 2"):
        RefineRLTrainer(tiny.model(tiny.processor()), args)
