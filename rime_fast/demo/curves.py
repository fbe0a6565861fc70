"""`make curves`: what Refine-RL and its controls change on the way, over three seeds.

    python -m rime_fast.demo.curves --output_dir runs/ablation [--fast]

The cells are the ablation's (``ablation.py``): what has been run there is not run again. Writes
``curves.json`` and ``refine_curves.png``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rime_fast.demo.ablation import SEEDS, WORKERS, environment, run_cells
from rime_fast.demo.arms import ARMS, REWARDS
from rime_fast.demo.curves_report import plot_curves, summarise
from rime_fast.demo.phases import FAST, FULL, TEST_SEED


def run_curves(
    out: str | Path = "runs/ablation", *, seeds: Sequence[int] = SEEDS, fast: bool = False
) -> dict[str, Any]:
    """Run the cells that are missing; writes ``curves.json`` and ``refine_curves.png`` into ``out``, returns the
    report (``curves_report.summarise``)."""
    out, sizes = Path(out), FAST if fast else FULL
    cells = run_cells(out, ("noisy", *ARMS), seeds=seeds, fast=fast)
    report = summarise({arm: [cells[arm, seed] for seed in seeds] for arm in ARMS}) | {
        "settings": sizes.as_dict() | {"rewards": REWARDS, "test_seed": TEST_SEED},
        "environment": environment("python -m rime_fast.demo.curves", WORKERS),
    }
    (out / "curves.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot_curves(report, out / "refine_curves.png")
    return report


def main(argv: list[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="rime_fast.demo.curves", description="Refine-RL and its controls on the way.")
    parser.add_argument("--output_dir", default="runs/ablation")
    parser.add_argument("--fast", action="store_true", help="a smoke run: a few steps a cell, nothing is learned")
    parser.add_argument("--plot", metavar="JSON", help="only draw this curves.json's picture, into output_dir")
    options = parser.parse_args(argv)
    if options.plot:
        report = json.loads(Path(options.plot).read_text(encoding="utf-8"))
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        plot_curves(report, Path(options.output_dir) / "refine_curves.png")
        return 0
    report = run_curves(options.output_dir, fast=options.fast)
    for arm, curve in report["curves"].items():
        gain = curve["gain"]
        print(f"{arm}: gen-gen {gain['mean']:+.3f} ± {gain['std']:.3f} in {curve['seconds']['mean'][-1]:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
