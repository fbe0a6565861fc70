"""The joint-training step (trainers/joint.py) on a cluster: seconds and memory of each part of one rank.

Seconds of a part are its FLOP over the assumed rate (bytes over the memory bandwidth for the optimizer). Communication
that can run beside computation costs what does not fit beside it:

- parameter gathers (FSDP2, ZeRO-3): max(0, gather - computation) of every pass;
- gradients: max(0, reduction - backward) of the micro-batch whose backward they leave with, where the gathers of that
  backward use the same wires first;
- a ring of keys beside the products with them; gathered keys and their gradients hide behind nothing.

Ranks are taken as equally loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.scale import memory, work
from benchmarks.scale.hardware import Assumptions
from benchmarks.scale.network import Cluster, Contrast, Sync, Traffic
from benchmarks.scale.shapes import ModelShape

GATHER_LIMIT = 8192 * 2**20  # ops/contrastive/agreement.py


@dataclass(frozen=True)
class Side:
    """A query or a target: text tokens of the prompt, pixels of its image (0: none), scored tokens of its rewrite."""

    text: int = 48
    pixels: int = 448 * 448
    rewrite: int = 64


@dataclass(frozen=True)
class Plan:
    """A joint-training step. pairs: of all ranks together.

    strategy: "ddp", "fsdp2", "zero1", "zero2", "zero3". micro_tokens: tokens a micro-batch. cached: the gradient
    cache; without it the rank's pairs are one micro-batch. kept: share of the micro-batches whose graph is kept, so
    that they are encoded once (the last one always is). checkpointing: of activations. ring: None as the operator
    decides. element: bytes of an embedding's element on the wire.
    """

    pairs: int = 8192
    query: Side = field(default_factory=Side)
    target: Side = field(default_factory=Side)
    strategy: str = "ddp"
    micro_tokens: int = 16_384
    cached: bool = True
    kept: float = 0.0
    checkpointing: bool = False
    trained_vision: bool = False
    modes: int = 2
    terms: int = 4
    ring: bool | None = None
    element: int = 4

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}; expected at least 1")
        if not 0 <= self.kept <= 1:
            raise ValueError(f"kept is {self.kept}; expected a share, 0 <= kept <= 1")
        if self.micro_tokens < 1:
            raise ValueError(f"micro_tokens is {self.micro_tokens}; expected at least 1")


@dataclass
class Part:
    """seconds: what the step gets longer by. flops, nbytes: of one rank; sent: network bytes; alone: seconds of the
    communication if nothing hid it."""

    name: str
    seconds: float
    flops: float = 0.0
    nbytes: float = 0.0
    sent: float = 0.0
    alone: float = 0.0


@dataclass
class Step:
    """parts and memory (bytes by use) of one rank, and what all ranks do together in one step."""

    parts: list[Part]
    memory: dict[str, float]
    samples: float
    tokens: float
    micro_batches: int = 1

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def peak(self) -> float:
        """Bytes of a rank."""
        return sum(self.memory.values())

    def share(self, *names: str) -> float:
        """Of the step's seconds."""
        return sum(part.seconds for part in self.parts if part.name in names) / self.seconds


@dataclass(frozen=True)
class Load:
    """One rank's rows: sequences by length, patches by image, scored rows."""

    lengths: dict[int, float]
    images: dict[int, float]
    scored: float

    @classmethod
    def of(cls, shape: ModelShape, sides: list[tuple[Side, float]]) -> Load:
        """sides: each with how many the rank has."""
        lengths: dict[int, float] = {}
        images: dict[int, float] = {}
        scored = 0.0
        for side, count in sides:
            patches = shape.patches(side.pixels)
            length = side.text + patches // shape.vision.merge**2 + side.rewrite
            lengths[length] = lengths.get(length, 0.0) + count
            images[patches] = images.get(patches, 0.0) + count
            scored += side.rewrite * count
        return cls(lengths, images, scored)

    @property
    def tokens(self) -> float:
        return sum(length * count for length, count in self.lengths.items())

    @property
    def patches(self) -> float:
        return sum(n * count for n, count in self.images.items())

    @property
    def scores(self) -> float:
        """Causal query-key pairs."""
        return sum(work.causal_scores([length]) * count for length, count in self.lengths.items())


class Rates:
    """Seconds of FLOP and bytes on a cluster's GPUs."""

    def __init__(self, cluster: Cluster) -> None:
        self.flops, self.hbm, self.assume = cluster.hardware.flops, cluster.hardware.hbm, cluster.assume

    def matmul(self, flops: float) -> float:
        return flops / (self.flops * self.assume.matmul)

    def attention(self, flops: float) -> float:
        return flops / (self.flops * self.assume.attention)

    def memory(self, nbytes: float) -> float:
        return nbytes / (self.hbm * self.assume.hbm)

    def text(self, shape: ModelShape, load: Load) -> tuple[float, float]:
        """(FLOP, seconds) of the language model's forward."""
        linear, attention = work.text_linear(shape.text, load.tokens), work.text_attention(shape.text, load.scores)
        return linear + attention, self.matmul(linear) + self.attention(attention)

    def trunk(self, shape: ModelShape, load: Load) -> tuple[float, float]:
        """(FLOP, seconds) of the vision tower's forward without the mergers."""
        linear = work.vision_linear(shape.vision, load.patches)
        attention = sum(work.vision_attention(shape.vision, [n]) * count for n, count in load.images.items())
        return linear + attention, self.matmul(linear) + self.attention(attention)


def hidden_behind(cluster: Cluster, traffic: Traffic, computation: float, assume: Assumptions) -> float:
    """Seconds of ``traffic`` that do not fit beside so many seconds of computation."""
    return max(0.0, cluster.seconds(traffic) - assume.overlap * computation)


def joint_step(shape: ModelShape, cluster: Cluster, plan: Plan, load: Load | None = None) -> Step:
    """One optimizer step of joint training. load: of one rank, in place of the plan's sides (a batch at hand).

    Raises ValueError for fewer pairs than GPUs.
    """
    if plan.pairs < cluster.gpus:
        raise ValueError(f"pairs is {plan.pairs}; expected at least one for each of the {cluster.gpus} GPUs")
    rates, own = Rates(cluster), plan.pairs / cluster.gpus
    load = load or Load.of(shape, [(plan.query, own), (plan.target, own)])
    micro = max(1, -int(-load.tokens // plan.micro_tokens)) if plan.cached else 1
    kept = max(1, round(plan.kept * micro)) if plan.cached else 1
    again = (micro - kept) / micro
    trained = shape.trained(plan.trained_vision)
    sync = Sync(
        plan.strategy,
        shape.parameters,
        trained,
        units=shape.text.layers + 2,
        gradient=memory.precision_of(plan.strategy).gradient,
    )

    trunk_flops, trunk_s = rates.trunk(shape, load)
    merge_flops = work.merging(shape.vision, load.patches)
    text_flops, text_s = rates.text(shape, load)
    merge_s = rates.matmul(merge_flops)
    # A frozen trunk runs once: its features wait for the second pass. A trained one runs again and has a backward.
    trunk_passes = 3 + again + plan.checkpointing if plan.trained_vision else 1
    recomputed = 1.0 if plan.checkpointing else 0.0
    head_flops = work.head(shape.text, load.scored, "linear_ce")
    parts = [
        Part(
            "vision",
            trunk_passes * trunk_s + (3 + again) * merge_s,
            trunk_passes * trunk_flops + (3 + again) * merge_flops,
        ),
        Part("forward", text_s, text_flops),
        Part("forward again", (again + recomputed) * text_s, (again + recomputed) * text_flops),
        Part("backward", 2 * text_s, 2 * text_flops),
        Part("head", rates.matmul(head_flops), head_flops),
    ]
    parts += contrast_parts(shape, cluster, plan, rates)
    forward, backward = (trunk_s + text_s) / micro, (2 + recomputed) * text_s / micro
    parts += sync_parts(cluster, sync, micro, 2 * micro - kept, forward, backward)
    updated = trained / (1 if plan.strategy == "ddp" else cluster.gpus)
    parts.append(optimizer_part(rates, updated))
    return Step(
        parts, joint_memory(shape, cluster, plan, load, micro, kept), plan.pairs, load.tokens * cluster.gpus, micro
    )


def contrast_call(shape: ModelShape, plan: Plan) -> Contrast:
    """The grouped contrast of the whole batch."""
    return Contrast(plan.pairs, plan.pairs, shape.text.hidden, plan.modes, plan.terms, plan.element)


def rings(plan: Plan, call: Contrast) -> bool:
    """Whether the operator passes keys round instead of gathering them."""
    return call.key_bytes > GATHER_LIMIT if plan.ring is None else plan.ring


def contrast_parts(shape: ModelShape, cluster: Cluster, plan: Plan, rates: Rates) -> list[Part]:
    call = contrast_call(shape, plan)
    flops = work.contrast(call.queries, call.keys, call.width, call.terms) / cluster.gpus
    seconds = rates.matmul(flops)
    ring = rings(plan, call)
    traffic = call.ringed(cluster) if ring else call.gathered(cluster)
    alone = cluster.seconds(traffic)
    exposed = hidden_behind(cluster, traffic, seconds, cluster.assume) if ring else alone
    return [
        Part("contrast", seconds, flops),
        Part("contrast exchange", exposed, sent=traffic.nbytes, alone=alone),
    ]


def sync_parts(cluster: Cluster, sync: Sync, micro: int, forwards: int, forward: float, backward: float) -> list[Part]:
    """Parameter gathers and gradient reduction of a step; forward, backward: seconds of ONE micro-batch's."""
    assume = cluster.assume
    gather = sync.one_pass(cluster)
    gathers = forwards * hidden_behind(cluster, gather, forward, assume)
    gathers += micro * hidden_behind(cluster, gather, backward, assume)
    reduction, times = sync.reduction(cluster), sync.reductions(micro)
    room = max(0.0, assume.overlap * backward - cluster.seconds(gather))
    reduced = times * max(0.0, cluster.seconds(reduction) - room)
    update = cluster.seconds(sync.update(cluster))
    gradients = reduction * times + sync.update(cluster)
    return [
        Part(
            "parameter gathers",
            gathers,
            sent=gather.nbytes * (forwards + micro),
            alone=cluster.seconds(gather) * (forwards + micro),
        ),
        Part("gradient exchange", reduced + update, sent=gradients.nbytes, alone=cluster.seconds(gradients)),
    ]


def optimizer_part(rates: Rates, parameters: float) -> Part:
    """AdamW in fp32: weight and two moments read and written, the gradient read; a 16-bit copy written."""
    nbytes = (7 * 4 + 2) * parameters
    return Part("optimizer", rates.memory(nbytes), nbytes=nbytes)


def joint_memory(
    shape: ModelShape, cluster: Cluster, plan: Plan, load: Load, micro: int, kept: int
) -> dict[str, float]:
    """Bytes of one rank. Graphs: of the kept micro-batches. Head and contrast are not at work at the same time."""
    found = memory.states(shape, shape.trained(plan.trained_vision), plan.strategy, cluster.gpus)
    share = kept / micro
    graph = memory.text_graph(shape.text, load.tokens * share, checkpointing=plan.checkpointing)
    if plan.checkpointing:  # one layer of one micro-batch at a time is whole
        layer = memory.layer_graph(shape.text, 2) * load.tokens
        graph += layer / micro - layer * share
    found["graphs"] = graph + memory.merging_graph(shape.vision, load.patches * share)
    found["vision features"] = memory.features(shape.vision, load.patches * (1 - share))
    call = contrast_call(shape, plan)
    contrast = (memory.ring_contrast if rings(plan, call) else memory.contrast)(call, cluster.gpus)
    found["embeddings"] = 4.0 * 4 * plan.pairs / cluster.gpus * plan.modes * shape.text.hidden
    found["head or contrast"] = max(memory.head(shape.text, load.tokens / micro), contrast)
    return found
