"""The Refine-RL step (trainers/refine.py) on a cluster: rollouts, reference, policy, reward, update.

Decoding one token for every rollout reads the weights, the prompts' keys and values (kept once a prompt) and the
rollouts' own: its seconds are the largest of these bytes over the memory bandwidth, the FLOP over the rate, and the
launches of its kernels one after the other. All rollouts are taken as equally long.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.scale import memory, work
from benchmarks.scale.joint import Load, Part, Rates, Side, Step, optimizer_part, sync_parts
from benchmarks.scale.network import Cluster, Sync
from benchmarks.scale.shapes import ModelShape


@dataclass(frozen=True)
class RefinePlan:
    """A Refine-RL step. pairs: of all ranks together; both sides are trained, ``rollouts`` of each prompt.

    ``query.rewrite`` and ``target.rewrite`` are the tokens of a rollout. anchors: of the bank. reference: a frozen copy
    scores the rollouts (beta > 0). shared_prefix: a prompt's rows stand once for its rollouts. micro_tokens: rows that
    go through the policy at a time; None: all. cuda_graphs: a decode step is one launch.
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
    micro_tokens: int | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}; expected at least 1")
        if self.rollouts < 2:
            raise ValueError(f"rollouts is {self.rollouts}; expected at least 2")
        if self.micro_tokens is not None and self.micro_tokens < 1:
            raise ValueError(f"micro_tokens is {self.micro_tokens}; expected at least 1, or None")


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
    micro = 1 if plan.micro_tokens is None else -int(-rows // plan.micro_tokens)
    sync = Sync(
        plan.strategy,
        shape.parameters,
        shape.trained(),
        units=text.layers + 2,
        gradient=memory.precision_of(plan.strategy).gradient,
    )

    trunk_flops, trunk_s = rates.trunk(shape, prompts)
    merge_flops = work.merging(shape.vision, prompts.patches)
    merge_s = rates.matmul(merge_flops)
    prefill_flops, prefill_s = rates.text(shape, prompts)
    linear, attention = work.text_linear(text, rows), work.text_attention(text, scores)
    policy_s = rates.matmul(linear) + rates.attention(attention)
    scored_once = work.head(text, scored, "forward")
    scored_twice = work.head(text, scored, "recompute")
    rewards = work.reward(2 * own * plan.rollouts, plan.anchors, text.hidden)
    forwards = 2 if plan.reference else 1
    trunks, repeats = trunk_runs(plan, sync), 1 if plan.shared_prefix else plan.rollouts
    merges = 1 + (forwards + 2) * repeats  # prefill, reference and policy; the policy's backward twice
    back = 3.0 if plan.checkpointing else 2.0

    parts = [
        Part("vision", trunks * trunk_s + merges * merge_s, trunks * trunk_flops + merges * merge_flops),
        Part("prefill", prefill_s, prefill_flops),
        decode(shape, cluster, plan),
    ]
    if plan.reference:
        parts.append(Part("reference", policy_s + rates.matmul(scored_once), linear + attention + scored_once))
    parts += [
        Part("policy forward", policy_s, linear + attention),
        Part("policy backward", back * policy_s, back * (linear + attention)),
        Part("head", rates.matmul(scored_twice), scored_twice),
        Part("reward", rates.matmul(rewards), rewards),
    ]
    # a sharded model cannot be copied: there the reference is the policy with its adapter off, gathered once more
    passes = micro * (forwards if sync.gathers else 1)
    parts += sync_parts(cluster, sync, micro, passes, policy_s / micro, back * policy_s / micro)
    if sync.gathers:  # the rollouts want the weights whole
        whole = sync.one_pass(cluster)
        seconds = cluster.seconds(whole)
        parts.append(Part("weights for rollouts", seconds, sent=whole.nbytes, alone=seconds))
    parts.append(optimizer_part(rates, shape.trained() / (1 if plan.strategy == "ddp" else cluster.gpus)))
    found = _memory(shape, cluster, plan, rows / micro, prompts, micro)
    return Step(parts, found, 2.0 * plan.pairs * plan.rollouts, rows * cluster.gpus, micro)


def trunk_runs(plan: RefinePlan, sync: Sync) -> int:
    """How often the frozen vision tower runs over the prompts' images (trainers/refine.py).

    Once for prefill, reference and policy; where forwards gather parameters the prefill keeps no features; separate
    sequences have the image once a rollout and keep none.
    """
    if not plan.shared_prefix:
        return 1 + plan.rollouts * (2 if plan.reference else 1)
    return 2 if sync.gathers else 1


def _memory(
    shape: ModelShape, cluster: Cluster, plan: RefinePlan, rows: float, prompts: Load, micro: int
) -> dict[str, float]:
    """Bytes of one rank: the cache of the rollouts and the policy's graph are not there at the same time.

    rows: of one micro-batch.
    """
    text, own = shape.text, plan.pairs / cluster.gpus
    found = memory.states(shape, shape.trained(), plan.strategy, cluster.gpus)
    sharded = plan.strategy in ("fsdp2", "zero3")
    if plan.reference and not sharded:
        found["reference"] = 2.0 * shape.parameters
    replies = own * plan.rollouts * (plan.query.rewrite + plan.target.rewrite)
    cache = memory.kv_cache(text, prompts.tokens + replies)
    if sharded:
        cache += 2.0 * shape.parameters
    graph = memory.text_graph(text, rows, checkpointing=plan.checkpointing)
    graph += memory.merging_graph(shape.vision, prompts.patches / micro) + memory.head(text, rows)
    if plan.shared_prefix:
        found["vision features"] = memory.features(shape.vision, prompts.patches)
    found["cache or graph"] = max(cache, graph)
    return found
