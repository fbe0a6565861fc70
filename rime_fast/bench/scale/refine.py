"""The Refine-RL step (trainers/refine_trainer.py) on a cluster: rollouts, reference, policy, reward, update.

Decoding one token for every rollout reads the weights, the prompts' keys and values (kept once a prompt) and the
rollouts' own: its seconds are the largest of these bytes over the memory bandwidth, the FLOP over the rate, and the
launches of its kernels one after the other. All rollouts are taken as equally long.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rime_fast.bench.scale import memory, work
from rime_fast.bench.scale.joint import Load, Part, Rates, Side, Step, optimizer_part, sync_parts
from rime_fast.bench.scale.network import Cluster, Sync
from rime_fast.bench.scale.shapes import ModelShape


@dataclass(frozen=True)
class RefinePlan:
    """A Refine-RL step. pairs: of all ranks together; both sides are trained, ``rollouts`` of each prompt.

    ``query.rewrite`` and ``target.rewrite`` are the tokens of a rollout. anchors: of the bank. reference: a frozen copy
    scores the rollouts (beta > 0). shared_prefix: a prompt's rows stand once for its rollouts. cuda_graphs: a decode
    step is one launch.
    """

    pairs: int = 512
    query: Side = field(default_factory=Side)
    target: Side = field(default_factory=Side)
    rollouts: int = 8
    anchors: int = 100_000
    strategy: str = "ddp"
    checkpointing: bool = False
    reference: bool = True
    shared_prefix: bool = True
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}; expected at least 1")
        if self.rollouts < 2:
            raise ValueError(f"rollouts is {self.rollouts}; expected at least 2")
        if self.strategy == "fsdp2":
            raise ValueError("strategy is 'fsdp2'; RefineRLTrainer runs under ddp or zero1 to zero3")


def decode(shape: ModelShape, cluster: Cluster, plan: RefinePlan) -> Part:
    """All decode steps of one rank."""
    rates, assume = Rates(cluster), cluster.assume
    own, text = plan.pairs / cluster.gpus, shape.text
    seconds = flops = nbytes = 0.0
    # both sides decode in one batch until the shorter one ends
    short, long = sorted((plan.query, plan.target), key=lambda side: side.rewrite)
    for steps, done, sides in (
        (short.rewrite, 0, (short, long)),
        (long.rewrite - short.rewrite, short.rewrite, (long,)),
    ):
        if not steps:
            continue
        rows, written = own * plan.rollouts * len(sides), done + (steps + 1) / 2  # own tokens, the mean over the steps
        prompts = sum(prompt_tokens(shape, side) for side in sides) * own
        read = 2.0 * (text.layers * text.layer_matrix + text.table)
        read += memory.kv_cache(text, prompts + rows * written)
        linear = rows * (work.text_linear(text, 1) + work.head(text, 1, "forward"))
        scores = plan.rollouts * prompts + rows * written
        attention = work.text_attention(text, scores)
        launches = 0.0 if plan.cuda_graphs else text.layers * assume.decode_kernels * assume.launch_s
        seconds += steps * max(rates.memory(read), rates.matmul(linear) + rates.attention(attention), launches)
        flops, nbytes = flops + steps * (linear + attention), nbytes + steps * read
    return Part("decode", seconds, flops, nbytes)


def prompt_tokens(shape: ModelShape, side: Side) -> int:
    """Rows of a prompt, image included."""
    return side.text + shape.patches(side.pixels) // shape.vision.merge**2


def policy_load(shape: ModelShape, plan: RefinePlan, own: float) -> tuple[float, float, float]:
    """(rows, causal query-key pairs, scored rows) of one rank's prompts with their rollouts."""
    rows = scores = scored = 0.0
    for side in (plan.query, plan.target):
        prompt, reply, count = prompt_tokens(shape, side), side.rewrite + 1, plan.rollouts
        if plan.shared_prefix:  # the prompt's last token opens each rollout
            rows += own * (prompt - 1 + count * reply)
            scores += own * work.shared_prefix_scores(prompt - 1, count, reply)
        else:
            rows += own * count * (prompt + side.rewrite)
            scores += own * count * work.causal_scores([prompt + side.rewrite])
        scored += own * count * side.rewrite
    return rows, scores, scored


def refine_step(shape: ModelShape, cluster: Cluster, plan: RefinePlan) -> Step:
    """One optimizer step of Refine-RL. Raises ValueError for fewer pairs than GPUs."""
    if plan.pairs < cluster.gpus:
        raise ValueError(f"pairs is {plan.pairs}; expected at least one for each of the {cluster.gpus} GPUs")
    rates, own, text = Rates(cluster), plan.pairs / cluster.gpus, shape.text
    prompt_sides = [(Side(side.text, side.pixels, 0), own) for side in (plan.query, plan.target)]
    prompts = Load.of(shape, prompt_sides)
    rows, scores, scored = policy_load(shape, plan, own)
    repeats = 1 if plan.shared_prefix else plan.rollouts

    trunk_flops, trunk_s = rates.trunk(shape, prompts)
    merge_flops = work.merging(shape.vision, prompts.patches)
    once_flops, once_s = trunk_flops + merge_flops, trunk_s + rates.matmul(merge_flops)
    prefill_flops, prefill_s = rates.text(shape, prompts)
    linear, attention = work.text_linear(text, rows), work.text_attention(text, scores)
    policy_s = rates.matmul(linear) + rates.attention(attention)
    scored_once = work.head(text, scored, "forward")
    scored_twice = work.head(text, scored, "recompute")
    rewards = work.reward(2 * own * plan.rollouts, plan.anchors, text.hidden)
    back = 3.0 if plan.checkpointing else 2.0

    parts = [
        Part("prefill", once_s + prefill_s, once_flops + prefill_flops),
        decode(shape, cluster, plan),
    ]
    if plan.reference:
        flops = repeats * once_flops + linear + attention + scored_once
        seconds = repeats * once_s + policy_s + rates.matmul(scored_once)
        parts.append(Part("reference", seconds, flops))
    parts += [
        Part("policy forward", repeats * once_s + policy_s, repeats * once_flops + linear + attention),
        Part("policy backward", back * policy_s + 2 * repeats * rates.matmul(merge_flops),
             back * (linear + attention) + 2 * repeats * merge_flops),
        Part("head", rates.matmul(scored_twice), scored_twice),
        Part("reward", rates.matmul(rewards), rewards),
    ]  # fmt: skip
    trained = shape.trained()
    sync = Sync(plan.strategy, shape.parameters, trained, units=text.layers + 2,
                gradient=memory.precision_of(plan.strategy).gradient)  # fmt: skip
    parts += sync_parts(cluster, sync, 1, 1, policy_s, back * policy_s)
    if sync.gathers:  # rollouts and reference want the weights whole: gathered once more each
        extra = sync.one_pass(cluster) * (2 if plan.reference else 1)
        parts.append(Part("weights for rollouts", cluster.seconds(extra), sent=extra.nbytes,
                          alone=cluster.seconds(extra)))  # fmt: skip
    parts.append(optimizer_part(rates, trained / (1 if plan.strategy == "ddp" else cluster.gpus)))
    samples = 2.0 * plan.pairs * plan.rollouts
    return Step(parts, _memory(shape, cluster, plan, rows, prompts), samples, rows * cluster.gpus)


def _memory(
    shape: ModelShape, cluster: Cluster, plan: RefinePlan, rows: float, prompts: Load
) -> dict[str, float]:
    """Bytes of one rank: the cache of the rollouts and the policy's graph are not there at the same time."""
    text, own = shape.text, plan.pairs / cluster.gpus
    found = memory.states(shape, shape.trained(), plan.strategy, cluster.gpus)
    if plan.reference and plan.strategy != "zero3":  # sharded parameters cannot be copied: there it is an adapter, off
        found["reference"] = 2.0 * shape.parameters
    replies = own * plan.rollouts * (plan.query.rewrite + plan.target.rewrite)
    cache = memory.kv_cache(text, prompts.tokens + replies)
    if plan.strategy == "zero3":
        cache += 2.0 * shape.parameters
    graph = memory.text_graph(text, rows, checkpointing=plan.checkpointing)
    graph += memory.merging_graph(shape.vision, prompts.patches) + memory.head(text, rows)
    found["cache or graph"] = max(cache, graph)
    return found
