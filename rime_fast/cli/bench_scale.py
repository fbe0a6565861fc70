"""``rime-fast bench scale``: what a step would cost on 8 to 512 H100s, by a written model."""

from __future__ import annotations

from typing import Any

from rime_fast.cli.command import Command
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build


def run(values: dict[str, Any]) -> int:
    """Print the tables; write JSON and curves."""
    from rime_fast.bench.scale.report import ScaleOptions, main

    options = build(ScaleOptions, values)
    try:
        return main(options)
    except ValueError as error:
        raise UsageError(str(error)) from error


COMMAND = Command(
    name="bench scale",
    text="FLOP, bytes, network bytes, seconds and memory of a joint-training and a Refine-RL step on 8 to 512 H100s. "
    "A MODEL, not a measurement: counts are checked against counted FLOP and bytes, seconds are counts over assumed "
    "rates (docs/scale.md).",
    examples=(
        ("Qwen2-VL-2B from one node to 64", "rime-fast bench scale"),
        ("chains of thought instead of rewrites", "rime-fast bench scale --rewrite_tokens 480"),
        ("JSON and curves", "rime-fast bench scale --model qwen2-vl-7b --output runs/scale"),
    ),
    run=run,
    groups=(Group("Options", "rime_fast.bench.scale.report", "ScaleOptions"),),
)
