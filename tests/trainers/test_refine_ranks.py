"""Refine-RL on two gloo ranks: the weights of one process, step for step, however parameters and steps are split."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_model, make_processor
from refine_ranks_worker import PLANS, plain, refine, run_plans

from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
TERMS = (
    "loss",
    "reward/total",
    "reward/rank",
    "group_std",
    "rewrite_tokens",
    "ratio",
    "clip_fraction",
    "format_failed",
)


def check(folder: Path, *names: str) -> None:
    processor = make_processor()
    model = make_model(processor)
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    start = load_file(folder / "start" / "model.safetensors")
    run_ranks(run_plans, 2, str(folder), *names)
    wanted: dict[str, tuple] = {}
    for name, (logs, got, drawn) in torch.load(folder / "found.pt").items():
        settings = plain(PLANS[name])
        key = "one" + "-".join(map(str, settings.values()))
        if key not in wanted:
            wanted[key] = refine(folder / key, 4, settings)
        want_logs, want = wanted[key]
        for a, b in zip(logs, want_logs, strict=True):
            for term in TERMS:
                assert a[term] == pytest.approx(b[term], rel=2e-4, abs=1e-6), (name, term)
        moved = 0
        for parameter, value in want.items():
            update = value - start[parameter] if start[parameter].shape == value.shape else value
            error = (got[parameter] - value).norm() / update.norm().clamp(min=1e-6)
            moved += bool(update.norm() > 1e-4)
            assert error < 2e-3, (name, parameter, float(error))
        assert moved > 20, name
        steps = [entry for entry in drawn if "loss" in entry]
        assert [entry["ratio"] for entry in steps] == [1.0, 1.0], name
        assert all(0 < entry["rewrite_tokens"] <= 6 for entry in steps), name
        assert "eval_reward/total" in drawn[-1], name


def test_ddp_and_fsdp2(tmp_path):
    check(tmp_path, "ddp", "fsdp")


@pytest.mark.slow
def test_other_rewards_and_banks(tmp_path):
    check(tmp_path, "ddp-ume_r1", "ddp-sharded-bank", "fsdp-whole")


@pytest.mark.slow
@pytest.mark.parametrize("names", [("zero1", "zero2"), ("zero3", "zero3-ume_r1")], ids=str)
def test_zero(tmp_path, names):
    check(tmp_path, *names)
