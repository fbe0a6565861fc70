"""``rime-fast bench``: the suite of a source checkout through pytest."""

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
    output: str | None = field(default=None, metadata={"help": "JSON file of the rows (default: runs/bench.json)."})
    gpu: bool = field(default=False, metadata={"help": "All GPU tests and benchmarks (benchmarks/run_gpu.py)."})
    tiny: bool = field(default=False, metadata={"help": "Every case once at tiny sizes: does it run?"})


def run(values: dict[str, Any]) -> int:
    """Run pytest on benchmarks/ and pass its exit code on."""
    options = build(BenchOptions, values)
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


COMMAND = Command(
    name="bench",
    text="Times the operators and steps against their peers, interleaved, with the bare matrix products of the same "
    "shapes as the floor. Writes one JSON row an implementation and case; python -m benchmarks.compare sets two such "
    "files beside each other, python -m benchmarks.plot draws one. One operator at a shape of yours: rime-fast bench "
    "logprob --help (contrastive, reward).",
    examples=(
        ("all CPU cases", "rime-fast bench"),
        ("the contrastive loss alone", "rime-fast bench --only contrastive --output runs/contrastive.json"),
        ("does every case run here?", "rime-fast bench --tiny"),
    ),
    run=run,
    groups=(Group("Options", "rime_fast.cli.bench", "BenchOptions"),),
)
