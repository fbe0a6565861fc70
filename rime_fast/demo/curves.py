"""`make curves`: what Refine-RL changes, step by step, by three rewards from two starting points over three seeds.

    python -m rime_fast.demo.curves --output_dir runs/curves [--fast]

Starts: ``long``, the jointly trained model of the demo, which is all but perfect; ``short``, one of fewer steps, which
is not. Rewards: ``anchors_sft``, ours (scored against discriminative anchors of the start); ``anchors_policy``, the
same against anchors of the current weights; ``ume_r1``, UME-R1's (scored against the other side's rewrites).

One process, cell by cell. A cell writes ``cells/<start>-<reward>-<seed>.json`` and is not run again while its settings
are the same; joint training is shared by the cells of a start and seed, and kept in ``starts/``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rime_fast.data.digits import Split, retrieval_set
from rime_fast.demo.ablation import environment
from rime_fast.demo.phases import FAST, TEST_SEED, Sizes, demo_embedder, joint_training, query_tokens, refine
from rime_fast.demo.task import demo_model
from rime_fast.eval.mutual import evaluate_mutual

SEEDS = (0, 1, 2)
# Reward -> the settings of Refine-RL in which it differs from the demo's. UME-R1's scores a side by the other side's
# rewrites, so it samples and trains both; its step has the same queries, and the targets besides.
REWARDS: dict[str, dict[str, Any]] = {
    "anchors_sft": {},
    "anchors_policy": {"anchors": "policy"},
    "ume_r1": {"reward_mode": "ume_r1", "trained_sides": "both"},
}


@dataclass(frozen=True)
class CurveSizes:
    """How much of everything. short_steps: of joint training, for the start that is not perfect. every: Refine-RL
    steps between two measurements."""

    sizes: Sizes = Sizes(refine_steps=30)  # noqa: RUF009 (frozen)
    short_steps: int = 500
    every: int = 6
    learning_rate: float = 1e-4

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for reports and for telling runs apart."""
        return asdict(self)

    def joint(self, start: str) -> Sizes:
        """The sizes of the joint training behind a start."""
        return self.sizes if start == "long" else replace(self.sizes, sft_steps=self.short_steps)


FULL_CURVES = CurveSizes()
FAST_CURVES = CurveSizes(sizes=FAST, short_steps=6, every=1)
STARTS = ("short", "long")


class Meter(TrainerCallback):
    """Measures gen-gen hit@1 and decoded tokens every ``every`` steps into ``points``, one dict a measurement."""

    def __init__(self, processor: Any, data: Any, every: int) -> None:
        self.processor, self.data, self.every = processor, data, every
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0

    def measure(self, model: Any, step: int) -> None:
        """One point. Greedy decoding: the training's random numbers stay as they are."""
        begin, training = time.perf_counter(), model.training
        model.eval()
        found = evaluate_mutual(demo_embedder(model, self.processor), self.data, modes=("gen",), n_examples=0)
        model.train(training)
        self.points.append(
            {
                "step": step,
                "hit@1": found.hit_at_1()["gen-gen"],
                "query_tokens": query_tokens(found),
                "format_errors": found.format_errors["query"],
            }
        )
        self.seconds += time.perf_counter() - begin

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)


def start_model(out: Path, start: str, seed: int, curve: CurveSizes) -> tuple[Any, Any]:
    """The jointly trained model and its processor; read from ``out/starts`` where it was trained with these sizes."""
    from rime_fast.model.dual_mode import DualModeModel

    folder, sizes = out / "starts" / f"{start}-{seed}", curve.joint(start)
    wanted = {"seed": seed} | {key: asdict(sizes)[key] for key in ("sft_steps", "sft_batch", "wordy")}
    note = folder / "settings.json"
    model, processor = demo_model(seed)
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == wanted:
        return DualModeModel.from_pretrained(folder), processor
    joint_training(model, processor, out / "work", seed=seed, sizes=sizes)
    model.save_pretrained(folder)
    note.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    return model, processor


def run_cell(
    start: str, reward: str, seed: int, out: Path, curve: CurveSizes, *, split: Split = "test"
) -> dict[str, Any]:
    """One curve: ``points`` [{step, hit@1, query_tokens, format_errors}] from step 0, and the training's log."""
    if start not in STARTS or reward not in REWARDS:
        raise ValueError(f"cell is {start!r}, {reward!r}; expected one of {STARTS} and one of {tuple(REWARDS)}")
    model, processor = start_model(out, start, seed, curve)
    meter = Meter(processor, retrieval_set(split, curve.sizes.n_test, seed=TEST_SEED), curve.every)
    meter.measure(model, 0)
    begin = time.perf_counter()
    log = refine(
        model, processor, out / "work" / f"{start}-{reward}-{seed}", seed=seed, sizes=curve.sizes, callbacks=[meter],
        learning_rate=curve.learning_rate, **REWARDS[reward],
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    return {
        "start": start, "reward": reward, "seed": seed, "split": split, "settings": curve.as_dict(),
        "points": meter.points, "seconds": round(seconds - meter.seconds, 1), "log": log,
    }  # fmt: skip


def run_curves(
    out: str | Path = "runs/curves", *, seeds: Sequence[int] = SEEDS, starts: Sequence[str] = STARTS, fast: bool = False
) -> dict[str, Any]:
    """Run the cells that are missing; writes ``report.json`` and ``refine_curves.png`` into ``out``, returns the
    report (``curves_report.summarise``)."""
    from rime_fast.demo.curves_report import plot_curves, summarise

    out, curve = Path(out), FAST_CURVES if fast else FULL_CURVES
    (out / "cells").mkdir(parents=True, exist_ok=True)
    cells = []
    for start in starts:
        for seed in seeds:
            for reward in REWARDS:
                cells.append(_cell(out, start, reward, seed, curve))
                last = cells[-1]["points"][-1]
                print(f"{start} {reward} {seed}: hit@1 {cells[-1]['points'][0]['hit@1']:.3f} -> {last['hit@1']:.3f}, "
                      f"{last['query_tokens']:.1f} tokens", flush=True)  # fmt: skip
    report = summarise(cells) | {
        "settings": curve.as_dict() | {"rewards": REWARDS, "test_seed": TEST_SEED},
        "environment": environment("python -m rime_fast.demo.curves", workers=1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot_curves(report, out / "refine_curves.png")
    return report


def _cell(out: Path, start: str, reward: str, seed: int, curve: CurveSizes) -> dict[str, Any]:
    path = out / "cells" / f"{start}-{reward}-{seed}.json"
    if path.is_file():
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["settings"] == curve.as_dict():
            return cell
    cell = run_cell(start, reward, seed, out, curve)
    path.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    return cell


def main(argv: list[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="rime_fast.demo.curves", description="Refine-RL step by step, 3 rewards.")
    parser.add_argument("--output_dir", default="runs/curves")
    parser.add_argument("--fast", action="store_true", help="a smoke run: a few steps a cell, nothing is learned")
    parser.add_argument("--plot", metavar="REPORT", help="only draw this report.json's picture, into output_dir")
    options = parser.parse_args(argv)
    if options.plot:
        from rime_fast.demo.curves_report import plot_curves

        report = json.loads(Path(options.plot).read_text(encoding="utf-8"))
        plot_curves(report, Path(options.output_dir) / "refine_curves.png")
        return 0
    run_curves(options.output_dir, fast=options.fast)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
