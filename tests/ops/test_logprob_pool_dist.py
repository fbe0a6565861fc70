"""The log-prob operator over process groups (gloo): a head split by vocabulary, and a head sharded by FSDP2."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rime_fast.ops.logprob_pool import cpu, fused_linear_ce, fused_logprob_pool
from tests.ops.logprob_cases import Case, relative
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist


def _check_schedule(rank: int, world: int) -> None:
    """With the gradient made in the forward a rank makes its logits once, and sums dX over the group once."""
    made, summed = [], []
    logits, all_reduce = cpu.Blocks.logits, dist.all_reduce
    cpu.Blocks.logits = lambda blocks, x: made.append(1) or logits(blocks, x)
    dist.all_reduce = lambda tensor, *args, **more: summed.append(tensor.shape) or all_reduce(tensor, *args, **more)
    cpu.BLOCK_ROWS = 16
    case = Case(37, 16, 24 * world, scored="all", bias=False, pools=False)
    # One rank's columns are all banned: its share of every row is 0, not NaN.
    bias = torch.zeros(24)
    bias[:] = -torch.inf if rank == 1 else 0.0
    targets = case.tensors["targets"] % 24
    hidden = case.tensors["hidden"].requires_grad_()
    lm_head = case.tensors["lm_head"][24 * rank : 24 * (rank + 1)].clone().requires_grad_()
    options = {"bias": bias, "vocab_group": dist.group.WORLD, "entropy": True}
    loss, out = fused_linear_ce(hidden, lm_head, targets, **options)
    grads = torch.autograd.grad(loss, (hidden, lm_head))
    assert len(made) == 3
    assert sorted(summed) == sorted([(16,), (3, 16)] * 3 + [(37, 16)])
    whole = case.tensors["lm_head"].double().requires_grad_()
    x = hidden.detach().double().requires_grad_()
    z = (x @ whole.t())[:, [v for v in range(24 * world) if v // 24 != 1]]
    truth = nn.functional.cross_entropy(z, targets, reduction="sum")
    expected = torch.autograd.grad(truth, (x, whole))
    p = z.softmax(dim=1)
    assert relative(loss, truth.detach()) < 1e-5
    assert relative(out.entropy.detach(), -(p * p.log()).sum(dim=1).detach()) < 1e-5
    assert relative(grads[0], expected[0]) < 1e-5
    assert relative(grads[1], expected[1][24 * rank : 24 * (rank + 1)]) < 1e-5


def _vocabulary_worker(rank: int, world: int) -> None:
    """Each rank holds V/p columns; outputs and gradients must be those of the whole head."""
    for schedule, softcap in (("recompute", None), ("recompute", 5.0), ("forward", None)):
        case = Case(37, 16, 24 * world, softcap=softcap)
        truth = case.eager(torch.float64, schedule)
        mine = slice(24 * rank, 24 * (rank + 1))
        t, leaves = case.tensors, case.leaves()
        for name in ("lm_head", "bias"):
            leaves[name] = leaves[name].detach()[mine].clone().requires_grad_()
        options = case.options(leaves, vocab_group=dist.group.WORLD, entropy=True)
        args = leaves["hidden"], leaves["lm_head"], t["targets"]
        if schedule == "recompute":
            out = fused_logprob_pool(*args, **options)
            loss = -(out.logp * t["token_weight"]).sum() + (out.entropy * t["grad_entropy"]).sum()
        else:
            loss, out = fused_linear_ce(*args, token_weight=t["token_weight"], **options)
        found = case.collect(leaves, loss, out)
        for name in ("d_lm_head", "d_bias"):
            truth[name] = truth[name][mine]
        for name, value in found.items():
            assert relative(value, truth[name]) < 1e-5, (rank, schedule, name)
        assert (found["entropy"][t["targets"] == -100] == 0).all()
    if world == 2:
        _check_schedule(rank, world)


@pytest.mark.parametrize("world", [2, 4])
def test_head_split_by_vocabulary(world: int) -> None:
    run_ranks(_vocabulary_worker, world)


class _Head(nn.Linear):
    """The operator runs inside the head's own forward, where FSDP and ZeRO-3 have its weight whole."""

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, plain: bool) -> torch.Tensor:
        if plain:
            return nn.functional.cross_entropy(nn.functional.linear(hidden, self.weight), targets, reduction="sum")
        return fused_linear_ce(hidden, self.weight, targets)[0]


class _Scorer(nn.Module):
    """A model that scores its targets, by plain torch or by the operator."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.plain, self.body, self.lm_head = plain, nn.Linear(16, 16), _Head(16, 48, bias=False)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.lm_head(torch.tanh(self.body(x)), targets, self.plain)


class _Plain:
    """The model and batch of the sharded tests, and its gradients on one rank."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.x, self.targets = torch.randn(12, 16), torch.randint(0, 48, (12,))
        plain = _Scorer(plain=True)
        plain(self.x, self.targets).backward()
        self.truth = {name: p.grad for name, p in plain.named_parameters()}

    def step(self, model: nn.Module) -> Counter[str]:
        """Loss and backward; the c10d operations they took."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = model(self.x, self.targets)
            getattr(model, "backward", torch.Tensor.backward)(loss)
        names = [event.name for event in profile.events() if event.name.startswith("c10d::")]
        return Counter(name.removeprefix("c10d::") for name in names)

    def check(self, gradients: dict[str, torch.Tensor]) -> None:
        """Every rank saw the same rows, so the mean over ranks is the one rank's gradient."""
        assert gradients.keys() == self.truth.keys()
        for name, found in gradients.items():
            assert relative(found, self.truth[name]) < 1e-5, name


def _sharded_worker(rank: int, world: int) -> None:
    """One unit is the whole model: gathered once for the call, its gradients reduced and scattered once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case, model = _Plain(), _Scorer()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    case.step(model)
    model.zero_grad()
    counted = case.step(model)
    case.check({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    assert (counted["_allgather_base_"], counted["_reduce_scatter_base_"]) == (1, 1), counted
    _zero3(case)


def _zero3(case: _Plain) -> None:
    """DeepSpeed: as many gathers as the plain head needs, and one reduce-scatter."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_micro_batch_size_per_gpu": 12,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    counts = {}
    for plain in (True, False):
        model = _Scorer(plain)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=settings
        )
        case.step(engine)
        engine.step()
        counts[plain] = case.step(engine)
        case.check({n.removeprefix("module."): safe_get_full_grad(p) for n, p in engine.named_parameters()})
    assert counts[False] == counts[True], counts
    assert counts[False]["_reduce_scatter_base_"] == 1, counts


def test_head_sharded_by_fsdp2_and_zero3() -> None:
    pytest.importorskip("deepspeed")
    run_ranks(_sharded_worker, 2)
