"""Network bytes of the scale model against bytes counted on gloo ranks, and its arithmetic of links."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from benchmarks.scale.hardware import H100, Assumptions
from benchmarks.scale.network import Cluster, Contrast, Sync
from tests.bench.network_worker import run_scenarios
from tests.ranks import run_ranks

PLAIN = Assumptions(network=1.0, collective_s=0.0, hop_s=0.0)
distributed = [
    pytest.mark.dist,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]


class TestCountedBytes:
    pytestmark = distributed

    def test_two_ranks(self) -> None:
        run_ranks(run_scenarios, 2, "contrast", "ddp", "fsdp2")

    @pytest.mark.slow
    def test_four_ranks(self) -> None:
        run_ranks(run_scenarios, 4, "contrast", "ddp", "fsdp2")

    @pytest.mark.slow
    def test_deepspeed(self) -> None:
        pytest.importorskip("deepspeed")
        run_ranks(run_scenarios, 2, "zero1", "zero2", "zero3")


def test_a_collective_is_never_faster_than_its_slowest_link() -> None:
    gpus = Cluster(64, H100, PLAIN)
    traffic = gpus.gather(8e9)
    assert traffic.nbytes == pytest.approx(8e9 * 63 / 64)
    # a node's eight ports together carry what the node lacks
    assert traffic.nic * 8 == pytest.approx(8e9 * 7 / 8)
    assert gpus.seconds(traffic) == pytest.approx(traffic.nic / 50e9 + traffic.nvlink / 450e9)
    assert gpus.seconds(traffic) > 8e9 * 7 / 8 / 400e9


def test_one_node_does_not_touch_infiniband() -> None:
    node = Cluster(8, H100, PLAIN)
    assert node.gather(1e9).nic == 0
    assert node.pass_on(1e9, 7).nic == 0
    assert Cluster(1, H100, PLAIN).gather(1e9).nbytes == 0
    assert Cluster(1, H100, PLAIN).reduce(1e9).collectives == 0


def test_latency_counts_collectives_and_hops() -> None:
    assume = Assumptions(collective_s=2.0, hop_s=1.0)
    gpus = Cluster(32, H100, assume)
    assert gpus.seconds(gpus.gather(0.0, collectives=5)) == pytest.approx(5 * (2.0 + 3.0))
    assert gpus.seconds(gpus.reduce(0.0)) == pytest.approx(5.0)


@pytest.mark.parametrize("gpus", [0, 12, 65])
def test_half_nodes_are_refused(gpus: int) -> None:
    with pytest.raises(ValueError, match=f"gpus is {gpus}"):
        Cluster(gpus, H100, PLAIN)


@pytest.mark.parametrize(
    ("strategy", "times"),
    [
        # all-gathers of a parameter's 2 bytes; reduce-scatters of a gradient's 4; in units of (p - 1)/p, three
        # micro-batches encoded twice but for the last: 5 forwards, 3 backwards
        ("ddp", 2 * 4 * 1),
        ("fsdp2", 8 * 2 + 4),
        ("zero1", 2 * 4 * 1 + 2),
        ("zero2", 2 * 4 * 3 + 2),
        ("zero3", 8 * 2 + 3 * 4),
    ],
)
def test_bytes_of_a_step_by_hand(strategy: str, times: float) -> None:
    gpus = Cluster(16, H100, PLAIN)
    assert Sync(strategy, 1000, 1000).step(gpus, 5, 3).nbytes == pytest.approx(1000 * times * 15 / 16)


def test_a_frozen_trunk_is_gathered_but_not_reduced() -> None:
    gpus = Cluster(8, H100, PLAIN)
    part, whole = Sync("fsdp2", 1000, 600), Sync("fsdp2", 1000, 1000)
    assert part.one_pass(gpus) == whole.one_pass(gpus)
    assert part.reduction(gpus).nbytes == pytest.approx(0.6 * whole.reduction(gpus).nbytes)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy is 'fsdp'"):
        Sync("fsdp", 1, 1)


def test_a_ring_sends_more_but_holds_less() -> None:
    gpus = Cluster(64, H100, PLAIN)
    call = Contrast(2**20, 2**20, 1536)
    assert call.ringed(gpus).nbytes > call.gathered(gpus).nbytes
    assert call.gathered(gpus).nbytes > (call.key_bytes + call.gradient_bytes) * 63 / 64
