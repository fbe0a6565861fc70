"""Short runs of RimeTrainer on several ranks, each wrapped differently; run by test_cached_ranks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from conftest import TEMPLATE, make_pairs

from rime_fast.cli.training import TrainingOptions, save_outputs
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer

EXAMPLES = Path(__file__).parents[2] / "examples"
PAIRS = 4  # in one contrast, all ranks together
# Adam's sign-like step would blow up rounding differences where gradients are tiny: a large epsilon keeps it smooth.
SAME: dict[str, Any] = {
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
    "int8_weight": 0.5,
    "use_cpu": True,
    "seed": 3,
}
# tokens of a rank's batch are 80 to 150: two to four micro-batches, not equally many on the ranks
CACHED: dict[str, Any] = {"contrastive_batch_size": PAIRS, "micro_batch_tokens": 40}
TWICE: dict[str, Any] = {"gradient_accumulation_steps": 2}
FSDP: dict[str, Any] = {"fsdp": True}  # a unit for each decoder layer and each block of the vision tower
COMPILED: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
LORA: dict[str, Any] = {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed": str(EXAMPLES / f"zero{stage}.json")}


# name -> settings. "once" runs are compared with one process's plain step, "twice" ones with two accumulated ones.
PLANS: dict[str, dict[str, Any]] = {
    "ddp-twice": CACHED | TWICE | {"gradient_checkpointing": True},
    "fsdp-plain-once": FSDP | {"per_device_train_batch_size": PAIRS // 2},
    "fsdp-twice": FSDP | CACHED | TWICE,
    "ddp-lora": CACHED | LORA,
    "fsdp-lora": FSDP | CACHED | LORA,
    "ddp-kept-once": CACHED | {"kept_graphs_gib": 1.0},
    "fsdp-kept-once": FSDP | CACHED | {"kept_graphs_gib": 1.0},
    "ddp-compiled-lora": CACHED | LORA | COMPILED,
    "fsdp-compiled-twice": FSDP | CACHED | TWICE | COMPILED,
    "zero2-compiled-twice": zero(2) | CACHED | TWICE | COMPILED,
    "zero1-twice": zero(1) | CACHED | TWICE,
    "zero2-twice": zero(2) | CACHED | TWICE,
    "zero3-twice": zero(3) | CACHED | TWICE,
    "zero2-lora": zero(2) | CACHED | LORA,
    "zero3-lora": zero(3) | CACHED | LORA,
}
ONE: dict[str, dict[str, Any]] = {"once": {}, "twice": TWICE, "lora": LORA}


def fresh_state() -> None:
    """Forget what accelerate and transformers remember of the run before."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(False)
    GradientState._reset_state()


def shard_on_the_cpu() -> None:
    """accelerate takes its FSDP branch for accelerators only, though FSDP2 runs over gloo: say that this is one."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState().distributed_type = DistributedType.MULTI_XPU


def trained(start: Path, folder: Path, **settings: Any) -> RimeTrainer:
    """A run from the checkpoint ``start``, its model saved in ``folder`` (as ``rime-fast train`` does with LoRA)."""
    lora = settings.pop("lora", None)
    if dist.is_initialized():
        settings["ddp_backend"] = "gloo"
    args = RimeConfig(output_dir=str(folder), **(SAME | settings))
    if args.fsdp:
        shard_on_the_cpu()
    more = {}
    if lora is not None:
        from peft import LoraConfig

        torch.manual_seed(0)
        more["peft_config"] = LoraConfig(init_lora_weights=False, **lora)
    run = RimeTrainer(str(start), args, make_pairs(24, negatives=1), template=TEMPLATE, **more)
    run.train()
    if lora is None:
        run.save_model(str(folder))
    else:
        options = TrainingOptions(model=str(start), train_data=[], output_dir=str(folder), lora_rank=1, report=False)
        save_outputs(run, options, args, "SFT")
    return run


def run_plans(rank: int, world: int, folder: str, *names: str) -> None:
    """Every named plan; rank 0 leaves the logs of each."""
    if any(name.startswith("zero") for name in names):
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name in names:
        fresh_state()
        run = trained(Path(folder) / "start", Path(folder) / name, **PLANS[name])
        assert run.is_fsdp_enabled == name.startswith("fsdp")
        assert run.is_deepspeed_enabled == name.startswith("zero")
        assert (run.micro_batch_tokens is None) == ("plain" in name)
        if rank == 0:
            torch.save(run.state.log_history[:-1], Path(folder) / f"{name}.logs")
