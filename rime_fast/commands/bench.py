"""``rime-fast bench``: the benchmark suite of a source checkout, through pytest."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rime_fast.commands.command import Command
from rime_fast.commands.options import Group, UsageError
from rime_fast.commands.values import build

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@dataclass
class BenchOptions:
    """Options of ``bench``."""

    only: str | None = field(default=None, metadata={"help": "Run the cases whose name matches (pytest's -k)."})
    output: str = field(default="runs/bench.json", metadata={"help": "JSON file of the rows."})
    gpu: bool = field(default=False, metadata={"help": "All GPU tests and benchmarks (benchmarks/run_gpu.py)."})


def run(values: dict[str, Any]) -> int:
    """Run pytest on benchmarks/ and pass its exit code on."""
    options = build(BenchOptions, values)
    if not BENCHMARKS.is_dir():
        raise UsageError(f"no benchmarks at {BENCHMARKS}; they come with a source checkout, not with the package")
    if options.gpu:
        return subprocess.call([sys.executable, str(BENCHMARKS / "run_gpu.py")])
    if find_spec("pytest_benchmark") is None:
        raise UsageError("pytest-benchmark is not installed; pip install 'rime-fast[bench]'")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--rime-json", str(Path(options.output).resolve())]
    return subprocess.call(command + (["-k", options.only] if options.only else []), cwd=BENCHMARKS.parent)


COMMAND = Command(
    name="bench",
    text="Times the operators and steps against their peers, interleaved, with the bare matrix products of the same "
    "shapes as the floor. Writes one JSON row a case.",
    examples=(
        ("all CPU cases", "rime-fast bench"),
        ("the contrastive loss alone", "rime-fast bench --only contrastive --output runs/contrastive.json"),
    ),
    run=run,
    groups=(Group("Options", "rime_fast.commands.bench", "BenchOptions"),),
)
