"""Rollout phases on two gloo ranks that decode for different numbers of steps; the scenarios: gathered_worker.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rime_fast.engine.wrappers import whole_parameters
from tests.engine.gathered_worker import run_scenarios
from tests.ranks import run_ranks


@pytest.mark.dist
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize(
    "names", [("ddp", "fsdp2", "fsdp2_bf16"), pytest.param(("zero3",), marks=pytest.mark.slow)], ids="-".join
)
def test_ranks_decode_for_different_numbers_of_steps(names: tuple[str, ...]) -> None:
    if "zero3" in names:
        pytest.importorskip("deepspeed")
    run_ranks(run_scenarios, 2, *names)


def test_a_plain_model_keeps_its_hooks() -> None:
    model, seen = nn.Linear(2, 2), []
    model.register_forward_hook(lambda *_: seen.append(1))
    with whole_parameters(model):
        model(torch.ones(1, 2))
    assert seen == [1]


def test_fsdp1_is_refused_by_name() -> None:
    wrapped = type("FullyShardedDataParallel", (nn.Linear,), {})(2, 2)
    with pytest.raises(TypeError, match="FSDP1"), whole_parameters(wrapped):
        pass
