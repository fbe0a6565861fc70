"""`make curves`: what Refine-RL changes, step by step, by three rewards from two starting points over three seeds.

    python -m rime_fast.demo.curves --output_dir runs/curves [--fast]

Panels: ``long``, from the jointly trained model of the demo, which is all but perfect; ``short``, from one of fewer
steps, which is not; ``short-120``, the same for four times as many Refine-RL steps. Rewards: ``anchors_sft``, ours
(scored against discriminative anchors of the start); ``anchors_policy``, the same against anchors of the current
weights; ``ume_r1``, UME-R1's (scored against the other side's rewrites).

One process, cell by cell. A cell writes ``cells/<panel>-<reward>-<seed>.json`` and is not run again while its settings
are the same; joint training is shared by all cells of as many steps and a seed, and kept in ``starts/``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rime_fast.data.digits import Split, retrieval_set
from rime_fast.demo.ablation import environment
from rime_fast.demo.phases import FAST, FULL, TEST_SEED, Sizes, demo_embedder, joint_training, query_tokens, refine
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
class Panel:
    """Steps of joint training and of Refine-RL, Refine-RL steps between two measurements, and which rewards."""

    sft_steps: int
    refine_steps: int
    every: int
    rewards: tuple[str, ...] = tuple(REWARDS)


PANELS = {
    "short": Panel(500, 30, 6),
    "long": Panel(FULL.sft_steps, 30, 6),
    "short-120": Panel(500, 120, 24, ("anchors_sft", "ume_r1")),
}
FAST_PANELS = {name: replace(panel, sft_steps=4, refine_steps=2, every=1) for name, panel in PANELS.items()}
LEARNING_RATE = 1e-4


def panel_sizes(panel: Panel, sizes: Sizes) -> Sizes:
    """``sizes`` with the panel's numbers of steps."""
    return replace(sizes, sft_steps=panel.sft_steps, refine_steps=panel.refine_steps)


def settings(panel: Panel, sizes: Sizes) -> dict[str, Any]:
    """What a cell depends on, as plain values."""
    return panel_sizes(panel, sizes).as_dict() | {"every": panel.every, "learning_rate": LEARNING_RATE}


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


def start_model(out: Path, seed: int, sizes: Sizes) -> tuple[Any, Any]:
    """The jointly trained model and its processor; read from ``out/starts`` where it was trained with these sizes."""
    from rime_fast.model.dual_mode import DualModeModel

    folder = out / "starts" / f"{sizes.sft_steps}-{seed}"
    wanted = {"seed": seed} | {key: sizes.as_dict()[key] for key in ("sft_steps", "sft_batch", "wordy")}
    note = folder / "settings.json"
    model, processor = demo_model(seed)
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == wanted:
        return DualModeModel.from_pretrained(folder), processor
    joint_training(model, processor, out / "work", seed=seed, sizes=sizes)
    model.save_pretrained(folder)
    note.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    return model, processor


def run_cell(panel: Panel, reward: str, seed: int, out: Path, sizes: Sizes, *, split: Split = "test") -> dict[str, Any]:
    """One curve: ``points`` [{step, hit@1, query_tokens, format_errors}] from step 0, and the training's log."""
    if reward not in REWARDS:
        raise ValueError(f"reward is {reward!r}; expected one of {', '.join(REWARDS)}")
    sizes = panel_sizes(panel, sizes)
    model, processor = start_model(out, seed, sizes)
    meter = Meter(processor, retrieval_set(split, sizes.n_test, seed=TEST_SEED), panel.every)
    meter.measure(model, 0)
    measured, begin = meter.seconds, time.perf_counter()
    log = refine(
        model,
        processor,
        out / "work" / f"{reward}-{seed}",
        seed=seed,
        sizes=sizes,
        callbacks=[meter],
        learning_rate=LEARNING_RATE,
        **REWARDS[reward],
    )
    seconds = time.perf_counter() - begin - (meter.seconds - measured)
    return {
        "reward": reward,
        "seed": seed,
        "split": split,
        "settings": settings(panel, sizes),
        "points": meter.points,
        "seconds": round(seconds, 1),
        "log": log,
    }


def run_curves(
    out: str | Path = "runs/curves",
    *,
    seeds: Sequence[int] = SEEDS,
    panels: Sequence[str] = tuple(PANELS),
    fast: bool = False,
) -> dict[str, Any]:
    """Run the cells that are missing; writes ``report.json`` and ``refine_curves.png`` into ``out``, returns the
    report (``curves_report.summarise``)."""
    from rime_fast.demo.curves_report import plot_curves, summarise

    out, sizes, table = Path(out), FAST if fast else FULL, FAST_PANELS if fast else PANELS
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in panels}
    for name in panels:
        for seed in seeds:
            for reward in table[name].rewards:
                cell = _cell(out, name, table[name], reward, seed, sizes)
                cells[name].append(cell)
                first, last = cell["points"][0], cell["points"][-1]
                print(
                    f"{name} {reward} {seed}: hit@1 {first['hit@1']:.3f} -> {last['hit@1']:.3f}, "
                    f"{last['query_tokens']:.1f} tokens",
                    flush=True,
                )
    report = summarise(cells) | {
        "settings": {name: settings(table[name], sizes) for name in panels}
        | {"rewards": REWARDS, "test_seed": TEST_SEED},
        "environment": environment("python -m rime_fast.demo.curves", workers=1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot_curves(report, out / "refine_curves.png")
    return report


def _cell(out: Path, name: str, panel: Panel, reward: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    path = out / "cells" / f"{name}-{reward}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["settings"] == settings(panel, sizes):
            return cell
    cell = run_cell(panel, reward, seed, out, sizes)
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
