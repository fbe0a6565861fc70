"""Short runs of RefineRLTrainer on several ranks, each wrapped differently; run by test_refine_ranks.py."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from conftest import TEMPLATE, make_pairs

from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.trainers.config import RefineConfig
from rime_fast.trainers.refine import RefineRLTrainer

EXAMPLES = Path(__file__).parents[2] / "examples"
G = 3
# Adam's sign-like step would blow up rounding differences where gradients are tiny: a large epsilon keeps it smooth.
SAME: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-2,
    "warmup_steps": 0,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "progress": "none",
    "num_generations": G,
    "max_completion_length": 9,
    "use_cpu": True,
    "seed": 3,
    "beta": 0.0,
}
FSDP: dict[str, Any] = {"fsdp": True}


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed": str(EXAMPLES / f"zero{stage}.json")}


# With this budget the ranks have different numbers of micro-batches.
CUT: dict[str, Any] = {"micro_batch_tokens": 120}
PLANS: dict[str, dict[str, Any]] = {
    "ddp": CUT | {"loss_type": "token_mean"},
    "ddp-ume_r1": CUT | {"reward_mode": "ume_r1"},
    "ddp-sharded-bank": CUT | {"bank_storage": "sharded"},
    "fsdp": FSDP | CUT,
    "fsdp-whole": FSDP
    | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "loss_type": "token_mean"},
    "zero1": zero(1) | CUT,
    "zero2": zero(2) | CUT | {"loss_type": "token_mean"},
    "zero3": zero(3) | CUT,
    "zero3-ume_r1": zero(3) | CUT | {"reward_mode": "ume_r1"},
}
# The plain run in one process that a plan must equal: everything but how it is split.
SPLIT = {
    "micro_batch_tokens",
    "fsdp",
    "deepspeed",
    "bank_storage",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
}


def plain(plan: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plan.items() if name not in SPLIT}


class Dictated:
    """A backend whose responses depend on the side alone: the same on any rank, some long, some short."""

    def __init__(self, tokenizer: Any) -> None:
        self.words = tokenizer("red blue green black white", add_special_tokens=False)["input_ids"]
        self.open, self.close = tokenizer("<rewrite> </rewrite>", add_special_tokens=False)["input_ids"][:2]

    def refresh(self, policy: Any) -> None:
        pass

    def generate(self, policy: Any, sides: Any, prompts: Any, sampling: Any, out: Any = None) -> RolloutBuffer:
        rows = []
        for side in sides:
            for g in range(G):
                seed = hashlib.blake2b(f"{side.id} {g}".encode(), digest_size=8).digest()
                inner = [self.words[byte % len(self.words)] for byte in seed[: 1 + seed[0] % 6]]
                rows.append([self.open, *inner, self.close, sampling.gen_id])
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.tensor([row + [sampling.pad_id] * (max(lengths) - len(row)) for row in rows])
        return RolloutBuffer(tokens, lengths, torch.zeros(tokens.shape), torch.ones(len(rows), dtype=torch.bool))


def refine(folder: Path, batch: int, plan: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Logs of a short run from the checkpoint beside ``folder`` on dictated rollouts, and the weights it saved."""
    sizes = {"per_device_train_batch_size": batch, "ddp_backend": "gloo" if dist.is_initialized() else None}
    args = RefineConfig(output_dir=str(folder), **(SAME | sizes | plan))
    run = RefineRLTrainer(str(folder.parent / "start"), args, make_pairs(8), template=TEMPLATE)
    run.generator.backend = Dictated(run.processing_class.tokenizer)
    parts = count_parts(run)
    run.train()
    run.save_model(str(folder))
    if "micro_batch_tokens" in plan:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, parts)
        assert everyone[0] != everyone[1], everyone  # the ranks have different numbers of micro-batches
    from safetensors.torch import load_file

    first = not dist.is_initialized() or dist.get_rank() == 0
    return run.state.log_history[:-1], load_file(folder / "model.safetensors") if first else {}


def count_parts(run: RefineRLTrainer) -> list[int]:
    """Filled with this rank's micro-batches of each step, the idle ones left out."""
    counts: list[int] = []
    parts = run._cut

    def counted(*args: Any) -> Any:
        found = parts(*args)
        counts.append(sum(not idle for _, idle in found[0]))
        return found

    run._cut = counted  # type: ignore[method-assign]
    return counts


def sampled(folder: Path, plan: dict[str, Any]) -> list[dict[str, float]]:
    """Logs of two steps whose rollouts the policy draws; the ranks decode for different numbers of steps."""
    cap = {"max_completion_length": 2 + 4 * dist.get_rank(), "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    beta = {"beta": 0.0 if "zero3" in str(plan.get("deepspeed")) else 0.04, "refill_degenerate": 1}
    if plan.get("reward_mode") == "ume_r1" or "bank_storage" in plan:
        beta.pop("refill_degenerate")
    args = RefineConfig(output_dir=str(folder), **(SAME | plan | cap | beta))
    run = RefineRLTrainer(str(folder.parent / "start"), args, make_pairs(8), make_pairs(4, seed=5), template=TEMPLATE)
    run.train()
    run.evaluate()
    return run.state.log_history


def fresh_state() -> None:
    """What accelerate and transformers remember of the run before."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(False)
    GradientState._reset_state()


def run_plans(rank: int, world: int, folder: str, *names: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    found = {}
    for name in names:
        fresh_state()
        logs, saved = refine(Path(folder) / name, 2, PLANS[name])
        fresh_state()
        found[name] = logs, saved, sampled(Path(folder) / f"{name}-sampled", PLANS[name])
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
