"""One gradient synchronisation a step, over gloo ranks with different numbers of micro-batches.

Each rank is a process of its own running grad_sync_worker.py; a rank that waits in a collective for another one would
hit the time limit here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from rime_fast.engine.grad_sync import GradSync, grad_sync

WORKER = Path(__file__).with_name("grad_sync_worker.py")


def run_ranks(world: int, folder: Path, *scenarios: str) -> None:
    """All ranks finish within the limit, without an error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder / "store"), *scenarios],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=900)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output


distributed = [
    pytest.mark.dist,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]


class TestRanks:
    pytestmark = distributed

    def test_ddp_and_fsdp2(self, tmp_path: Path) -> None:
        run_ranks(2, tmp_path, "ddp", "fsdp2")

    @pytest.mark.slow
    def test_deepspeed(self, tmp_path: Path) -> None:
        pytest.importorskip("deepspeed")
        run_ranks(2, tmp_path, "zero1", "zero2", "zero3")

    @pytest.mark.slow
    def test_four_ranks(self, tmp_path: Path) -> None:
        run_ranks(4, tmp_path, "ddp", "ddp_many_pairs", "fsdp2")

    @pytest.mark.slow
    def test_four_ranks_deepspeed(self, tmp_path: Path) -> None:
        pytest.importorskip("deepspeed")
        run_ranks(4, tmp_path, "zero1", "zero2", "zero3")


def test_a_plain_model_needs_no_synchronisation() -> None:
    sync = grad_sync(nn.Linear(2, 2))
    assert type(sync) is GradSync
    assert not sync.lockstep
    assert sync.agree(3, 1) == (3, 1)


def test_fsdp1_is_refused_by_name() -> None:
    wrapped = type("FullyShardedDataParallel", (nn.Linear,), {})(2, 2)
    with pytest.raises(TypeError, match="FSDP1"):
        grad_sync(wrapped)
