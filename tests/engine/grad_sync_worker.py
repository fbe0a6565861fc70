"""What each rank of the gradient synchronisation tests does; run by test_grad_sync.py."""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rime_fast.engine.grad_cache import CachedStep, Encoded, GradCache
from rime_fast.engine.wrappers import FSDPSync, GradSync, grad_sync
from rime_fast.ops.contrastive import contrastive_loss

TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]
# Pairs of each rank: unequal, so that ranks have different numbers of micro-batches.
PAIRS = {1: [12], 2: [5, 9], 4: [4, 9, 2, 6]}


class Tower(nn.Module):
    """Two layers, two read-outs, a token loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 32)
        self.disc, self.gen, self.words = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.second(self.first(x).tanh()).tanh()
        unit = nn.functional.normalize
        loss = self.words(hidden).log_softmax(-1)[:, 0].neg().sum()
        return {"disc": unit(self.disc(hidden), dim=-1), "gen": unit(self.gen(hidden), dim=-1), "loss": loss}


def contrast(rows: dict[str, Tensor], group: object = None) -> Tensor:
    n = rows["disc"].shape[0] // 2
    queries, keys = ({m: x[part] for m, x in rows.items()} for part in (slice(n), slice(n, None)))
    backend = "reference" if rows["disc"].dtype == torch.float64 else "auto"
    return contrastive_loss(queries, keys, terms=TERMS, temperature=0.1, group=group, backend=backend).loss


class Case:
    """The global batch, this rank's share, and the gradients of one process that holds everything."""

    def __init__(self, dtype: torch.dtype = torch.float64, pairs: list[int] | None = None) -> None:
        torch.manual_seed(1)
        self.pairs = pairs or PAIRS[dist.get_world_size()]
        self.model = Tower().to(dtype)
        n = sum(self.pairs)
        whole = torch.randn(2, n, 12, dtype=dtype)
        self.own = torch.cat(list(whole.split(self.pairs, dim=1)[dist.get_rank()]))
        truth = copy.deepcopy(self.model).double()
        out = truth(whole.reshape(2 * n, 12).double())
        loss = out.pop("loss") + contrast(out)
        loss.backward()
        self.loss = float(loss.detach())
        self.truth = {name: p.grad for name, p in truth.named_parameters()}

    def step(self, model: nn.Module, sync: GradSync, size: int = 3, keep: float = 0.0, steps: int = 1) -> CachedStep:
        """``steps`` accumulated batches, each this rank's share."""
        world = dist.get_world_size()

        def encode(x: Tensor, scored: bool) -> Encoded:
            rows = model(x)
            loss = rows.pop("loss")
            return Encoded(rows, loss * world if scored else None)

        def loss(rows: dict[str, Tensor]) -> Tensor:
            """The value of the global loss, the gradient times the ranks, because ranks average gradients."""
            value = contrast(rows, dist.group.WORLD)
            return value * world - value.detach() * (world - 1)

        cache = GradCache(encode, loss, sync=sync, keep_bytes=keep)
        cache.bytes_per_cost = 1.0
        for turn in range(steps):
            done = cache.step(self.own.split(size), scale=1 / steps, synchronise=turn == steps - 1)
        return done

    def check(self, gradients: dict[str, Tensor], bound: float = 1e-10) -> None:
        assert gradients.keys() == self.truth.keys()
        for name, want in self.truth.items():
            error = float((gradients[name].double() - want).norm() / want.norm())
            assert error <= bound, f"{name}: {error:.1e}"


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        found[name.removeprefix("module.")] = gradient
    return found


def collectives(call: Callable[[], object]) -> Counter[str]:
    """c10d operations of this process while ``call`` runs, those of DDP's C++ reducer included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))


def contrast_collectives(case: Case) -> Counter[str]:
    """Those of the contrastive loss and its backward alone."""

    def call() -> None:
        rows = {m: torch.randn(len(case.own), 16, dtype=case.own.dtype, requires_grad=True) for m in ("disc", "gen")}
        contrast(rows, dist.group.WORLD).backward()

    return collectives(call)


REDUCED: Counter[str] = Counter()


def count_elements() -> None:
    """From here on ``REDUCED["elements"]`` counts the floats handed to torch.distributed's reducing collectives.

    DeepSpeed takes hold of these functions when it is initialised: call this before, once.
    """
    if "on" in REDUCED:
        return
    REDUCED["on"] = 1

    def counted(stock: Callable[..., Any], place: int, keyword: str, *args: Any, **options: Any) -> Any:
        tensor = args[place] if len(args) > place else options[keyword]
        REDUCED["elements"] += tensor.numel() * tensor.is_floating_point()
        return stock(*args, **options)

    for name, place, keyword in (("all_reduce", 0, "tensor"), ("reduce_scatter_tensor", 1, "input")):
        setattr(dist, name, partial(counted, getattr(dist, name), place, keyword))


def ddp() -> None:
    """Every budget, unequal micro-batch counts, accumulation, unused parameters; and one reduction a step."""
    case = Case()
    for find_unused in (False, True):
        model = DistributedDataParallel(copy.deepcopy(case.model), find_unused_parameters=find_unused)
        sync = grad_sync(model)
        for keep, steps in ((0, 1), (3, 1), (math.inf, 1), (0, 2), (math.inf, 2)):
            done = case.step(model, sync, keep=keep, steps=steps)
            case.check(full_gradients(model))
            total = done.loss / dist.get_world_size()
            dist.all_reduce(total)
            assert steps > 1 or abs(float(total) - case.loss) < 1e-10 * case.loss, (total, case.loss)
            model.zero_grad()
        expected = contrast_collectives(case)
        for size, keep in ((100, 0), (4, 0), (1, 0), (1, math.inf)):
            counted = collectives(partial(case.step, model, sync, size=size, keep=keep))
            counted.subtract(expected)
            # the gradients; with find_unused_parameters also DDP's map of parameters somebody used
            assert +counted == Counter({"c10d::allreduce_": 1 + find_unused}), (size, keep, counted)
            model.zero_grad()


def ddp_many_pairs() -> None:
    """1,024 pairs over the ranks: the loss and gradients of one rank."""
    world = dist.get_world_size()
    pairs = [1024 // world + (20 if r % 2 else -20) for r in range(world)]
    case = Case(pairs=pairs)
    model = DistributedDataParallel(copy.deepcopy(case.model))
    done = case.step(model, grad_sync(model), size=64)
    total = done.loss / world
    dist.all_reduce(total)
    assert abs(float(total) - case.loss) < 1e-10 * case.loss
    case.check(full_gradients(model))


def fsdp2() -> None:
    """Gradients sharded; one reduce-scatter a unit and step, or with every micro-batch where asked."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = Case()
    model = copy.deepcopy(case.model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.first, model.second):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sync = grad_sync(model)
    assert isinstance(sync, FSDPSync)
    for keep, steps in ((0, 1), (3, 1), (math.inf, 1), (0, 2)):
        case.step(model, sync, keep=keep, steps=steps)
        case.check(full_gradients(model))
        model.zero_grad()
    reductions = {}
    alone = contrast_collectives(case)
    sizes = (100, 5)
    for every in (False, True):
        for size in sizes:
            sync.every = every
            counted = collectives(partial(case.step, model, sync, size=size))
            counted.subtract(alone)
            reductions[every, size] = counted["c10d::_reduce_scatter_base_"]
            case.check(full_gradients(model))
            model.zero_grad()
    micro = {size: max(math.ceil(2 * n / size) for n in case.pairs) for size in sizes}
    assert reductions == {(every, size): 3 * (micro[size] if every else 1) for every, size in reductions}, reductions


def zero(stage: int) -> None:
    """DeepSpeed: equal gradients for every budget, and how often each stage reduces them."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    count_elements()
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    case = Case(torch.float32)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    model = copy.deepcopy(case.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    sync = grad_sync(engine)
    sent, volume = {}, {}
    alone = contrast_collectives(case)
    before = REDUCED["elements"]
    contrast_collectives(case)
    contrast_elements = REDUCED["elements"] - before
    for size, keep in ((5, 0.0), (5, 5.0), (5, math.inf), (100, 0.0)):
        before = REDUCED["elements"]
        counted = collectives(partial(case.step, engine, sync, size=size, keep=keep))
        counted.subtract(alone)
        sent[size, keep], volume[size, keep] = +counted, REDUCED["elements"] - before
        found = {name.removeprefix("module."): safe_get_full_grad(p) for name, p in engine.named_parameters()}
        case.check(found, 1e-5)
        engine.step()
    micro = {size: max(math.ceil(2 * n / size) for n in case.pairs) for size in (5, 100)}
    for (size, keep), counted in sent.items():
        # stage 1 reduces at the boundary; 2 and 3 with every micro-batch, and agree on their number (one all-reduce)
        reduced = {1: ("allreduce_", 1), 2: ("allreduce_", micro[size] + 1), 3: ("_reduce_scatter_base_", micro[size])}
        name, want = reduced[stage]
        assert counted[f"c10d::{name}"] == want, (size, keep, counted)
        # each carries every gradient once (padded to the ranks): 4 bytes a parameter in fp32
        parameters = sum(p.numel() for p in case.model.parameters())
        reduced = volume[size, keep] - contrast_elements
        times = micro[size] if stage > 1 else 1
        assert times * parameters <= reduced <= times * (parameters + 64), (stage, size, keep, reduced, parameters)


SCENARIOS: dict[str, Callable[[], None]] = {
    "ddp": ddp,
    "ddp_many_pairs": ddp_many_pairs,
    "fsdp2": fsdp2,
    "zero1": lambda: zero(1),
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
}


def run_scenarios(rank: int, world: int, *names: str) -> None:
    for name in names:
        SCENARIOS[name]()
