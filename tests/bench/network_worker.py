"""What each rank of the network tests does: run a step, count the bytes it sends, compare with the scale model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scale.hardware import H100, Assumptions
from benchmarks.scale.network import Cluster, Contrast, Sync
from rime_fast.engine.grad_cache import Encoded, GradCache
from rime_fast.engine.wrappers import FSDPSync, grad_sync
from rime_fast.ops.contrastive import contrastive_loss
from rime_fast.ops.contrastive.agreement import GATHER_LIMIT

TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]


class Sent(TorchDispatchMode):
    """Counts the bytes a rank sends in its collectives, a ring's for each (benchmarks/scale/network.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.calls = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and (share := self.share(name)) is not None:
            self.calls += 1
            tensors = _tensors(args) if share[1] == "sum" else [max(_tensors(args), key=_size)]
            self.nbytes += share[0] * sum(map(_size, tensors))
        return out

    @staticmethod
    def share(name: str) -> tuple[float, str] | None:
        """(bytes sent per byte of the whole tensor, whether the operands add up or the largest one is the whole)."""
        p = dist.get_world_size()
        operation = name.split("::")[1].split(".")[0].strip("_")
        if operation.startswith("allreduce"):
            return 2 * (p - 1) / p, "sum"
        if operation.startswith(("allgather", "reduce_scatter", "all_gather", "broadcast")):
            # a broadcast's chain has one link less than ranks: the average of a rank
            return (p - 1) / p, "largest"
        if operation == "send":
            return 1.0, "sum"
        return None if operation in ("recv", "barrier", "wait_tensor") else _unknown(name)


def _unknown(name: str) -> None:
    raise AssertionError(f"{name} is not in the count")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for one in value for t in _tensors(one)] if isinstance(value, (list, tuple)) else []


def sent(call: Callable[[], Any]) -> float:
    with Sent() as counter:
        call()
    return counter.nbytes


def cluster() -> Cluster:
    return Cluster(dist.get_world_size(), H100, Assumptions())


def close(found: float, want: float, within: float = 1e-9) -> None:
    assert abs(found - want) <= within * want, f"sent {found:.0f} bytes, the model says {want:.0f}"


def contrast() -> None:
    """Gathered and ringed, with and without ids, one direction, 2- and 4-byte embeddings, untrained keys."""
    world = dist.get_world_size()
    n, keys, width = 6, 8, 24

    def call(dtype: torch.dtype, ids: bool, symmetric: bool, trained: bool = True) -> None:
        queries = {m: torch.randn(n, width, dtype=dtype, requires_grad=True) for m in ("disc", "gen")}
        targets = {m: torch.randn(keys, width, dtype=dtype, requires_grad=trained) for m in ("disc", "gen")}
        given = {"query_ids": torch.arange(n), "key_ids": torch.arange(keys)} if ids else {}
        contrastive_loss(
            queries, targets, terms=TERMS, temperature=0.1, symmetric=symmetric, group=dist.group.WORLD, **given
        ).loss.backward()

    for limit in ("8192", "0"):
        os.environ[GATHER_LIMIT] = limit
        for dtype, ids, symmetric in ((torch.float32, True, True), (torch.bfloat16, False, False)):
            found = sent(lambda d=dtype, i=ids, s=symmetric: call(d, i, s))
            model = Contrast(n * world, keys * world, width, element=dtype.itemsize, symmetric=symmetric, ids=ids)
            close(found, (model.gathered if limit != "0" else model.ringed)(cluster()).nbytes)
    os.environ.pop(GATHER_LIMIT)


class Net(nn.Module):
    """Three layers; the first can be frozen, as the vision trunk is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 40), nn.Linear(40, 40), nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


def step(model: nn.Module, sync: Any, parts: int, keep: float) -> Any:
    """A gradient-cached step of ``parts`` micro-batches without a loss that travels itself."""
    cache = GradCache(
        lambda x, scored: Encoded({"rows": model(x)}),
        lambda rows: rows["rows"].square().mean(),
        sync=sync,
        keep_bytes=keep,
    )
    return cache.step(list(torch.randn(4 * parts, 16).split(4)))


def _counts(model: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)


def ddp() -> None:
    """One all-reduce of the trained gradients a step, however many micro-batches."""
    net = Net()
    net.first.requires_grad_(False)
    total, trained = _counts(net)
    model = DistributedDataParallel(net)
    sync = grad_sync(model)
    for _ in range(2):  # the first steps settle DDP's buckets
        step(model, sync, 2, 0.0)
    for parts in (1, 3):
        model.zero_grad()
        want = Sync("ddp", total, trained).step(cluster(), 2 * parts - 1, parts).nbytes
        close(sent(lambda n=parts: step(model, sync, n, 0.0)), want)


def fsdp2() -> None:
    """Parameters gathered by every forward and backward, gradients reduced once.

    The model leaves out one gather of one unit a step: after forwards without a graph, FSDP2's record of forwards is
    longer than that of graphs, and the first backward's prefetch asks for the last unit once in vain.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = Net()
    total, trained = _counts(net)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net.first, net.second, net.third):
        fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)
    sync = grad_sync(net)
    assert isinstance(sync, FSDPSync)
    world = dist.get_world_size()
    agreement = 2 * (world - 1) / world * 16
    in_vain = (world - 1) / world * 4 * (41 * 8)
    for parts, keep in ((1, 0.0), (3, 0.0), (3, float("inf"))):
        forwards = parts if keep else 2 * parts - 1
        net.zero_grad()
        want = Sync("fsdp2", total, trained, wire=4).step(cluster(), forwards, parts).nbytes
        want += agreement + in_vain * (forwards > parts)
        close(sent(lambda n=parts, k=keep: step(net, sync, n, k)), want)


def zero(stage: int) -> None:
    """DeepSpeed in fp32: every element of gradient, parameter and their exchange has four bytes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    net = Net()
    total, trained = _counts(net)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), config=settings)
    sync = grad_sync(engine)
    world = dist.get_world_size()
    agreement = 2 * (world - 1) / world * 16 if stage > 1 else 0.0
    for parts in (2, 3):

        def whole(n: int = parts) -> None:
            step(engine, sync, n, 0.0)
            engine.step()

        whole()
        want = Sync(f"zero{stage}", total, trained, wire=4).step(cluster(), 2 * parts - 1, parts).nbytes
        # beside these: a flag or two, and what ZeRO-3 prefetches in vain until it knows the order of a step
        close(sent(whole) - agreement, want, 0.005)


SCENARIOS: dict[str, Callable[[], None]] = {
    "contrast": contrast,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "zero1": lambda: zero(1),
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
}


def run_scenarios(rank: int, world: int, *names: str) -> None:
    torch.manual_seed(rank)
    for name in names:
        SCENARIOS[name]()
