"""``rime-fast bench``: the suite of a source checkout through pytest; comparison and figures of its JSON."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rime_fast.cli.command import Command
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@dataclass
class BenchOptions:
    """Options of ``bench``."""

    only: str | None = field(default=None, metadata={"help": "Run the cases whose name matches (pytest's -k)."})
    output: str | None = field(
        default=None,
        metadata={"help": "JSON file of the rows (runs/bench.json); with --plot the folder of the figures."},
    )
    gpu: bool = field(default=False, metadata={"help": "All GPU tests and benchmarks (benchmarks/run_gpu.py)."})
    tiny: bool = field(default=False, metadata={"help": "Every case once at tiny sizes: does it run?"})
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Two JSON files, before and after: print what got worse; exit code 1 if ours did."},
    )
    threshold: float = field(default=0.1, metadata={"help": "With --compare: the change that counts (0.1: 10%%)."})
    plot: str | None = field(default=None, metadata={"help": "A JSON file: draw its figures (beside it)."})


def run(values: dict[str, Any]) -> int:
    """Compare, plot, or run pytest on benchmarks/ and pass its exit code on."""
    options = build(BenchOptions, values)
    if options.compare and options.plot:
        raise UsageError("--compare and --plot are two commands; give one")
    if options.compare:
        return compare(options)
    if options.plot:
        return plot(options)
    if not BENCHMARKS.is_dir():
        raise UsageError(
            f"no benchmarks at {BENCHMARKS}; the suite comes with a source checkout. Without one: "
            "rime-fast bench logprob, contrastive or reward"
        )
    if options.gpu:
        folder = ["--output", options.output] if options.output else []
        return subprocess.call([sys.executable, str(BENCHMARKS / "run_gpu.py"), *folder])
    if find_spec("pytest") is None:
        raise UsageError("pytest is not installed; pip install 'rime-fast[bench]'")
    output = Path(options.output or "runs/bench.json").resolve()
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--rime-json", str(output)]
    command += ["-k", options.only] if options.only else []
    return subprocess.call(command + ["--rime-tiny"] * options.tiny, cwd=BENCHMARKS.parent)


def compare(options: BenchOptions) -> int:
    """1 when a row of ours got worse by more than the threshold."""
    if len(options.compare) != 2:
        raise UsageError(f"--compare takes two JSON files, got {len(options.compare)}")
    if options.threshold <= 0:
        raise UsageError(f"--threshold is {options.threshold}; expected a number > 0")
    from rime_fast.bench.comparison import compare_files, print_comparison

    found = compare_files(Path(options.compare[0]), Path(options.compare[1]), options.threshold)
    print_comparison(found)
    return int(any(change.ours for change in found.worse))


def plot(options: BenchOptions) -> int:
    """Write the figures and name them."""
    assert options.plot
    from rime_fast.bench.plots import plot_file

    source = Path(options.plot)
    written = plot_file(source, Path(options.output) if options.output else source.parent)
    for path in written:
        print(path)
    if not written:
        raise UsageError(f"{source}: no rows that a figure is made of")
    return 0


COMMAND = Command(
    name="bench",
    text="Times the operators and steps against their peers, interleaved, with the bare matrix products of the same "
    "shapes as the floor. Writes one JSON row an implementation and case; compares two such files; draws figures. One "
    "operator at a shape of yours: rime-fast bench logprob --help (contrastive, reward).",
    examples=(
        ("all CPU cases", "rime-fast bench"),
        ("the contrastive loss alone", "rime-fast bench --only contrastive --output runs/contrastive.json"),
        (
            "what got worse since the committed run",
            "rime-fast bench --compare benchmarks/results/cpu/bench.json runs/bench.json",
        ),
        ("roofline, ratios, memory, growth, step times", "rime-fast bench --plot runs/bench.json --output runs/plots"),
    ),
    run=run,
    groups=(Group("Options", "rime_fast.cli.bench", "BenchOptions"),),
)
