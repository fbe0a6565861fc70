"""``rime-fast demo``: the whole recipe on a small real task, from random weights to a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rime_fast.cli.command import Command
from rime_fast.cli.options import Group
from rime_fast.cli.values import build


@dataclass
class DemoOptions:
    """Options of ``demo``."""

    task: Literal["digits", "emoji"] = field(
        default="digits",
        metadata={"help": "digits: chains of arithmetic over scans. emoji: one figure by two artists, by its name."},
    )
    output_dir: str = field(default="runs/demo", metadata={"help": "Folder of report.html, report.json, both models."})
    emoji_dir: str = field(
        default="runs/emoji-packages",
        metadata={"help": "Of --task emoji: its two npm packages (.tgz); those missing are fetched, 136 MB."},
    )
    seed: int = field(default=0, metadata={"help": "Of the weights, the data and the sampling."})
    fast: bool = field(default=False, metadata={"help": "A smoke run: a dozen steps, nothing is learned."})


def run(values: dict[str, Any]) -> int:
    """Run the demo."""
    options = build(DemoOptions, values)
    from rime_fast.demo.run import run_demo
    from rime_fast.demo.task import DIGITS

    task = DIGITS
    if options.task == "emoji":
        from rime_fast.data.emoji import fetch
        from rime_fast.demo.emoji import emoji_task

        task = emoji_task(fetch(options.emoji_dir))
    run_demo(options.output_dir, options.seed, options.fast, task=task)
    return 0


COMMAND = Command(
    name="demo",
    text="Trains a tiny Qwen2-VL from random weights on chains of arithmetic over digit scans (joint training, then "
    "Refine-RL), measures mutual retrieval on unseen scans after each, and writes a report. Minutes on two CPU cores; "
    "nothing is downloaded. --task emoji does the same on pictures with names that people gave them, from two "
    "packages of the npm registry.",
    examples=(
        ("the whole demo", "rime-fast demo"),
        ("another seed", "rime-fast demo --seed 1 --output_dir runs/demo-1"),
        ("real pictures, real words", "rime-fast demo --task emoji --output_dir runs/demo-emoji"),
    ),
    run=run,
    groups=(Group("Options", "rime_fast.cli.demo", "DemoOptions"),),
)
