"""Two gloo ranks against one process: DDP and the ZeRO examples give the same weights, step for step."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from conftest import TEMPLATE, make_model, make_pairs, make_processor

from rime_fast.trainers.config import RefineConfig, RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from rime_fast.trainers.refine import RefineRLTrainer
from tests.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
# ZeRO-3 first: it loads a model by its path before DeepSpeed has made anything of its own.
PLANS = {"zero3": "zero3.json", "ddp": None, "zero1": "zero1.json", "zero2": "zero2.json"}
# Adam's sign-like step would blow up rounding differences where gradients are tiny: a large epsilon keeps it smooth.
SAME = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-2,
    "warmup_steps": 0,
    "temperature": 0.1,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "logging_steps": 1,
    "progress": "none",
    "learnable_temperature": True,
    "temperature_learning_rate": 0.05,
}


def joint(folder: Path, batch: int, plan: str | None = None) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Logs of a short run from the checkpoint beside ``folder``, and the weights it saved."""
    args = RimeConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        deepspeed=plan,
        use_cpu=True,
        ddp_backend="gloo" if dist.is_initialized() else None,
        **SAME,
    )
    run = RimeTrainer(str(folder.parent / "start"), args, make_pairs(12, negatives=1), template=TEMPLATE)
    run.train()
    run.save_model(str(folder))
    return run.state.log_history[:-1], weights(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") if dist_rank() == 0 else {}


def dist_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def refine(folder: Path, plan: str | None) -> list[dict[str, float]]:
    """Logs of two steps of Refine-RL; the ranks decode for different numbers of steps."""
    cap = 2 + 2 * dist.get_rank()
    args = RefineConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_generations=2,
        max_steps=2,
        max_completion_length=cap,
        learning_rate=5e-3,
        warmup_steps=0,
        logging_steps=1,
        deepspeed=plan,
        save_strategy="no",
        progress="none",
        use_cpu=True,
        ddp_backend="gloo",
        beta=0.0 if plan and "zero3" in plan else 0.04,
        anchor_pool="batch",
    )
    run = RefineRLTrainer(str(folder.parent / "start"), args, make_pairs(8), template=TEMPLATE)
    run.train()
    return run.state.log_history[:-1]


def fresh_state() -> None:
    """What accelerate and transformers remember of the run before."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(False)
    GradientState._reset_state()


def rank_main(rank: int, world: int, folder: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    found = {}
    for name, plan in PLANS.items():
        path = None if plan is None else str(EXAMPLES / plan)
        fresh_state()
        logs, saved = joint(Path(folder) / name, 2, path)
        fresh_state()
        found[name] = logs, saved, refine(Path(folder) / f"{name}-rl", path)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


@pytest.mark.dist
def test_ranks_and_zero_stages_equal_one_process(tmp_path):
    processor = make_processor()
    model = make_model(processor)
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    start = load_file(tmp_path / "start" / "model.safetensors")
    run_ranks(rank_main, 2, str(tmp_path))
    logs, want = joint(tmp_path / "one", 4)
    for plan, (got_logs, got, rl) in torch.load(tmp_path / "found.pt").items():
        for a, b in zip(got_logs, logs, strict=True):
            for term in (
                "loss",
                "ce/query",
                "ce/target",
                "contrast/gen-gen",
                "contrast/disc-gen",
                "hit@1/gen-gen",
                "temperature",
            ):
                assert a[term] == pytest.approx(b[term], rel=2e-4), (plan, term)
        moved = 0
        for name, value in want.items():
            update = value - start[name] if name in start and start[name].shape == value.shape else value
            error = (got[name] - value).norm() / update.norm().clamp(min=1e-6)
            moved += bool(update.norm() > 1e-4)
            assert error < 2e-3, (plan, name, float(error))
        assert moved > 20, plan
        assert [entry["ratio"] for entry in rl] == [1.0, 1.0], plan
        assert all(0 < entry["rewrite_tokens"] <= 4 for entry in rl), plan


def evaluated(folder: Path, batch: int, rows: list[int]) -> float:
    """The loss of an evaluation on these pairs, whose rewrites differ in length."""
    args = RimeConfig(output_dir=str(folder), per_device_eval_batch_size=batch, use_cpu=True, progress="none")
    pairs, processor = make_pairs(6), make_processor()
    for i, pair in enumerate(pairs):
        pair.query.rewrite = " ".join(["red"] * (1 + 3 * i))
    chosen = [pairs[i] for i in rows]
    run = RimeTrainer(make_model(processor), args, pairs, chosen, processing_class=processor, template=TEMPLATE)
    return run.evaluate()["eval_loss"]


def evaluate_main(rank: int, world: int, folder: str) -> None:
    found = evaluated(Path(folder), 2, list(range(6)))
    Path(folder, f"loss{rank}").write_text(repr(found))


@pytest.mark.dist
def test_an_evaluation_whose_last_batch_is_filled_up_has_the_loss_of_all_ranks(tmp_path):
    """The last two of six pairs are one rank's, and the first two stand in on the other: a rank's loss alone, its part
    of the ranks' common mean, is no loss."""
    run_ranks(evaluate_main, 2, str(tmp_path))
    full, last = (evaluated(tmp_path, 4, rows) for rows in ([0, 1, 2, 3], [4, 5, 0, 1]))
    for rank in range(2):
        assert float(Path(tmp_path, f"loss{rank}").read_text()) == pytest.approx((4 * full + 2 * last) / 6, rel=1e-4)
