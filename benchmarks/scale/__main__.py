"""``python -m benchmarks.scale``: what a step would cost on 8 to 512 H100s, by a written model."""

from __future__ import annotations

import sys
from typing import Any

from rime_fast.cli import guarded
from rime_fast.cli.command import Command
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build


def run(values: dict[str, Any]) -> int:
    """Print the tables; write JSON and curves."""
    from benchmarks.scale.report import ScaleOptions, report

    try:
        return report(build(ScaleOptions, values))
    except ValueError as error:
        raise UsageError(str(error)) from error


COMMAND = Command(
    name="benchmarks.scale",
    text="FLOP, bytes, network bytes, seconds and memory of a joint-training and a Refine-RL step on 8 to 512 H100s. "
    "A MODEL, not a measurement: counts are checked against counted FLOP and bytes, seconds are counts over assumed "
    "rates (docs/scale.md).",
    examples=(
        ("Qwen2-VL-2B from one node to 64", "python -m benchmarks.scale"),
        ("chains of thought instead of rewrites", "python -m benchmarks.scale --rewrite_tokens 480"),
        ("JSON and curves", "python -m benchmarks.scale --model qwen2-vl-7b --output runs/scale"),
    ),
    run=run,
    groups=(Group("Options", "benchmarks.scale.report", "ScaleOptions"),),
    program="python -m",
)


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    return guarded("benchmarks.scale", lambda: COMMAND.main(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
