"""What each rank of the rollout-phase tests does; run by test_gathered.py."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rime_fast.engine.rollout import generate_rollouts
from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.engine.wrappers import dual_mode_of, whole_parameters
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import tiny_model
from rime_fast.model.tiny_batch import tiny_batch

VOCAB = 96
PROMPTS = [[[3, ("image", 4, 6), 9], [12]], [[2, ("image", 4, 4), 5]]]  # of each rank
STEPS = [3, 11]


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def collectives(call: Callable[[], object]) -> Counter[str]:
    """c10d operations that ``call`` asks for."""
    with _Counted() as counted:
        call()
    return counted.calls


def starting_model() -> Any:
    return DualModeModel.from_model(tiny_model("qwen2_vl", vocab_size=VOCAB, seed=0, init_std=0.15)).eval()


def decode(model: nn.Module, rank: int, steps: int) -> RolloutBuffer:
    batch = tiny_batch(dual_mode_of(model).config, PROMPTS[rank], seed=rank)
    return generate_rollouts(
        model, batch, gen_id=VOCAB, max_new_tokens=steps, group_size=2, temperature=0.0, stop_ids=[]
    )


def check(
    model: nn.Module, is_whole: Callable[[], bool], gathers: int | None, name: str, dtype: torch.dtype = torch.float32
) -> None:
    """Two phases of different lengths: the same collectives to enter, none inside, the tokens of the whole model."""
    rank, plain = dist.get_rank(), starting_model()
    for parameter in plain.parameters():  # not the buffers, as in FSDP2
        parameter.data = parameter.data.to(dtype)
    entered = []
    for steps in (STEPS[rank], 2 * STEPS[rank]):
        assert not is_whole()
        phase = whole_parameters(model)
        entered.append(collectives(phase.__enter__))
        assert is_whole()
        found: list[RolloutBuffer] = []
        inside = collectives(lambda found=found, steps=steps: found.append(decode(model, rank, steps)))  # type: ignore[misc]
        with whole_parameters(model):  # nothing more to gather
            pass
        left = collectives(lambda phase=phase: phase.__exit__(None, None, None))  # type: ignore[misc]
        assert not inside, (name, inside)
        assert not left, (name, left)
        expected = decode(plain, rank, steps)
        assert torch.equal(found[0].tokens, expected.tokens), name
        torch.testing.assert_close(found[0].gen_states, expected.gen_states)
    assert not is_whole()
    assert entered[0] == entered[1], (name, entered)
    total = sum(count for call, count in entered[0].items() if "gather" in call or "broadcast" in call)
    assert total >= 1 if gathers is None else total == gathers, (name, entered)


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return -model(**batch).logp.mean()


def true_gradients() -> dict[str, Tensor]:
    """Of the mean of the ranks' losses."""
    model = starting_model()
    for rank in range(2):
        (loss(model, tiny_batch(model.config, PROMPTS[rank], seed=rank)) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check_gradients(found: dict[str, Tensor], name: str) -> None:
    for key, want in true_gradients().items():
        if want is not None:
            error = float((found[key] - want).norm() / want.norm().clamp(min=1e-3))
            assert error < 1e-4, (name, key, error)


def own_batch(model: nn.Module) -> dict[str, Any]:
    rank = dist.get_rank()
    return tiny_batch(dual_mode_of(model).config, PROMPTS[rank], seed=rank)


def fsdp2() -> None:
    """Units of layers and the rest; the phase stands before the first forward, and training goes on after it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = starting_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = model.model.language_model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    weight = "mlp.gate_proj.weight"

    def is_whole() -> bool:
        return not any(isinstance(part.get_parameter(weight), DTensor) for part in layers)

    check(model, is_whole, len(layers) + 1, "fsdp2 before a forward")
    loss(model, own_batch(model)).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    check_gradients(found, "fsdp2")
    check(model, is_whole, len(layers) + 1, "fsdp2 after a backward")


def fsdp2_bf16() -> None:
    """Mixed precision: the phase gathers in bf16, once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    model = starting_model()
    settings = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    }
    for layer in model.model.language_model.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    head = model.model.language_model.norm
    check(model, lambda: not isinstance(head.weight, DTensor), 3, "fsdp2 in bf16", torch.bfloat16)


def zero3() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        "zero_allow_untested_optimizer": True,
    }
    model = starting_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def is_whole() -> bool:
        return all(p.ds_status.name == "AVAILABLE" for p in model.parameters())

    check(engine, is_whole, None, "zero3 before a forward")
    engine.backward(loss(engine, own_batch(engine)))
    check_gradients({name: safe_get_full_grad(p) for name, p in model.named_parameters()}, "zero3")
    engine.step()
    check(engine, is_whole, None, "zero3 after a step")


def ddp() -> None:
    """Nothing to gather: ranks decode on their own."""
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(starting_model()))
    out: list[RolloutBuffer] = []

    def phase() -> None:
        with whole_parameters(model):
            out.append(decode(model, rank, STEPS[rank]))

    assert collectives(phase) == Counter()
    assert torch.equal(out[0].tokens, decode(starting_model(), rank, STEPS[rank]).tokens)


SCENARIOS = {"ddp": ddp, "fsdp2": fsdp2, "fsdp2_bf16": fsdp2_bf16, "zero3": zero3}


def run_scenarios(rank: int, world: int, *names: str) -> None:
    for name in names:
        SCENARIOS[name]()
