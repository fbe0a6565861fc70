"""What Think-Then-Embed gives on the demo's task: an embedder of a reasoner's traces, and four heads on the reasoner.

    python -m rime_fast.demo.think --output_dir runs/think [--fast] [--seeds 0 1 2]

Cells (run and kept as ``ablation.py``'s are), traces being the running values and the answer:

    reasoner     cross-entropy alone on the traces; nothing has trained its embedding
    embedder     contrast alone, from random weights, with the right traces: TTE_s with the reasoner's, TTE_t with those
    self, qformer, attention, latents   a head on the frozen reasoner, contrast alone (TTE_u)
    whole        beside them, the full recipe on whole rewrites

Writes ``report.json`` and prints its table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rime_fast.demo.ablation import HEADS, SEEDS, THINK, WORKERS, Cells, environment, run_cells
from rime_fast.demo.ablation_report import summary
from rime_fast.demo.phases import FAST, FULL, TEST_SEED

CELLS = (*THINK, "whole")


def run_think(out: str | Path = "runs/think", *, seeds: Sequence[int] = SEEDS, fast: bool) -> dict[str, Any]:
    """Run the cells that are missing, write ``report.json`` into ``out`` and return it."""
    out, sizes = Path(out), FAST if fast else FULL
    cells = run_cells(out, CELLS, seeds=seeds, fast=fast)
    report = {
        "cells": summarise(cells, seeds),
        "settings": sizes.as_dict() | {"test_seed": TEST_SEED, "seeds": list(seeds)},
        "environment": environment("python -m rime_fast.demo.think", WORKERS),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def summarise(cells: Cells, seeds: Sequence[int]) -> dict[str, Any]:
    """Sum up over the seeds, as mean, spread and values: hit@1, decoded tokens of a query, seconds of training."""
    found = {}
    for name in CELLS:
        runs = [cells[name, seed] for seed in seeds]
        found[name] = {
            "head": HEADS.get(name),
            "hit@1": {key: summary([run["hit@1"][key] for run in runs]) for key in runs[0]["hit@1"]},
            "query_tokens": summary([run["query_tokens"] for run in runs]),
            "train_seconds": summary([run["seconds"]["train"] for run in runs]),
        }
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| | gen-gen | with the right traces | tokens a query | training, s |", "|---|---|---|---|---|"]
    for name, cell in report["cells"].items():
        hits = [cell["hit@1"].get(key) for key in ("gen-gen", "given")]
        shown = [f"{hit['mean']:.3f} ± {hit['std']:.3f}" if hit else "" for hit in hits]
        numbers = [f"{cell[key]['mean']:.{places}f}" for key, places in (("query_tokens", 1), ("train_seconds", 0))]
        lines.append(f"| {cell['head'] or name} | " + " | ".join((*shown, *numbers)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="rime_fast.demo.think", description="Think-Then-Embed on the demo's task.")
    parser.add_argument("--output_dir", default="runs/think")
    parser.add_argument("--fast", action="store_true", help="a smoke run: a dozen steps a cell, nothing is learned")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args(argv)
    print(table(run_think(options.output_dir, seeds=options.seeds, fast=options.fast)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
