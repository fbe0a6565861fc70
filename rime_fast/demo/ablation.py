"""`make ablation`: the demo's claims over three seeds, against the recipe without its parts and Refine-RL's controls.

    python -m rime_fast.demo.ablation --output_dir runs/ablation [--fast]

Cells, each for every seed, every one a process of its own with one thread, two at a time:

    noisy     joint training on the noisy teacher's rewrites: where the demo and every arm of ``arms.py`` begin
    whole     joint training on whole rewrites alone
    clean     joint training on rewrites that retrieve equally well; the next three differ from it in one thing each
    no_cma    without Cross-Mode Alignment
    cot       chains of thought (the equations spelled out) in place of rewrites
    control   a fixed free text of as many tokens in place of the rewrite
    refine, anchors_policy, ume_r1, random, format_only, length_only, more_sft, best_of_8: see ``arms.py``

A cell writes ``cells/<name>-<seed>.json``; one that is there with the same settings is not run again, so a stopped
ablation goes on where it was, and `make curves` finds its arms here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rime_fast.data.digits import Style
from rime_fast.demo.arms import ARMS, best_of, run_arm
from rime_fast.demo.phases import (
    FAST,
    FULL,
    TEST_SEED,
    Sizes,
    Teacher,
    joint_training,
    measure,
    measure_thought,
    query_tokens,
)
from rime_fast.demo.task import demo_model

SEEDS = (0, 1, 2)
JOINT = ("noisy", "cot", "whole", "clean", "no_cma", "control")
FROM_NOISY = (*ARMS, "best_of_8")
CELLS = (*JOINT, *FROM_NOISY)
LATENT = {f"latent_{k}": k for k in (1, 4, 8, 16)}  # of `python -m rime_fast.demo.latent`
HEADS = {"self": "self:2", "qformer": "qformer:8x4", "attention": "attention:4", "latents": "latent:32"}
THINK = ("reasoner", "embedder", *HEADS)  # of `python -m rime_fast.demo.think`
# Cell -> the one whose model it begins with (the embedder: whose traces it embeds).
STARTS = dict.fromkeys(FROM_NOISY, "noisy") | dict.fromkeys(THINK[1:], "reasoner")
ALL = (*CELLS, *LATENT, *THINK)
WORKERS = 2

Cells = dict[tuple[str, int], dict[str, Any]]


def run_ablation(
    out: str | Path = "runs/ablation", *, seeds: Sequence[int] = SEEDS, fast: bool = False
) -> dict[str, Any]:
    """Run what is missing and write ``report.json`` and ``ablation.png`` into ``out``; returns the report.

    The report has a key a cell (``noisy`` is ``sft`` there, as in ``run_demo``'s report), with every cell of mutual
    retrieval as {"mean", "std", "values"} (std: of a sample, over seeds; values in the order of ``seeds``), and
    ``claims``: the differences the demo is there to show, each with its threshold.
    """
    from rime_fast.demo.ablation_plot import plot_ablation
    from rime_fast.demo.ablation_report import summarise

    out, sizes = Path(out), FAST if fast else FULL
    cells = run_cells(out, CELLS, seeds=seeds, fast=fast)
    report = summarise(cells, seeds, sizes.n_test) | {
        "settings": sizes.as_dict() | {"test_seed": TEST_SEED},
        # Not the wall clock: a resumed run's would leave out what was there before.
        "cell_seconds": round(sum(sum(cell["seconds"].values()) for cell in cells.values()), 1),
        "environment": environment("python -m rime_fast.demo.ablation", WORKERS),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot_ablation(report, out / "ablation.png")
    return report


def run_cells(out: Path, names: Sequence[str], *, seeds: Sequence[int], fast: bool) -> Cells:
    """Run those of the named cells that are missing, in processes; returns them all.

    The arms' starting points come first. Raises RuntimeError naming the cells that failed.
    """
    (out / "cells").mkdir(parents=True, exist_ok=True)
    sizes = FAST if fast else FULL
    jobs = [(name, seed) for seed in seeds for name in names]
    starts = [job for job in jobs if job[0] in STARTS.values()]
    for wave in (starts, [job for job in jobs if job not in starts]):
        waiting = [job for job in wave if _done(out, *job, sizes) is None]
        print(f"{len(wave) - len(waiting)} of {len(wave)} cells are there; running {len(waiting)}", flush=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            codes = list(pool.map(lambda job: _spawn(out, job[0], job[1], fast), waiting))
        failed = [f"{name}-{seed}" for (name, seed), code in zip(waiting, codes, strict=True) if code]
        if failed:
            raise RuntimeError(f"cells failed: {', '.join(failed)}; see {out / 'cells'}/<cell>.log")
    return {job: cell for job in jobs if (cell := _done(out, *job, sizes)) is not None}


def run_cell(name: str, seed: int, out: Path, sizes: Sizes) -> dict[str, Any]:
    """Run one cell in this process. Returns and writes hit@1, tokens, seconds, the log and, of an arm, its curve."""
    if name not in ALL:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(ALL)}")
    styles: dict[str, Style] = {"cot": "cot", "control": "control"}
    style: Style = "trace" if name in THINK else styles.get(name, "rewrite")
    result: dict[str, Any] = {"cell": name, "seed": seed, "settings": sizes.as_dict(), "seconds": {}}
    work = out / "work" / f"{name}-{seed}"
    fresh = name not in STARTS or name == "embedder"
    model, processor = demo_model(seed) if fresh else _start(out, name, seed)
    if name in ARMS:
        arm = run_arm(name, model, processor, work, seed=seed, sizes=sizes)
        result |= {"points": arm["points"], "log": arm["log"]}
        result["seconds"]["train"] = arm["seconds"]
    elif name in (*JOINT, *LATENT, *THINK):
        begin = time.perf_counter()
        teacher: Teacher = "noisy" if name == "noisy" else "whole" if name == "whole" or name in LATENT else "clean"
        result["log"] = joint_training(
            model,
            processor,
            work,
            seed=seed,
            sizes=sizes,
            style=style,
            teacher=teacher,
            cross_modes=name != "no_cma",
            latent_tokens=LATENT.get(name, 0),
            objective="joint" if name not in THINK else "sft" if name == "reasoner" else "contrastive",
            head=HEADS.get(name),
            more=name in HEADS,
        )
        result["seconds"]["train"] = round(time.perf_counter() - begin, 2)
    begin = time.perf_counter()
    if name == "best_of_8":
        found = best_of(model, processor, sizes=sizes, seed=seed)
        result |= {"hit@1": {"gen-gen": found["hit@1"]}, "query_tokens": found["query_tokens"], "format_errors": 0}
        result["first_hit@1"] = found["first_hit@1"]
    elif name == "embedder":
        hits, tokens, errors = measure_thought(_start(out, name, seed)[0], model, processor, sizes=sizes)
        result |= {"hit@1": hits, "query_tokens": tokens, "format_errors": errors}
    else:
        table = measure(model, processor, sizes=sizes, style=style)
        result |= {"hit@1": table.hit_at_1(), "query_tokens": query_tokens(table), "cost": table.cost}
        result["format_errors"] = table.format_errors["query"]
    result["seconds"]["eval"] = round(time.perf_counter() - begin, 2)
    if name in STARTS.values():
        model.save_pretrained(_folder(out, name, seed))
    path = _path(out, name, seed)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _start(out: Path, name: str, seed: int) -> tuple[Any, Any]:
    """The model that the cell begins with, which another cell has left, and its processor."""
    from rime_fast.model.dual_mode import DualModeModel

    return DualModeModel.from_pretrained(_folder(out, STARTS[name], seed)), demo_model(seed)[1]


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / "starts" / f"{name}-{seed}"


def _path(out: Path, name: str, seed: int) -> Path:
    return out / "cells" / f"{name}-{seed}.json"


def _done(out: Path, name: str, seed: int, sizes: Sizes) -> dict[str, Any] | None:
    """A finished cell with these settings, else None."""
    path = _path(out, name, seed)
    if not path.exists():
        return None
    cell = json.loads(path.read_text(encoding="utf-8"))
    return cell if cell["settings"] == sizes.as_dict() else None


def _spawn(out: Path, name: str, seed: int, fast: bool) -> int:
    """Run one cell in a process with one thread; its output goes to ``cells/<cell>.log``. Returns the exit code."""
    command = [sys.executable, "-m", "rime_fast.demo.ablation", "--output_dir", str(out), "--cell", name]
    command += ["--seed", str(seed)] + (["--fast"] if fast else [])
    begin = time.perf_counter()
    with (out / "cells" / f"{name}-{seed}.log").open("w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    state = "done" if code == 0 else f"FAILED with exit code {code}"
    print(f"{name}-{seed}: {state} after {time.perf_counter() - begin:.0f} s", flush=True)
    return code


def environment(command: str, workers: int) -> dict[str, Any]:
    """Record where a report comes from: its command, versions, and the machine with its number of worker processes."""
    import torch
    import transformers

    import rime_fast

    return {
        "command": command,
        "rime_fast": rime_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; processes of one thread at a time: {workers}",
    }


def main(argv: list[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="rime_fast.demo.ablation", description="The demo's claims over 3 seeds.")
    parser.add_argument("--output_dir", default="runs/ablation")
    parser.add_argument("--fast", action="store_true", help="a smoke run: a dozen steps a cell, nothing is learned")
    parser.add_argument("--cell", choices=ALL, help="run this one cell only, in this process")
    parser.add_argument("--seed", type=int, default=0, help="of --cell")
    options = parser.parse_args(argv)
    out = Path(options.output_dir)
    if options.cell:
        (out / "cells").mkdir(parents=True, exist_ok=True)
        run_cell(options.cell, options.seed, out, FAST if options.fast else FULL)
        return 0
    report = run_ablation(out, fast=options.fast)
    for claim in report["claims"]:
        print(f"{'holds' if claim['holds'] else 'FAILS'}  {claim['claim']}: {claim['value']:.3f} ({claim['needs']})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
