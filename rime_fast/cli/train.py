"""``rime-fast train``: joint training."""

from __future__ import annotations

from typing import Any

from rime_fast.cli.command import Command, required
from rime_fast.cli.options import Group
from rime_fast.cli.training import MORE, groups


def run(values: dict[str, Any]) -> int:
    """Joint training from raw option values."""
    required(values, "model", "train_data")
    from rime_fast.cli.training import run_training
    from rime_fast.trainers.config import RimeConfig
    from rime_fast.trainers.joint import RimeTrainer

    return run_training(values, RimeTrainer, RimeConfig, "Joint training")


COMMAND = Command(
    name="train",
    text="Joint training: next-token loss on both sides' rewrites, contrast in both modes, and Cross-Mode Alignment "
    "between them. The batch of a step, over all devices, is the set of in-batch negatives: make it large. Ctrl-C "
    "saves a checkpoint and says how to go on.",
    examples=(
        (
            "the recipe's defaults on one machine",
            "rime-fast train --model Qwen/Qwen2-VL-2B-Instruct --train_data pairs.jsonl --output_dir runs/sft --bf16",
        ),
        ("settings in a file, one of them changed", "rime-fast train --config sft.yaml --learning_rate 1e-4"),
        ("go on after an interruption", "rime-fast train --config sft.yaml --resume_from_checkpoint last"),
        ("8 GPUs", "torchrun --nproc_per_node 8 -m rime_fast.cli train --config sft.yaml"),
        ("an adapter", "rime-fast train --config sft.yaml --lora_rank 16"),
        ("a third embedding, without decoding", "rime-fast train --config sft.yaml --latent_tokens 8"),
        (
            "a larger model as teacher",
            "rime-fast train --config sft.yaml --teacher_bank runs/teacher --distill_weight 1",
        ),
        (
            "a head on the states of a frozen model (Think-Then-Embed)",
            "rime-fast train --config examples/think_then_embed.yaml --lora_rank 0 --freeze_backbone --head self:8",
        ),
        ("embeddings that can be cut", "rime-fast train --config sft.yaml --matryoshka_dims 64 128 256 512 1024"),
        ("embeddings that can be kept as int8", "rime-fast train --config sft.yaml --int8_weight 1"),
    ),
    run=run,
    groups=groups(
        "RimeConfig",
        "The recipe (joint training)",
        Group("Its contrast", "rime_fast.recipe.settings", "ContrastSettings"),
        Group("Its objective, and Think-Then-Embed's head", "rime_fast.recipe.settings", "ObjectiveSettings"),
        Group("A teacher", "rime_fast.recipe.settings", "DistillSettings"),
        Group("Latent rewrites", "rime_fast.recipe.settings", "LatentSettings"),
    ),
    more=MORE,
)
