"""Of the processes a run is in: DeepSpeed's configuration and launcher, and word of a rank that failed."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from rime_fast.data.examples import example

# set by torchrun, deepspeed, accelerate; by MPI (DeepSpeed asks it then); by srun
_LAUNCHED = ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def deepspeed_config(wanted: Any) -> Any:
    """Find the configuration file of a path, or of the name of one of the package's ("zero2"); anything else as it is.

    Raises ValueError where DeepSpeed is missing, or there is no such file.
    """
    if find_spec("deepspeed") is None:
        raise ValueError("deepspeed is set, but DeepSpeed is not installed: pip install 'rime-fast[deepspeed]'")
    if not isinstance(wanted, str) or wanted.lstrip().startswith("{"):
        return wanted
    path = example(wanted if wanted.endswith(".json") else f"{wanted}.json")
    if not os.path.isfile(path):
        raise ValueError(f"deepspeed is {wanted!r}: no such file; expected one's path, or zero1, zero2 or zero3")
    return path


def start_alone() -> str:
    """Make this process a world of one where no launcher did, as DeepSpeed would ask MPI for one; what to tell of it,
    "" where there was a launcher."""
    if dist.is_initialized() or any(name in os.environ for name in _LAUNCHED):
        return ""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "deepspeed without a launcher: this process trains alone; torchrun --nproc_per_node=N uses N devices"


def tell_deepspeed() -> None:
    """Make the process group that is there known to DeepSpeed, whose ``zero.Init`` else takes a world of one where a
    model is loaded before the trainer begins."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist.get_backend(), verbose=False)


def other_accelerator() -> bool:
    """Whether there is a device to train on that is not CUDA's."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is not None and accelerator.type not in ("cpu", "mps")


def shard_checkpoints(plugin: dict[str, Any] | None, pushed: str | None) -> None:
    """Have each rank write its own shards of a checkpoint, by accelerate's FSDP settings ``plugin``. Raises ValueError
    where they are not FSDP2's, or checkpoints are ``pushed`` before they are whole."""
    if plugin is None or plugin["fsdp_version"] != 2:
        raise ValueError(
            "async_save is True, but FSDP2 does not shard this model: without shards every rank would write all of it, "
            "and DeepSpeed writes its own. Expected fsdp=True (version 2), or async_save=False"
        )
    if pushed not in (None, "end"):
        raise ValueError(f"hub_strategy is {pushed!r}; expected 'end' with async_save")
    plugin["state_dict_type"] = "SHARDED_STATE_DICT"


# --- a rank that fails -----------------------------------------------------------------------------------------------

_FAILED = "rime_fast/failed"
_OTHERS_FAULT = re.compile("gloo|nccl|connection|timed out|peer|socket", re.IGNORECASE)


def pass_on(error: Exception, rank: int, place: str) -> None:
    """Raise what another rank failed with first, where ``error`` is but a collective that broke off; else leave word of
    it for the others."""
    if first := told_by_ranks(error):
        raise RuntimeError(first) from error
    tell_ranks(rank, f"{type(error).__name__} in {place}: {error}")


def tell_ranks(rank: int, text: str) -> None:
    """Leave word for the other ranks of why this one fails; the first word stays."""
    with suppress(Exception):  # the store may have gone with another rank
        _store().compare_set(_FAILED, "", f"rank {rank} failed first: {text}")


def told_by_ranks(error: BaseException) -> str:
    """What the rank that failed first left word of, where ``error`` is but a collective that broke off; else ""."""
    if isinstance(error, RuntimeError) and _OTHERS_FAULT.search(str(error)):
        with suppress(Exception):
            if _store().check([_FAILED]):
                return _store().get(_FAILED).decode()
    return ""


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
