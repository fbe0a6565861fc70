"""Causal attention inside packed sequences whose lengths are NEW in every call, as in training, forward and backward.

"ours" is what a layer of the model runs; beside it the same sequences padded to the longest, by
``scaled_dot_product_attention`` in torch's own order of kernels and with flash attention first: with new lengths the
first kernel in that order on Hopper, cuDNN's, plans anew on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from rime_fast.bench.harness import Results, Row, compare, dtype_name
from rime_fast.model.packing import PackedLayout


@dataclass(frozen=True)
class Shape:
    """Sequences of shortest to longest tokens, and the heads."""

    sequences: int
    shortest: int
    longest: int
    heads: int
    kv: int
    width: int

    def __str__(self) -> str:
        return f"{self.sequences}x{self.shortest}to{self.longest}-{self.heads}heads-{self.kv}kv-{self.width}wide"


SHAPES = {
    "tiny": [Shape(3, 3, 9, 4, 2, 16)],
    "cpu": [Shape(6, 50, 300, 4, 2, 64)],
    "cuda": [Shape(12, 200, 1200, 12, 2, 128), Shape(48, 200, 1200, 28, 4, 128)],
}
FLASH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def packed(lengths: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return PackedLayout(lengths, q.device, causal=True).attend(q, k, v)


def padded(lengths: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sides = (pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*sides, is_causal=True, enable_gqa=True).transpose(1, 2)
    return torch.cat([rows[:n] for rows, n in zip(out, lengths, strict=True)])


def padded_flash(lengths: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(FLASH, set_priority=True):
        return padded(lengths, q, k, v)


def step(shape: Shape, device: str, dtype: torch.dtype, attend: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """Make a call that draws lengths of its own; every implementation draws the same ones."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(shape.sequences * shape.longest, shape.heads, shape.width, device=device, dtype=dtype)

    def call() -> Tensor:
        lengths = torch.randint(shape.shortest, shape.longest + 1, (shape.sequences,), generator=draw).tolist()
        q = rows[: sum(lengths)].clone().requires_grad_()
        k, v = (q[:, : shape.kv].detach().clone().requires_grad_() for _ in "kv")
        attend(lengths, q, k, v).sum().backward()
        assert q.grad is not None
        return q.grad

    return call


def measure(
    shape: Shape, device: str, dtype: torch.dtype, results: Results | None = None, rounds: int = 9
) -> dict[str, Row]:
    """Rows of ours and of padded blocks."""
    make: Any = partial(step, shape, device, dtype)
    mean = (shape.longest**3 - shape.shortest**3) / 3 / max(1, shape.longest - shape.shortest)  # of a length's square
    return compare(
        "attention",
        str(shape),
        {"ours": make(packed), "padded, torch's order": make(padded), "padded, flash first": make(padded_flash)},
        shape={"sequences": shape.sequences, "heads": shape.heads, "kv": shape.kv, "dtype": dtype_name(dtype)},
        device=device,
        rounds=rounds,
        results=results,
        flops=3.5 * 2.0 * shape.sequences * mean * shape.heads * shape.width,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SHAPES[metafunc.config.rime_size], ids=str)


def test_attention(shape: Shape, run) -> None:
    assert "ours" in run(measure, shape, rounds=9)
