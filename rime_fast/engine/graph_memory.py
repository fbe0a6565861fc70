"""How many bytes a forward keeps for its backward: what a budget for kept graphs is counted in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class GraphBytes:
    """Filled when the block of ``measured_graph`` ends."""

    value: int = 0


@contextmanager
def measured_graph(parameters: Iterable[Tensor]) -> Iterator[GraphBytes]:
    """Measure the memory that the block's graph holds, outputs included on CUDA.

    CUDA: the growth of the allocator's own count, which costs nothing. CPU: the storages saved for the backward, each
    counted once; those of ``parameters`` are not the graph's.
    """
    found = GraphBytes()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        yield found
        found.value = max(0, torch.cuda.memory_allocated() - before)
        return
    own = {_local(parameter).untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.value = sum(seen.values())


@torch.no_grad()
def _local(parameter: Tensor) -> Tensor:
    """A sharded parameter's own part (a DTensor has no storage itself)."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
