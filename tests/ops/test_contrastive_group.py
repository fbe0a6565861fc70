"""Operator B over a process group: equal to one process, and the same named error on every rank.

Each rank is a process of its own running contrastive_worker.py; a rank that waits in a collective for another one that
raised would hit the time limit here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

WORKER = Path(__file__).with_name("contrastive_worker.py")

no_distributed = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
pytestmark = [pytest.mark.dist, no_distributed]


def run_ranks(world: int, folder: Path, *scenarios: str) -> None:
    """All ranks finish within the limit, without an error."""
    command = [sys.executable, str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder / "store"), *scenarios],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=500)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, "equality", "default_labels", "ddp_scaling", "partly_frozen", "errors")


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    run_ranks(4, tmp_path, "equality", "default_labels", "ddp_scaling", "partly_frozen", "errors")


def test_three_ranks_agree_on_errors(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, "errors", "partly_frozen")
