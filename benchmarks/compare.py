"""``python -m benchmarks.compare``: what got worse between two result files."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_fast.cli import guarded
from rime_fast.cli.command import Command
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build


@dataclass
class CompareOptions:
    """Options of ``python -m benchmarks.compare``."""

    files: list[str] = field(default_factory=list, metadata={"help": "Two JSON files of results, before and after."})
    threshold: float = field(default=0.1, metadata={"help": "The relative change that counts (0.1: 10%%)."})


def run(values: dict[str, Any]) -> int:
    """1 when a row of ours got worse by more than the threshold."""
    options = build(CompareOptions, values)
    if len(options.files) != 2:
        raise UsageError(f"expected two JSON files, got {len(options.files)}")
    if options.threshold <= 0:
        raise UsageError(f"--threshold is {options.threshold}; expected a number > 0")
    from benchmarks.lib.comparison import compare_files, print_comparison

    found = compare_files(Path(options.files[0]), Path(options.files[1]), options.threshold)
    print_comparison(found)
    return int(any(change.ours for change in found.worse))


COMMAND = Command(
    name="benchmarks.compare",
    text="Pairs the rows of two result files by bench, case and implementation and prints what got worse and better; "
    "exit code 1 when a row of ours got worse. Ratios of one run are compared where both files have them, so that they "
    "hold on one kind of processor whatever its clock and load.",
    examples=(
        (
            "what got worse since the committed run",
            "python -m benchmarks.compare benchmarks/results/cpu/bench.json runs/bench.json",
        ),
    ),
    run=run,
    groups=(Group("Options", "benchmarks.compare", "CompareOptions"),),
    positional="files",
    program="python -m",
)


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    return guarded("benchmarks.compare", lambda: COMMAND.main(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
