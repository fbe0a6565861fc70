"""Bytes that leave one rank, and the seconds they take over NVLink inside a node and InfiniBand between nodes.

Bytes are those of ring algorithms, which every rank sends (and receives) at the least: all-gather and reduce-scatter of
S bytes (p - 1)/p S, all-reduce twice that. Between nodes the collectives are hierarchical: GPU j of every node
exchanges over its own InfiniBand port with the GPUs j of the other nodes, the rest travels over NVLink.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.hardware import Assumptions, Hardware
from rime_fast.ops.contrastive.agreement import FIELDS


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a step. nbytes: in all; nvlink, nic: over each. collectives: how many, for latency."""

    nbytes: float = 0.0
    nvlink: float = 0.0
    nic: float = 0.0
    collectives: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.nbytes + other.nbytes,
            self.nvlink + other.nvlink,
            self.nic + other.nic,
            self.collectives + other.collectives,
        )

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.nbytes * times, self.nvlink * times, self.nic * times, self.collectives * times)


@dataclass(frozen=True)
class Cluster:
    """``gpus`` ranks on nodes of ``hardware``. Raises ValueError for a number that does not fill its nodes."""

    gpus: int
    hardware: Hardware
    assume: Assumptions

    def __post_init__(self) -> None:
        if self.gpus < 1 or (self.gpus > self.local and self.gpus % self.local):
            raise ValueError(f"gpus is {self.gpus}; expected at most {self.local}, or a multiple of it (whole nodes)")

    @property
    def local(self) -> int:
        """GPUs of a full node."""
        return self.hardware.gpus_per_node

    @property
    def nodes(self) -> int:
        return max(1, self.gpus // self.local)

    def gather(self, total: float, collectives: float = 1) -> Traffic:
        """All-gather (or reduce-scatter) whose whole result (or input) is ``total`` bytes, in ``collectives`` calls."""
        p = self.gpus
        if p == 1:
            return Traffic()
        inside = min(p, self.local)
        nic = (self.nodes - 1) / p * total
        return Traffic((p - 1) / p * total, (inside - 1) / inside * total, nic, collectives)

    def reduce(self, total: float, collectives: float = 1) -> Traffic:
        """All-reduce of ``total`` bytes: a reduce-scatter and an all-gather."""
        return self.gather(total, 0) * 2 + Traffic(collectives=collectives if self.gpus > 1 else 0)

    def pass_on(self, block: float, steps: int, messages: float = 1) -> Traffic:
        """A ring in rank order: ``steps`` times ``block`` bytes to the right neighbour.

        All ranks move together, so every step takes as long as the slowest link: InfiniBand once there are two nodes.
        """
        sent = block * steps
        across = self.nodes > 1
        return Traffic(sent, 0.0 if across else sent, sent if across else 0.0, steps * messages)

    def seconds(self, traffic: Traffic) -> float:
        """Of the traffic alone, nothing hidden. NVLink and InfiniBand phases of a collective follow each other."""
        hardware, assume = self.hardware, self.assume
        wire = (traffic.nvlink / hardware.nvlink + traffic.nic / hardware.nic) / assume.network
        latency = assume.collective_s + assume.hop_s * (self.nodes - 1)
        return wire + traffic.collectives * latency


@dataclass(frozen=True)
class Contrast:
    """The grouped contrastive call (ops/contrastive/distributed.py) of one rank.

    queries, keys: of ALL ranks, evenly spread. width: of one mode's embedding; modes: of the keys. terms: pairs of
    modes. element: bytes of an embedding's element as it is handed in. ids: whether key_ids are given.
    """

    queries: float
    keys: float
    width: int
    modes: int = 2
    terms: int = 4
    element: int = 4
    symmetric: bool = True
    ids: bool = True

    @property
    def key_bytes(self) -> float:
        """All keys as they travel."""
        return self.keys * self.width * self.modes * self.element

    @property
    def gradient_bytes(self) -> float:
        """The gradient of all keys, fp32."""
        return self.keys * self.width * self.modes * 4

    def small(self, cluster: Cluster) -> Traffic:
        """What does not grow with the width: the handshake, ids, column softmaxes (fp64), totals."""
        records = cluster.gather(8 * len(FIELDS) * cluster.gpus)
        ids = cluster.gather(8 * self.keys) if self.ids else Traffic()
        columns = Traffic()
        if self.symmetric:
            columns = cluster.reduce(8 * 2 * self.terms * self.keys) + cluster.reduce(
                8 * (2 * self.terms + 1) * self.keys
            )
        return records + ids + columns + cluster.reduce(8 * 2 * self.terms)

    def gathered(self, cluster: Cluster) -> Traffic:
        """All-gather of the keys, reduce-scatter of their gradients."""
        return self.small(cluster) + cluster.gather(self.key_bytes) + cluster.gather(self.gradient_bytes)

    def ringed(self, cluster: Cluster) -> Traffic:
        """Keys go round twice (forward, backward: p - 1 steps each), their gradients once (p steps: home as well)."""
        p = cluster.gpus
        if p == 1:
            return self.small(cluster)
        keys = cluster.pass_on(self.key_bytes / p, 2 * (p - 1))
        return self.small(cluster) + keys + cluster.pass_on(self.gradient_bytes / p, p)


STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Sync:
    """Gradients and parameters that travel in one step of a strategy (engine/wrappers.py).

    parameters: all; trained: those with a gradient. units: what FSDP2 or ZeRO-3 gathers one after the other.
    wire: bytes of a parameter as gathered; gradient: bytes of a gradient element as reduced.
    """

    strategy: str
    parameters: float
    trained: float
    units: int = 1
    wire: int = 2
    gradient: int = 4

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}; expected one of {', '.join(STRATEGIES)}")

    @property
    def gathers(self) -> bool:
        """Whether every forward and every backward gathers the parameters."""
        return self.strategy in ("fsdp2", "zero3")

    def one_pass(self, cluster: Cluster) -> Traffic:
        """Parameters gathered by one forward, or by one backward."""
        return cluster.gather(self.wire * self.parameters, self.units) if self.gathers else Traffic()

    def reduction(self, cluster: Cluster) -> Traffic:
        """Gradients, every time they are reduced."""
        size = self.gradient * self.trained
        if self.strategy in ("fsdp2", "zero3"):
            return cluster.gather(size, self.units)
        return cluster.reduce(size, self.units)  # ZeRO-2 too: DeepSpeed all-reduces a bucket and keeps its part

    def reductions(self, backwards: int) -> int:
        """How often: once a step, but with every backward where a rank holds no whole gradient."""
        return backwards if self.strategy in ("zero2", "zero3") else 1

    def update(self, cluster: Cluster) -> Traffic:
        """Updated parameters after the optimizer's step, where ranks update a part each but hold all."""
        return cluster.gather(self.wire * self.trained, 1) if self.strategy in ("zero1", "zero2") else Traffic()

    def step(self, cluster: Cluster, forwards: int, backwards: int) -> Traffic:
        """All of a step of so many forwards and backwards."""
        passes = self.one_pass(cluster) * (forwards + backwards)
        return passes + self.reduction(cluster) * self.reductions(backwards) + self.update(cluster)
