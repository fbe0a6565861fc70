"""What is done with a model that a noisy teacher trained: Refine-RL by three rewards, four controls, a reference.

Every arm begins with the same jointly trained model (`make ablation`'s cell ``noisy``), and has the same queries.

    refine           our reward: closeness to the frozen disc embeddings of the targets, format, length
    anchors_policy   the same against disc embeddings of the current weights
    ume_r1           UME-R1's reward: closeness to the other side's rewrites; it trains both sides
    random           control: the reward is a random number
    format_only      control: the reward is the form alone
    length_only      control: the reward is shortness alone
    more_sft         control: joint training goes on, on the same noisy data, for at least Refine-RL's compute
    best_of_8        reference: nothing is trained; of eight sampled rewrites the one that our reward likes best
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rime_fast.data.digits import retrieval_set
from rime_fast.demo.phases import TEST_SEED, Sizes, demo_embedder, joint_training, query_tokens, refine
from rime_fast.demo.task import DIGITS
from rime_fast.engine.rollout import generate_rollouts
from rime_fast.eval.mutual import evaluate_mutual
from rime_fast.ops.reward import RewardWeights, score_rewrites_
from rime_fast.recipe.group_rewards import Rewarder
from rime_fast.trainers.config import RefineConfig

# Refine-RL's settings that differ from the demo's.
REWARDS: dict[str, dict[str, Any]] = {
    "refine": {},
    "anchors_policy": {"anchors": "policy"},
    "ume_r1": {"reward_mode": "ume_r1", "trained_sides": "both"},
    "random": {},
    "format_only": {"rank_weight": 0.0, "refine_weight": 0.0, "length_weight": 0.0},
    "length_only": {"rank_weight": 0.0, "refine_weight": 0.0, "format_weight": 0.0},
}
ARMS = (*REWARDS, "more_sft")
SAMPLES = 8  # rewrites a query, in Refine-RL and in best_of_8


class Meter(TrainerCallback):
    """Measures gen-gen hit@1 and decoded tokens every ``every`` steps into ``points``, one dict a measurement.

    A point has the seconds of training up to it, measuring left out: processor time, which other processes of a busy
    machine do not lengthen.
    """

    def __init__(self, processor: Any, data: Any, every: int) -> None:
        self.processor, self.data, self.every = processor, data, every
        self.points: list[dict[str, Any]] = []
        self.begin, self.measuring = time.process_time(), 0.0

    def measure(self, model: Any, step: int) -> None:
        """Measure one point. Greedy decoding: the training's random numbers stay as they are."""
        begin, training = time.process_time(), model.training
        seconds = begin - self.begin - self.measuring
        model.eval()
        found = evaluate_mutual(demo_embedder(model, self.processor), self.data, modes=("gen",), n_examples=0)
        model.train(training)
        self.points.append(
            {
                "step": step,
                "seconds": round(seconds, 2),
                "hit@1": found.hit_at_1()["gen-gen"],
                "query_tokens": query_tokens(found),
                "format_errors": found.format_errors["query"],
            }
        )
        self.measuring += time.process_time() - begin

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)


class RandomRewards(Rewarder):
    """A control: normal random rewards, whatever was written; advantages as Refine-RL makes them of any reward."""

    def __init__(self, weights: RewardWeights, trained: tuple[str, ...], group_size: int, seed: int) -> None:
        super().__init__(weights, trained, group_size)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, into: Any, anchors: Any, gen: Tensor, disc: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__call__(into, anchors, gen, disc, *args, **kwargs)  # the terms, for the log
        first = kwargs.get("first", args[2] if len(args) > 2 else 0)
        rows = slice(first, first + disc.shape[0])
        drawn = torch.randn(into.rewards[rows].shape, generator=self.generator)
        into.rewards[rows] = drawn
        into.advantages[rows] = (drawn - drawn.mean(1, keepdim=True)) / (drawn.std(1, keepdim=True) + self.weights.eps)


def run_arm(arm: str, model: Any, processor: Any, out: Path, *, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Train ``model`` in place by one arm; {"points": of the test queries along the way, "log", "seconds" of training}.

    Raises ValueError for an unknown arm.
    """
    if arm not in ARMS:
        raise ValueError(f"arm is {arm!r}; expected one of {', '.join(ARMS)}")
    steps = sizes.more_steps if arm == "more_sft" else sizes.refine_steps
    meter = Meter(processor, retrieval_set("test", sizes.n_test, seed=TEST_SEED), max(1, steps // sizes.measurements))
    meter.measure(model, 0)
    if arm == "more_sft":
        log = joint_training(model, processor, out, seed=seed, sizes=sizes, more=True, callbacks=[meter])
    else:
        rewarder = None
        if arm == "random":
            rewarder = RandomRewards(RewardWeights(), ("query",), SAMPLES, seed)
        log = refine(
            model, processor, out, seed=seed, sizes=sizes, callbacks=[meter], rewarder=rewarder, **REWARDS[arm]
        )
    return {"points": meter.points, "log": log, "seconds": meter.points[-1]["seconds"]}


@torch.no_grad()
def best_of(model: Any, processor: Any, *, sizes: Sizes, seed: int, samples: int = SAMPLES) -> dict[str, Any]:
    """Measure hit@1 of gen-gen where each test query's best of ``samples`` rewrites is taken; nothing is trained.

    Best by our reward with the demo's weights, which knows the query's target: an upper reference, not a system.
    {"hit@1", "query_tokens": of those taken, "first_hit@1": of each query's first sample}.
    """
    model.eval()
    weights = RefineConfig(**DIGITS.reward).reward_weights()
    data = retrieval_set("test", sizes.n_test, seed=TEST_SEED)
    embedder = demo_embedder(model, processor)
    collator = embedder.collator
    disc, gen, _ = embedder.encode_both(data.candidates)
    own_disc = embedder.encode(data.queries)
    positive = torch.tensor([rows[0] for rows in data.correct])
    generator = torch.Generator().manual_seed(seed)
    best, tokens, first = [], [], []
    for begin in range(0, len(data.queries), 64):
        rows = slice(begin, begin + 64)
        rollout = generate_rollouts(
            model,
            collator.collate_prompts(data.queries[rows], "gen"),
            gen_id=collator.gen_id,
            max_new_tokens=DIGITS.max_new_tokens["rewrite"],
            group_size=samples,
            generator=generator,
            pad_id=processor.tokenizer.pad_token_id or 0,
        )
        texts = (
            processor.tokenizer.decode(ids[:n])
            for ids, n in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)
        )
        formed = torch.tensor([collator.template.parse_response(text)[1] for text in texts]) & rollout.finished
        g = torch.nn.functional.normalize(rollout.gen_states, dim=1).unflatten(0, (-1, samples))
        rewards, advantages = torch.zeros(2, *g.shape[:2]).unbind()
        score_rewrites_(
            rewards,
            advantages,
            gen=g,
            anchors=disc,
            positive=positive[rows],
            format_ok=formed.unflatten(0, (-1, samples)),
            lengths=rollout.lengths.unflatten(0, (-1, samples)).float(),
            disc_similarity=(own_disc[rows] * disc[positive[rows]]).sum(1),
            weights=weights,
        )
        chosen = rewards.argmax(1)
        found = (g @ gen.T).argmax(-1) == positive[rows, None]
        best.append(found.gather(1, chosen[:, None])[:, 0])
        first.append(found[:, 0])
        tokens.append(rollout.lengths.unflatten(0, (-1, samples)).gather(1, chosen[:, None])[:, 0])
    share = {"hit@1": torch.cat(best), "first_hit@1": torch.cat(first), "query_tokens": torch.cat(tokens)}
    return {name: float(values.float().mean()) for name, values in share.items()}
