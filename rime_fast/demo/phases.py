"""The demo's phases, shared by `make demo`, `make ablation` and `make curves`: joint training, Refine-RL, measuring.

The settings below were chosen on the validation scans (docs/demo.md has the figures); the test scans are only read by
``measure``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from rime_fast.data.digits import Split, Style
from rime_fast.demo.task import DIGITS, Task
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.eval.mutual import MutualResult, evaluate_mutual, mutual_table
from rime_fast.eval.think import embed_thought, given_rewrites
from rime_fast.recipe.group_rewards import Rewarder
from rime_fast.trainers.config import RefineConfig, RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from rime_fast.trainers.refine import RefineRLTrainer

# The seed of every test set: all cells and seeds are measured on the same queries.
TEST_SEED = 7
# Training chains of Refine-RL, and of joint training that goes on: another stream than joint training's.
_REFINE_SEED = 1000
Teacher = Literal["noisy", "clean", "whole"]
# Shares of a teacher's vague and wordy rewrites of the queries; the rest are whole (``data/digits.py``). Seven in ten
# of the noisy one's stop early, so that greedy decoding stops early too, and sampling finds a useful rewrite now and
# then: what Refine-RL has to tell apart. The clean one's retrieve equally well, and differ in length alone.
TEACHERS: dict[Teacher, dict[str, float]] = {
    "noisy": {"vague": 0.7, "wordy": 0.15},
    "clean": {"vague": 0.0, "wordy": 0.7},
    "whole": {"vague": 0.0, "wordy": 0.0},
}


@dataclass(frozen=True)
class Sizes:
    """How large a demo is: rows, steps and lengths of every phase.

    more_steps: joint training's steps in the control that goes on with it in place of Refine-RL: at least as many
    seconds on two cores (docs/demo.md). measurements: how often an arm of the ablation is measured on its way.
    """

    sft_steps: int = DIGITS.sft_steps
    sft_batch: int = 32
    refine_steps: int = 80
    refine_batch: int = 24
    n_test: int = 512
    more_steps: int = 420
    measurements: int = 10

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for reports and for telling runs apart."""
        return asdict(self) | {"teachers": TEACHERS}


FULL = Sizes()
FAST = Sizes(sft_steps=12, sft_batch=8, refine_steps=2, refine_batch=4, n_test=24, more_steps=2, measurements=2)


def joint_training(
    model: Any,
    processor: Any,
    out: Path,
    *,
    seed: int,
    sizes: Sizes,
    task: Task = DIGITS,
    style: Style = "rewrite",
    teacher: Teacher = "noisy",
    cross_modes: bool = True,
    more: bool = False,
    latent_tokens: int = 0,
    objective: str = "joint",
    head: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, Any]]:
    """Train ``model`` in place on the task's training rows; returns the log. teacher: who wrote the rewrites (of style
    "rewrite"). cross_modes: with Cross-Mode Alignment. more: go on with a trained model, on rows it has not seen.
    latent_tokens: K of latent rewrites. objective, head: Think-Then-Embed's (of style "trace").

    The contrastive terms weigh 0.05 each, not 1: a million fresh weights have to learn to see and to reckon first,
    and the discriminative terms, which they can never satisfy, would drown the cross-entropy's gradient.
    """
    steps = sizes.more_steps if more else sizes.sft_steps
    decay = steps * 3 // 10
    args = RimeConfig(
        output_dir=str(out),
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=sizes.sft_batch,
        learning_rate=1e-3,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": decay, "decay_type": "linear"},
        warmup_steps=min(50, steps // 4),
        adam_beta2=0.98,
        temperature=0.05,
        disc_weight=0.0 if style == "trace" else 0.05,
        gen_weight=0.05,
        cross_weight=0.05 if cross_modes and style != "trace" else 0.0,
        latent_tokens=latent_tokens,
        latent_weight=0.05,
        objective=objective,
        head=head,
        freeze_backbone=head is not None,
        **_common(steps),
    )
    shares = TEACHERS[teacher] if style == "rewrite" else {"vague": 0.0, "wordy": 0.0}
    stream = seed + _REFINE_SEED if more else seed
    pairs = task.rows(steps * sizes.sft_batch, seed=stream, style=style, **shares)
    trainer = RimeTrainer(
        model,
        args,
        train_dataset=pairs,
        processor=processor,
        template=task.template(style),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer.state.log_history


def refine(
    model: Any,
    processor: Any,
    out: Path,
    *,
    seed: int,
    sizes: Sizes,
    task: Task = DIGITS,
    callbacks: Sequence[TrainerCallback] = (),
    rewarder: Rewarder | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Run Refine-RL on ``model`` in place: the queries' rewrites against the frozen disc embeddings of the targets.

    rewarder: in place of the trainer's own. changes: fields of ``RefineConfig`` that are not to be the demo's.
    """
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "seed": seed,
        "max_steps": sizes.refine_steps,
        "per_device_train_batch_size": sizes.refine_batch,
        "learning_rate": 1e-4,
        "warmup_steps": min(5, sizes.refine_steps // 2),
        "adam_beta2": 0.98,
        "trained_sides": "query",
        "num_generations": 8,
        "max_completion_length": task.max_new_tokens["rewrite"],
        **task.reward,
        "loss_type": "token_mean",
    } | _common(sizes.refine_steps)
    size = sizes.refine_steps * sizes.refine_batch
    pairs = task.rows(size, seed=seed + _REFINE_SEED, style="rewrite", wordy=0.0, vague=0.0)
    trainer = RefineRLTrainer(
        model,
        RefineConfig(**settings | changes),
        train_dataset=pairs,
        processor=processor,
        template=task.template("rewrite"),
        callbacks=list(callbacks),
    )
    if rewarder is not None:
        trainer.rewarder = rewarder
    trainer.train()
    return trainer.state.log_history


def measure(
    model: Any,
    processor: Any,
    *,
    sizes: Sizes,
    task: Task = DIGITS,
    style: Style = "rewrite",
    split: Split = "test",
    n_examples: int = 0,
) -> MutualResult:
    """Measure mutual retrieval on ``sizes.n_test`` queries of ``split`` against all the task's targets, greedy
    decoding."""
    model.eval()
    data = task.retrieval(split, sizes.n_test, TEST_SEED, style)
    return evaluate_mutual(demo_embedder(model, processor, task, style), data, n_examples=n_examples)


def measure_thought(
    reasoner: Any, model: Any, processor: Any, *, sizes: Sizes, task: Task = DIGITS
) -> tuple[dict[str, float], float, int]:
    """Measure an embedder of traces as ``measure`` does: hit@1 with the reasoner's traces ("gen-gen") and with the
    right ones ("given"); decoded tokens of a query; queries whose trace does not parse."""
    data = task.retrieval("test", sizes.n_test, TEST_SEED, "trace")
    thinker, embedder = (demo_embedder(one.eval(), processor, task, "trace") for one in (reasoner, model))
    thought = {
        "query": thinker.encode_items(data.queries, "gen"),
        "target": thinker.encode_items(data.candidates, "gen"),
    }
    hits = {}
    for name in ("gen-gen", "given"):
        rows = []
        for side, items in (("query", data.queries), ("target", data.candidates)):
            traces = thought[side] if name == "gen-gen" else given_rewrites([str(item.rewrite) for item in items])
            rows.append({"gen": embed_thought(embedder, items, traces).embeddings})
        hits[name] = mutual_table(rows[0], rows[1], data.correct)["gen-gen"].metrics["hit@1"]
    return hits, thought["query"].mean_tokens, thought["query"].format_errors


def demo_embedder(model: Any, processor: Any, task: Task = DIGITS, style: Style = "rewrite") -> RimeEmbedder:
    """The embedder of a style: its template, and room for its longest response."""
    return RimeEmbedder(model, processor, task.template(style), max_new_tokens=task.max_new_tokens[style])


def query_tokens(result: MutualResult) -> float:
    """Mean decoded tokens of a query's response, tags and ``<gen_emb>`` included."""
    return result.cost["gen"]["query_tokens"]


def _common(steps: int) -> dict[str, Any]:
    """Everything is trained (the weights are random), and the rows, made on the fly, need no check."""
    return {
        "freeze_vision": False,
        "check_data": False,
        "overwrite_output_dir": True,
        "save_strategy": "no",
        "logging_steps": max(1, min(20, steps // 4)),
        "dataloader_num_workers": 0,
    }
