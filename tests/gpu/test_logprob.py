"""The log-prob operator on a GPU, beside test_logprob_pool_triton.py: edge cases, determinism, no waiting, compile."""

from __future__ import annotations

import pytest
import torch

from rime_fast.ops.logprob_pool import fused_linear_ce
from rime_fast.ops.logprob_pool.op import TABLE
from tests.gpu.devices import BOTH, CUDA, backends, moved, no_synchronisation
from tests.ops.logprob_cases import Case, assert_close_to_truth

SCHEDULES = ["recompute", "forward"]


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_smoke(device: str, schedule: str) -> None:
    """Small enough for compute-sanitizer."""
    for case in (Case(9, 16, 40), Case(5, 33, 123, torch.bfloat16, scored="all"), Case(3, 16, 40, scored="none")):
        moved(case, device)
        for backend in backends(TABLE, device, case.dtype):
            assert_close_to_truth(case, case.run(backend, schedule=schedule), schedule)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fp64_rule(device: str, dtype: torch.dtype, schedule: str) -> None:
    for case in (
        Case(129, 264, 5003, dtype, scored="all", softcap=5.0),
        Case(300, 1536, 4097, dtype, spread=30.0),
        Case(300, 96, 40_001, dtype, scored="one", bias=False),
        Case(64, 128, 1000, dtype, spread=1e-3, temperature=2.0),
    ):
        moved(case, device)
        for backend in backends(TABLE, device, dtype):
            assert_close_to_truth(case, case.run(backend, schedule=schedule), schedule)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_bits_twice(device: str, schedule: str) -> None:
    case = moved(Case(65, 64, 1003, torch.bfloat16), device)
    for backend in backends(TABLE, device, case.dtype):
        if backend == "reference":
            continue  # its index_add takes float atomics on CUDA
        first, second = (case.run(backend, schedule=schedule) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), (backend, name)


@pytest.mark.parametrize("device", BOTH)
def test_no_synchronisation(device: str) -> None:
    case = moved(Case(65, 64, 1003, torch.bfloat16), device)
    for backend in backends(TABLE, device, case.dtype):
        if backend == "reference":
            continue  # indexes by a mask: it is the definition, not a hot path
        for schedule in SCHEDULES:
            case.run(backend, schedule=schedule)  # compiles
            with no_synchronisation(device):
                case.run(backend, schedule=schedule)


@pytest.mark.parametrize("device", CUDA)
def test_compiles_without_a_graph_break(device: str) -> None:
    case = moved(Case(65, 64, 1003, torch.bfloat16), device)
    leaves, targets = case.leaves(), case.tensors["targets"]

    def loss(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        return fused_linear_ce(hidden * 1.5, lm_head, targets)[0]

    args = leaves["hidden"], leaves["lm_head"]
    eager = torch.autograd.grad(loss(*args), args)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*args), args)
    for found, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found, wanted)
