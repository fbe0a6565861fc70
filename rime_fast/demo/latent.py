"""What latent rewrites give on the demo's task: disc, latent and gen side by side, for K in {1, 4, 8, 16}.

    python -m rime_fast.demo.latent --output_dir runs/latent [--fast] [--seeds 0 1 2]

Each K is joint training on whole rewrites with K latent tokens (cells ``latent_<K>`` of ``ablation.py``, which are run
and kept as its cells are). Writes ``report.json`` and prints its table: hit@1 of each mode against itself and of latent
queries against disc targets, and seconds of a query.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rime_fast.demo.ablation import LATENT, SEEDS, WORKERS, Cells, environment, run_cells
from rime_fast.demo.ablation_report import summary
from rime_fast.demo.phases import FAST, FULL, TEST_SEED
from rime_fast.model.token_names import MODES

SHOWN = ("disc-disc", "latent-latent", "gen-gen", "latent-disc", "latent-gen")


def run_latent(
    out: str | Path = "runs/latent", *, seeds: Sequence[int] = SEEDS, names: Sequence[str] = tuple(LATENT), fast: bool
) -> dict[str, Any]:
    """Run the cells that are missing, write ``report.json`` into ``out`` and return it."""
    out, sizes = Path(out), FAST if fast else FULL
    cells = run_cells(out, names, seeds=seeds, fast=fast)
    report = {
        "cells": summarise(cells, seeds, names),
        "settings": sizes.as_dict() | {"test_seed": TEST_SEED, "seeds": list(seeds)},
        "environment": environment("python -m rime_fast.demo.latent", WORKERS),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def summarise(cells: Cells, seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Sum up over the seeds, for each K: hit@1 by cell, and seconds of a query by mode, as mean, spread and values."""
    found = {}
    for name in names:
        runs = [cells[name, seed] for seed in seeds]
        hits = {cell: summary([run["hit@1"][cell] for run in runs]) for cell in runs[0]["hit@1"]}
        seconds = {mode: summary([run["cost"][mode]["query_seconds"] for run in runs]) for mode in MODES}
        found[name] = {"latent_tokens": LATENT[name], "hit@1": hits, "query_seconds": seconds}
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| K | " + " | ".join((*SHOWN, *(f"ms a query, {mode}" for mode in MODES))) + " |"]
    lines.append("|---" * (1 + len(SHOWN) + len(MODES)) + "|")
    for cell in report["cells"].values():
        hits = [f"{cell['hit@1'][name]['mean']:.3f} ± {cell['hit@1'][name]['std']:.3f}" for name in SHOWN]
        costs = [f"{1000 * cell['query_seconds'][mode]['mean']:.2f}" for mode in MODES]
        lines.append(f"| {cell['latent_tokens']} | " + " | ".join((*hits, *costs)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="rime_fast.demo.latent", description="Latent rewrites on the demo's task.")
    parser.add_argument("--output_dir", default="runs/latent")
    parser.add_argument("--fast", action="store_true", help="a smoke run: a dozen steps a cell, nothing is learned")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LATENT.values()), choices=list(LATENT.values()))
    options = parser.parse_args(argv)
    names = [f"latent_{k}" for k in options.tokens]
    print(table(run_latent(options.output_dir, seeds=options.seeds, names=names, fast=options.fast)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
