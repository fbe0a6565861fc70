"""One gradient synchronisation a step, over gloo ranks with different numbers of micro-batches.

The scenarios are in grad_sync_worker.py; a rank that waits in a collective for another one would
hit the time limit here.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn

from rime_fast.engine.wrappers import GradSync, grad_sync
from tests.engine.grad_sync_worker import run_scenarios
from tests.ranks import run_ranks

distributed = [
    pytest.mark.dist,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]


class TestRanks:
    pytestmark = distributed

    def test_ddp_and_fsdp2(self) -> None:
        run_ranks(run_scenarios, 2, "ddp", "fsdp2")

    def test_deepspeed(self) -> None:
        pytest.importorskip("deepspeed")
        run_ranks(run_scenarios, 2, "zero1", "zero2", "zero3")

    @pytest.mark.slow
    def test_four_ranks(self) -> None:
        run_ranks(run_scenarios, 4, "ddp", "ddp_many_pairs", "fsdp2")

    @pytest.mark.slow
    def test_four_ranks_deepspeed(self) -> None:
        pytest.importorskip("deepspeed")
        run_ranks(run_scenarios, 4, "zero1", "zero2", "zero3")


def test_a_plain_model_needs_no_synchronisation() -> None:
    sync = grad_sync(nn.Linear(2, 2))
    assert type(sync) is GradSync
    assert not sync.lockstep
    assert sync.agree(3, 1) == (3, 1)


def test_fsdp1_is_refused_by_name() -> None:
    wrapped = type("FullyShardedDataParallel", (nn.Linear,), {})(2, 2)
    with pytest.raises(TypeError, match="FSDP1"):
        grad_sync(wrapped)
