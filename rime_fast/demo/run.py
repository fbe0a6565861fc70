"""`make demo`: the whole recipe on real scans, from random weights to a report, in minutes on two cores.

python -m rime_fast.demo.run --output_dir runs/demo [--seed 0] [--fast]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from rime_fast.demo.phases import FAST, FULL, TEACHERS, Sizes, joint_training, measure, query_tokens, refine
from rime_fast.demo.task import DIGITS, Task
from rime_fast.eval.mutual import MutualResult
from rime_fast.eval.report import write_report

T = TypeVar("T")


def run_demo(
    out: str | Path = "runs/demo", seed: int = 0, fast: bool = False, *, task: Task = DIGITS
) -> dict[str, Any]:
    """Joint training, evaluation, Refine-RL, evaluation, report; returns the numbers of ``report.json``.

    Writes ``report.html``, ``report.json`` and both models (``sft``, ``refine``; any transformers reads them) into
    ``out``. The JSON has: ``sft`` and ``refine``, each the four cells' hit@1; ``rewrite_tokens`` {"sft", "refine"},
    decoded tokens a query; ``seconds`` of each phase; ``seed``; ``n_test``. fast: a smoke run of the same path.

    Runs on one thread: the model is so small that a second gains little, and where another process is at work two
    threads that wait for each other lose much (docs/demo.md).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(Path(out), seed, task, FAST if fast else replace(FULL, sft_steps=task.sft_steps))
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seed: int, task: Task, sizes: Sizes) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    model, processor = task.model(seed)
    common: dict[str, Any] = {"sizes": sizes, "task": task}
    sft_log = _timed("sft", seconds, lambda: joint_training(model, processor, out / "sft", seed=seed, **common))
    _save(model, processor, out / "sft")
    sft = _timed("eval_sft", seconds, lambda: measure(model, processor, **common, n_examples=24))
    _say("joint training", sft)
    refine_log = _timed("refine", seconds, lambda: refine(model, processor, out / "refine", seed=seed, **common))
    _save(model, processor, out / "refine")
    refined = _timed("eval_refine", seconds, lambda: measure(model, processor, **common, n_examples=24))
    _say("Refine-RL", refined)
    numbers: dict[str, Any] = {
        "sft": sft.hit_at_1(),
        "refine": refined.hit_at_1(),
        "rewrite_tokens": {"sft": query_tokens(sft), "refine": query_tokens(refined)},
        "seconds": seconds,
        "seed": seed,
        "n_test": sizes.n_test,
    }
    phases = [
        {"name": "sft", "label": "Joint training", "mutual": sft.to_dict(), "log_history": sft_log},
        {"name": "refine", "label": "Refine-RL", "mutual": refined.to_dict(), "log_history": refine_log},
    ]
    _timed("report", seconds, lambda: _write(out, numbers, phases, sizes, task, model))
    print(f"report: {out / 'report.html'}  ({sum(seconds.values()):.0f} s)")
    return numbers


def _timed(name: str, seconds: dict[str, float], work: Callable[[], T]) -> T:
    begin = time.perf_counter()
    seconds[name] = 0.0
    result = work()
    seconds[name] = round(time.perf_counter() - begin, 2)
    return result


def _save(model: Any, processor: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _say(label: str, result: MutualResult) -> None:
    cells = "  ".join(f"{name} {value:.3f}" for name, value in result.hit_at_1().items())
    print(f"{label}: hit@1 {cells}  ({query_tokens(result):.1f} tokens a query)", flush=True)


def _write(
    out: Path, numbers: dict[str, Any], phases: list[dict[str, Any]], sizes: Sizes, task: Task, model: Any
) -> None:
    facts = {
        "model": f"Qwen2-VL, {sum(p.numel() for p in model.parameters()):,} random weights",
        "seed": numbers["seed"],
        "joint training": f"{sizes.sft_steps} steps of {sizes.sft_batch} pairs",
        "Refine-RL": f"{sizes.refine_steps} steps of {sizes.refine_batch} x 8 rewrites",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "teacher": ", ".join(f"{share:.0%} {kind}" for kind, share in TEACHERS["noisy"].items()),
        "machine": f"{platform.machine()}, one thread",
    }
    table = {
        "title": "Time of each phase",
        "columns": ["phase", "seconds"],
        "rows": [[name, taken] for name, taken in numbers["seconds"].items() if name != "report"],
    }
    write_report(
        out,
        {
            "title": task.title,
            "lead": task.lead.format(**TEACHERS["noisy"]),
            "facts": facts,
            "phases": phases,
            "tables": [table],
            "extra": numbers,
        },
    )


def main(argv: list[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="rime_fast.demo.run", description="The recipe on digit scans, end to end.")
    parser.add_argument("--output_dir", default="runs/demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a smoke run: a dozen steps, nothing is learned")
    options = parser.parse_args(argv)
    run_demo(options.output_dir, options.seed, options.fast)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
