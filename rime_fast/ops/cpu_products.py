"""fp32 matrix products on the CPU: by the BLAS that ``torch.mm`` calls, or by oneDNN, which torch carries beside it.

MKL takes its 256-bit path on other makers' processors: on 2 cores of a Zen 5 EPYC ``torch.mm`` reaches 0.17 to 0.19
TFLOP/s where oneDNN's linear layer reaches 0.38 to 0.43 (1024 x 4096 x 256 and its like, torch 2.13). A Zen 4 runs 256
bits a cycle, whatever the instructions: 0.20 against 0.22, and where the first operand lies turned oneDNN takes up to
twice as long as MKL, for it copies that operand. On an Intel Xeon with AVX-512 ``torch.mm`` is as fast or faster in
every layout (up to 2.1 times where oneDNN copies an operand first). So the processor's maker and family decide, and not
a measurement: a process, and every process on one machine, makes the same bits. Both round to fp32 and accumulate in
fp32. The layer has no form that writes into given memory: callers take the new tensor, or add it.

Logits are made by oneDNN on every x86 from torch 2.13 on: its oneDNN 3.12 sums a row in one order however many rows
there are (16 to 512, at H 64 to 8192, with 1 to 32 threads and each instruction set), while MKL on Intel's processors
takes another order for another number of rows, and there oneDNN's time for them is MKL's. Before (3.10, on a Xeon) it
split K where rows are few: there products of one size, 16 rows, are what keeps a row's bits.
"""

from __future__ import annotations

import os
import platform
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORTH = 1 << 22  # multiply-adds from which it pays: below, the call's own overhead shows
PART_BYTES = 4 << 20  # oneDNN copies operands whose rows are not contiguous: so much at a time
ROWS = 16  # logits are made for whole multiples of so many rows
COLUMNS = 4096  # and so many columns at a time: what is copied from the library's result is still in the cache


ZEN_5 = 26  # the family of AMD's processors from which on 512 bits are multiplied in one cycle


@cache
def prefers_onednn(turned: bool = False) -> bool:
    """Whether oneDNN's products are the faster ones here: always but with MKL on an Intel processor, and on an AMD one
    before Zen 5 where the first operand is ``turned`` (its rows are another matrix's columns)."""
    if not torch.backends.mkl.is_available():
        return True
    try:
        processor = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # not Linux
        processor = os.environ.get("PROCESSOR_IDENTIFIER", "")
    if not turned or "AuthenticAMD" not in processor:
        return "GenuineIntel" not in processor
    family = re.search(r"family\W+(\d+)", processor, re.IGNORECASE)
    return family is None or int(family[1]) >= ZEN_5


@lru_cache(maxsize=1)
def _linear() -> Any:
    """x [M, K], weight [N, K] -> x weight^T; None where this torch has no such operator or it does not run here."""
    try:
        layer = torch.ops.mkldnn._linear_pointwise.default
        probe = torch.arange(6.0).view(2, 3)
        found = layer(probe, probe, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return layer if torch.equal(found, torch.tensor([[5.0, 14.0], [14.0, 50.0]])) else None


def has_onednn() -> bool:
    """Whether this torch multiplies by oneDNN here."""
    return _linear() is not None


def serves(a: Tensor) -> bool:
    """Whether ``fast_product`` can multiply a by another matrix, be it the faster way or not."""
    return a.dtype == torch.float32 and a.device.type == "cpu" and has_onednn()


def fast_products(a: Tensor, b: Tensor) -> bool:
    """Whether a [M, K] b [K, N] goes to oneDNN: where it is faster, fp32 on the CPU, large enough, a torch with it."""
    return prefers_onednn(a.stride(1) != 1) and a.shape[0] * a.shape[1] * b.shape[1] >= WORTH and serves(a)


def fast_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a b into a new tensor, where ``fast_products`` holds.

    A second operand whose rows lie apart is copied first: oneDNN has such layouts multiplied by its plain loop on some
    processors, a thousand times slower.
    """
    return _linear()(a, (b if _dense(b) else b.contiguous()).t(), None, "none", [], "")


def _dense(b: Tensor) -> bool:
    """Whether a matrix's rows, or its columns, follow each other without gaps."""
    return b.stride() in ((b.shape[1], 1), (1, b.shape[0]))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a [M, K] b [K, N] into a new tensor, by oneDNN where it serves (in parts of K where a's rows are not
    contiguous), else by ``torch.mm``."""
    if not fast_products(a, b):
        return torch.mm(a, b)
    total: Tensor | None = None
    size = a.shape[1] if a.is_contiguous() else _part(a.shape[0], b.shape[1])
    for left, right in zip(a.split(size, dim=1), b.split(size), strict=True):
        found = fast_product(left, right)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product, into += a b, by oneDNN where it serves, else by ``addmm_``."""
    set_or_add_product(into, a, b, False)


def set_or_add_product(into: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Set into = a b (first) or adds into += a b, by oneDNN in parts of M where it serves, else by ``mm`` and
    ``addmm_``."""
    if not fast_products(a, b):
        torch.mm(a, b, out=into) if first else into.addmm_(a, b)
        return
    size = _part(a.shape[1], b.shape[1])
    for target, part in zip(into.split(size), a.split(size), strict=True):
        found = fast_product(part, b)
        target.copy_(found) if first else target.add_(found)


def logits_of(x: Tensor, head: Tensor) -> Tensor:
    """Make logits x [R, K] head [N, K]^T in a new tensor, with the bits of ``set_logits``."""
    layer = _row_layer()
    if layer is not None and _dense(head):
        return layer(x, head, None, "none", [], "")
    into = x.new_empty(x.shape[0], head.shape[0])
    set_logits(into, x, head)
    return into


def set_logits(into: Tensor, x: Tensor, head: Tensor) -> None:
    """Make logits, into [R, N] = x [R, K] head [N, K]^T, fp32, R a multiple of ROWS: a row's bits depend on no other
    row."""
    layer = _row_layer()
    for target, weight in zip(into.split(COLUMNS, dim=1), head.split(COLUMNS), strict=True):
        if layer is not None:
            target.copy_(layer(x, weight if _dense(weight) else weight.contiguous(), None, "none", [], ""))
            continue
        for rows, out in zip(x.split(ROWS), target.split(ROWS), strict=True):  # one size of product: one order
            torch.mm(rows, weight.t(), out=out)


def _row_layer() -> Any:
    """oneDNN's linear layer where a row's bits were seen to depend on no other row: on x86, from torch 2.13 on."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return _linear() if version >= (2, 13) and platform.machine().lower() in ("x86_64", "amd64") else None


def _part(*widths: int) -> int:
    """How many rows (or columns) of matrices so wide fit PART_BYTES."""
    return max(1, PART_BYTES // (4 * max(widths)))
