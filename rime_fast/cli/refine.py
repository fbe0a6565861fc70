"""``rime-fast refine``: Refine-RL."""

from __future__ import annotations

from typing import Any

from rime_fast.cli.command import Command, required
from rime_fast.cli.training import MORE, groups


def run(values: dict[str, Any]) -> int:
    """Refine-RL from raw option values."""
    required(values, "model", "train_data")
    from rime_fast.cli.training import run_training
    from rime_fast.trainers.config import RefineConfig
    from rime_fast.trainers.refine import RefineRLTrainer

    return run_training(values, RefineRLTrainer, RefineConfig, "Refine-RL")


COMMAND = Command(
    name="refine",
    text="Refine-RL: samples rewrites of each pair's sides, scores each generative embedding against stable "
    "discriminative anchors (rank, margin, gain over the item's own disc embedding, form, length) and reinforces the "
    "better ones with a clipped policy loss and a KL to the reference. Start from a model made by `rime-fast train`.",
    examples=(
        (
            "from a joint-training checkpoint",
            "rime-fast refine --model runs/sft --train_data pairs.jsonl --output_dir runs/refine --bf16",
        ),
        ("shorter rewrites", "rime-fast refine --config refine.yaml --length_limit 32 --length_weight 0.5"),
        ("UME-R1's reward", "rime-fast refine --config refine.yaml --template cot --reward_mode ume_r1"),
    ),
    run=run,
    groups=groups("RefineConfig", "The recipe (Refine-RL)"),
    more=MORE,
)
