"""The runs that the soak kills: tiny, of a few steps, with a checkpoint after each; all made here."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rime_fast.cli.embed_anchors import embed_anchors
from rime_fast.cli.loading import EmbedderOptions
from rime_fast.engine.anchor_bank import AnchorBank
from rime_fast.model.tokens import add_embedding_tokens
from rime_fast.trainers.config import RefineConfig, RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from rime_fast.trainers.refine import RefineRLTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
from cached_ranks_worker import shard_on_the_cpu
from conftest import TEMPLATE, WORDS, make_model, make_pairs, make_processor

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 1,
    "progress": "none",
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "use_cpu": True,
}


@dataclass(frozen=True)
class Kind:
    """One sort of run. partial: what lies in its folder while it writes what must not be half-written."""

    work: Callable[[Path, Path], None]
    result: str  # the file that must be the same bytes
    ranks: int = 1
    partial: str = "out/.partial"
    always_saving: bool = False


def prepare(folder: Path, kinds: list[str]) -> None:
    """What runs start from: models, data, DeepSpeed's extension. In a process of its own, so that the parent's torch
    stays idle."""
    torch.set_num_threads(1)
    if any(kind.startswith("zero") for kind in kinds):
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.comm.torch import build_shm_op

        build_shm_op()
    for name, hidden in (("start", 32), ("large", 192)):
        processor = make_processor()
        model = make_model(processor, hidden=hidden)
        add_embedding_tokens(model, processor.tokenizer)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    rows = [{"query": {"text": f"{WORDS[i % 8]} {i}"}, "target": {"text": WORDS[-1 - i % 8]}} for i in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def joint(start: Path, folder: Path, *, model: str = "start", plan: dict[str, Any] | None = None) -> None:
    own = {"learnable_temperature": True, "ddp_backend": "gloo" if dist.is_initialized() else None}
    args = RimeConfig(output_dir=str(folder / "out"), **(SHARED | own | (plan or {})))
    if args.fsdp:
        shard_on_the_cpu()
    run = RimeTrainer(str(start / model), args, make_pairs(12, negatives=1), template=TEMPLATE)
    run.train(resume_from_checkpoint="last")
    run.save_model(str(folder / "final"))


def refine(start: Path, folder: Path) -> None:
    own = {"num_generations": 2, "max_completion_length": 4, "num_iterations": 2}
    args = RefineConfig(output_dir=str(folder / "out"), **(SHARED | own))
    run = RefineRLTrainer(str(start / "start"), args, make_pairs(12), template=TEMPLATE)
    run.train(resume_from_checkpoint="last")
    run.save_model(str(folder / "final"))


def bank(start: Path, folder: Path) -> None:
    """Both sides' anchors, in batches of 8 (the command's own 4,096 would be one)."""
    make = AnchorBank.make
    AnchorBank.make = lambda *args, **options: make(*args, **(options | {"batch_size": 8}))  # type: ignore
    embed_anchors(str(start / "start"), str(start / "pairs.jsonl"), str(folder / "final"), "both", EmbedderOptions())


def zero(stage: int) -> Callable[[Path, Path], None]:
    def work(start: Path, folder: Path) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        joint(start, folder, plan={"deepspeed": str(EXAMPLES / f"zero{stage}.json")})

    return work


MODEL = "final/model.safetensors"
KINDS = {
    "joint": Kind(joint, MODEL),
    "refine": Kind(refine, MODEL),
    "saving": Kind(partial(joint, model="large"), MODEL, always_saving=True),
    "bank": Kind(bank, "final/anchors-target.safetensors", partial="final/.*.partial"),
    "ddp": Kind(joint, MODEL, ranks=2),
    "fsdp2": Kind(partial(joint, plan={"fsdp": True}), MODEL, ranks=2),
    "fsdp2-async": Kind(partial(joint, plan={"fsdp": True, "async_save": True}), MODEL, ranks=2),
    "zero2": Kind(zero(2), MODEL, ranks=2),
    "zero3": Kind(zero(3), MODEL, ranks=2),
}


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
