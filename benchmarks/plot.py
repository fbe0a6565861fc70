"""``python -m benchmarks.plot``: the figures of a result file."""

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
class PlotOptions:
    """Options of ``python -m benchmarks.plot``."""

    file: str = field(metadata={"help": "A JSON file of results."})
    output: str | None = field(default=None, metadata={"help": "Folder of the figures (default: beside the file)."})


def run(values: dict[str, Any]) -> int:
    """Write the figures and name them."""
    options = build(PlotOptions, values)
    from benchmarks.lib.plots import plot_file

    source = Path(options.file)
    written = plot_file(source, Path(options.output) if options.output else source.parent)
    for path in written:
        print(path)
    if not written:
        raise UsageError(f"{source}: no rows that a figure is made of")
    return 0


COMMAND = Command(
    name="benchmarks.plot",
    text="Draws the figures that a result file has rows for: roofline, ratios to the floor, memory, growth, and where "
    "the time of a step goes.",
    examples=(("all figures", "python -m benchmarks.plot runs/bench.json --output runs/plots"),),
    run=run,
    groups=(Group("Options", "benchmarks.plot", "PlotOptions"),),
    positional="file",
    program="python -m",
)


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    return guarded("benchmarks.plot", lambda: COMMAND.main(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
