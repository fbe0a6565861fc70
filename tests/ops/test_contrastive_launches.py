"""How many operations four terms cost: on a GPU each is a launch, and small batches wait for nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rime_fast.ops import native
from rime_fast.ops.contrastive.keys import OwnKeys
from rime_fast.ops.contrastive.problem import Inputs, Options
from rime_fast.ops.contrastive.schedule import Schedule

VIEWS = "view slice select expand as_strided detach t transpose unsqueeze unbind split split_with_sizes permute alias"
FREE = {*VIEWS.split(), "empty", "new_empty", "empty_like", "_local_scalar_dense"}
TERMS = ((0, 0), (1, 1), (1, 0), (0, 1))


class Counted(TorchDispatchMode):
    """Counts operations that do work."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().split("::")[1].split(".")[0] not in FREE
        return func(*args, **(kwargs or {}))


def count(backend: str, dtype: torch.dtype) -> int:
    """Operations of a forward and a backward as they run on a GPU, where nothing is known on the host."""
    rows = [torch.nn.functional.normalize(torch.randn(24, 16), dim=1).to(dtype) for _ in range(4)]
    x = Inputs(rows[:2], rows[2:], torch.tensor(0.05), None, None, None)
    options = Options(TERMS, None, True, backend)
    with Counted() as counted:
        first = Schedule(x, options, OwnKeys(x.keys, x.n_queries), None)
        solved = first.forward()[2:]
        second = Schedule(x, options, OwnKeys(x.keys, x.n_queries), first.flag)
        second.backward(torch.ones(4), *solved, [True] * 2, [True] * 2, False)
    return counted.count


@pytest.mark.skipif(not native.available(), reason="csrc's row kernels are a launch each")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_the_chunked_backend(dtype: torch.dtype) -> None:
    """Of which 28 are products and tiles."""
    assert count("chunked", dtype) <= 110


def test_launches_of_the_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from rime_fast.ops.contrastive import triton_kernels

    launches = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **__: launches.append(grid)

    for name in ("statistics_kernel", "merge_kernel", "gradient_kernel"):
        monkeypatch.setattr(triton_kernels, name, Kernel())
    assert count("triton", torch.float32) + len(launches) <= 120
    assert len(launches) == 8
