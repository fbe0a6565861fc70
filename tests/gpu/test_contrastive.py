"""The contrastive loss on a GPU: the fp64 rule over dtypes, backends and masks, determinism, no waiting, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rime_fast.ops.contrastive import contrastive_loss
from rime_fast.ops.contrastive.op import TABLE
from tests.gpu.devices import BOTH, CUDA, backends, moved, no_synchronisation
from tests.ops.contrastive_cases import RIME_TERMS, check_rule, make_case, run

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks": {"ids": True, "margin": 0.1},
    "labels": {"shuffled": True, "symmetric": False},
    "several positives": {"positives": 3, "ids": True, "symmetric": False},
    "peaked": {"peaked": True, "temperature": 0.01},
}


def check(device: str, sizes: tuple[int, int, int], dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = moved(make_case(*sizes, dtype=dtype, **options), device)
    truth, eager = run(case, torch.float64, "reference"), run(case, dtype, "reference")
    for backend in backends(TABLE, device, dtype):
        check_rule(run(case, dtype, backend), eager, truth, dtype)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("name", OPTIONS)
def test_smoke(device: str, name: str) -> None:
    """Small enough for compute-sanitizer."""
    check(device, (5, 9, 16), torch.float32, OPTIONS[name])


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_fp64_rule(device: str, dtype: torch.dtype, name: str) -> None:
    for sizes in ((1, 1, 8), (33, 70, 40), (300, 517, 264), (1025, 1025, 1536)):
        check(device, sizes, dtype, OPTIONS[name])


@pytest.mark.parametrize("device", BOTH)
def test_same_bits_twice(device: str) -> None:
    case = moved(make_case(70, 130, 48, dtype=torch.bfloat16, ids=True), device)
    for backend in backends(TABLE, device, torch.bfloat16):
        first, second = (run(case, torch.bfloat16, backend) for _ in range(2))
        assert torch.equal(first.out.loss, second.out.loss)
        for name, value in first.gradients.items():
            assert torch.equal(value, second.gradients[name]), (backend, name)


@pytest.mark.parametrize("device", BOTH)
def test_no_synchronisation(device: str) -> None:
    """With a float temperature, as the trainers give it, and with one that is learned."""
    case = moved(make_case(70, 130, 48, dtype=torch.bfloat16, ids=True, margin=0.2), device)
    both = case.queries, case.keys
    sides = [{mode: rows.bfloat16().requires_grad_() for mode, rows in side.items()} for side in both]
    learned = torch.tensor(0.02, device=device, requires_grad=True)
    for backend in backends(TABLE, device, torch.bfloat16):
        if backend == "reference":
            continue
        for temperature in (0.02, learned):

            def step(backend: str = backend, temperature: Any = temperature) -> None:
                settings = {"terms": RIME_TERMS, "temperature": temperature, "backend": backend}
                contrastive_loss(*sides, **settings, **case.settings).loss.backward()

            step()  # compiles
            with no_synchronisation(device):
                step()


@pytest.mark.parametrize("device", CUDA)
def test_compiles_without_a_graph_break(device: str) -> None:
    case = moved(make_case(64, 64, 48), device)
    leaves = [rows.float().requires_grad_() for side in (case.queries, case.keys) for rows in side.values()]

    def loss(a: Any, b: Any, c: Any, d: Any) -> torch.Tensor:
        queries, keys = {"disc": a, "gen": b}, {"disc": c, "gen": d}
        return contrastive_loss(queries, keys, terms=RIME_TERMS, temperature=0.05).loss * 2.0

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for found, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found, wanted)
