"""Runs a function on several gloo ranks, each a process of its own.

No rank tears its process group down: gloo's threads abort a rank whose peer left first, now and then. Each rank says
that it is done by a file and waits; the parent ends them all once every one is done.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 500.0  # seconds; below pytest's own limit, so that a hang is reported with the ranks that hang


def _rank_main(rank: int, worker: Callable[..., None], world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # accelerate asks for them; the group is there
    limit = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    worker(rank, world, *args)
    dist.barrier()
    Path(folder, f"done{rank}").touch()
    time.sleep(2 * LIMIT)


def run_ranks(worker: Callable[..., None], world: int, *args: Any, limit: float = LIMIT) -> None:
    """Call ``worker(rank, world, *args)`` on ``world`` processes with a gloo group, and wait until all returned.

    ``worker`` is a module's function and ``args`` can be pickled. Raises what the first failing rank raised (with its
    traceback), or TimeoutError naming the ranks that were still at work after ``limit`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            _rank_main, (worker, world, folder, args), world, join=False, daemon=True, start_method="spawn"
        )
        try:
            end = time.monotonic() + limit
            while waiting := [rank for rank in range(world) if not Path(folder, f"done{rank}").exists()]:
                if time.monotonic() > end:
                    raise TimeoutError(f"ranks {waiting} of {world} are still at work after {limit:.0f} s")
                ranks.join(timeout=0.05)
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
