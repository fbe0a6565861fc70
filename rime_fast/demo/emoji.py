"""The second demo: one figure by two artists, found after a change said in words (``data/emoji.py``).

rime-fast demo --task emoji                                   one run and its report
python -m rime_fast.demo.emoji --output_dir runs/emoji        both teachers over three seeds: report.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rime_fast.data.digits import Split, Style
from rime_fast.data.emoji import EmojiPairs, change, emoji_retrieval, fetch, load_emoji, rewrite
from rime_fast.data.retrieval import RetrievalSet
from rime_fast.demo.ablation import SEEDS
from rime_fast.demo.phases import FAST, FULL, Teacher, joint_training, measure, query_tokens, refine
from rime_fast.demo.task import DIGITS, Task, demo_template, fresh_model
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.tiny import tiny_tokenizer

PATCH = 8
# Tokens of a rewrite like "woman firefighter, dark skin tone" with tags, newline and <gen_emb>; the longest name has
# four more ("in motorized wheelchair", "medium-light").
TERSE_TOKENS = 14


def emoji_task(folder: str | Path) -> Task:
    """Make the task over the packages in ``folder``."""
    emoji = load_emoji(str(folder))
    template = demo_template("rewrite")
    texts = [template.instruction or ""]
    for cell in emoji.cells:
        texts += [f"<rewrite>{rewrite(cell, 'wordy')}</rewrite>", rewrite(cell), rewrite(cell, "vague")]
        texts += [change(other, cell) for other in emoji.cells[:10]]
    tokenizer = tiny_tokenizer(texts)

    def model(seed: int) -> tuple[Any, RimeProcessor]:
        return fresh_model(tokenizer, seed, patch_size=PATCH, mrope_section=(4, 6, 6))

    def rows(size: int, *, seed: int, style: Style, wordy: float, vague: float) -> EmojiPairs:
        return EmojiPairs(emoji, "train", size, seed=seed, wordy=wordy, vague=vague)

    def retrieval(split: Split, size: int, seed: int, style: Style) -> RetrievalSet:
        return emoji_retrieval(emoji, split, size, seed=seed)

    return replace(
        DIGITS,
        title="rime-fast demo: emoji by two artists",
        lead='Each query is a figure from Google\'s emoji and a change in words ("as a man with dark skin tone"); the '
        "target is Twitter's picture of the changed figure, one of all cells. Test pictures, by either artist, are "
        "never trained on; their activities, genders and tones are, in other company. A Qwen2-VL of random weights "
        "learns to write the target's name as its rewrite from a noisy teacher: {vague:.0%} of its rewrites name the "
        "activity alone, {wordy:.0%} are wordy, the rest are whole. Refine-RL then rewards closeness to the targets' "
        "frozen disc embeddings.",
        model=model,
        rows=rows,
        retrieval=retrieval,
        reward=DIGITS.reward | {"length_limit": TERSE_TOKENS},
        max_new_tokens={"rewrite": 26},
        sft_steps=500,
    )


def run_emoji(
    emoji_dir: str | Path, out: str | Path, *, seeds: Sequence[int] = SEEDS, fast: bool = False
) -> dict[str, Any]:
    """Train on the noisy and on the whole teacher's rewrites, refine, and measure each on the test figures; writes
    ``report.json`` into ``out`` and returns it. seconds: of processor time."""
    out, task = Path(out), emoji_task(fetch(emoji_dir))
    sizes = FAST if fast else replace(FULL, sft_steps=task.sft_steps)
    common: dict[str, Any] = {"sizes": sizes, "task": task}
    teachers: tuple[Teacher, ...] = ("noisy", "whole")
    runs: list[dict[str, Any]] = []
    report = {"settings": sizes.as_dict(), "runs": runs}
    torch.set_num_threads(1)  # as in the demo
    for teacher in teachers:
        for seed in seeds:
            model, processor = task.model(seed)
            run: dict[str, Any] = {"teacher": teacher, "seed": seed}
            for phase in ("sft", "refine"):
                began, folder = time.process_time(), out / "work" / f"{teacher}-{seed}-{phase}"
                if phase == "sft":
                    joint_training(model, processor, folder, seed=seed, teacher=teacher, **common)
                else:
                    refine(model, processor, folder, seed=seed, **common)
                seconds = time.process_time() - began
                found = measure(model, processor, **common)
                run[phase] = found.hit_at_1() | {"tokens": query_tokens(found), "seconds": seconds}
            runs.append(run)
            (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="rime_fast.demo.emoji", description="The emoji task over three seeds.")
    parser.add_argument("--output_dir", default="runs/emoji")
    parser.add_argument("--emoji_dir", default="runs/emoji-packages", help="the two npm packages; fetched if missing")
    parser.add_argument("--fast", action="store_true", help="a smoke run: a few steps, nothing is learned")
    options = parser.parse_args(argv)
    for run in run_emoji(options.emoji_dir, options.output_dir, fast=options.fast)["runs"]:
        print(
            f"{run['teacher']}, seed {run['seed']}: gen-gen {run['sft']['gen-gen']:.3f}, {run['refine']['gen-gen']:.3f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
