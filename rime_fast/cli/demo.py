"""``rime-fast demo``: the whole recipe on digit scans, from random weights to a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rime_fast.cli.command import Command
from rime_fast.cli.options import Group
from rime_fast.cli.values import build


@dataclass
class DemoOptions:
    """Options of ``demo``."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Folder of report.html, report.json, both models."})
    seed: int = field(default=0, metadata={"help": "Of the weights, the data and the sampling."})
    fast: bool = field(default=False, metadata={"help": "A smoke run: a dozen steps, nothing is learned."})


def run(values: dict[str, Any]) -> int:
    """Run the demo."""
    options = build(DemoOptions, values)
    from rime_fast.demo.run import run_demo

    run_demo(options.output_dir, options.seed, options.fast)
    return 0


COMMAND = Command(
    name="demo",
    text="Trains a tiny Qwen2-VL from random weights on chains of arithmetic over digit scans (joint training, then "
    "Refine-RL), measures mutual retrieval on unseen scans after each, and writes a report. Minutes on two CPU cores; "
    "nothing is downloaded.",
    examples=(
        ("the whole demo", "rime-fast demo"),
        ("another seed", "rime-fast demo --seed 1 --output_dir runs/demo-1"),
    ),
    run=run,
    groups=(Group("Options", "rime_fast.cli.demo", "DemoOptions"),),
)
