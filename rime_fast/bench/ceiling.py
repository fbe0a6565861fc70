"""What the machine itself reaches: a copy in memory and one large matrix product a dtype. The lines of the roofline."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rime_fast.bench.harness import Results, Row, compare, dtype_name, library_product

BENCH = "ceiling"


@dataclass(frozen=True)
class Shape:
    """Sizes past every cache, small enough for a second."""

    copy_mib: int = field(default=1024, metadata={"help": "Size of the copied tensor."})
    width: int = field(default=8192, metadata={"help": "Side of the square matrices."})

    def __str__(self) -> str:
        return f"copy{self.copy_mib}MiB-gemm{self.width}"


SHAPES = {"tiny": [Shape(1, 64)], "cpu": [Shape(256, 1024)], "cuda": [Shape()]}


def measure(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 5,
) -> dict[str, Row]:
    """Rows "copy" (GB/s, read and write counted) and "gemm" (TFLOP/s) in fp32 and in ``dtype``."""
    rows = _copy(shape, device, results, rounds)
    for kind in dict.fromkeys((torch.float32, dtype)):
        rows |= _gemm(shape, device, kind, results, rounds)
    return rows


def _copy(shape: Shape, device: str, results: Results | None, rounds: int) -> dict[str, Row]:
    source = torch.randn(shape.copy_mib << 18, device=device)
    target = torch.empty_like(source)
    return compare(
        BENCH,
        "copy",
        {"copy": lambda: target.copy_(source)},
        shape={"MiB": shape.copy_mib},
        device=device,
        rounds=rounds,
        nbytes=2.0 * 4 * source.numel(),
        results=results,
    )


def _gemm(shape: Shape, device: str, dtype: torch.dtype, results: Results | None, rounds: int) -> dict[str, Row]:
    a, b = (torch.randn(shape.width, shape.width, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return compare(
        BENCH,
        f"gemm-{dtype_name(dtype)}",
        {"gemm": lambda: library_product(a, b, out)},
        device=device,
        rounds=rounds,
        shape={"width": shape.width, "dtype": dtype_name(dtype)},
        flops=2.0 * shape.width**3,
        results=results,
    )
