"""Operator A on Triton: host side of triton_kernels.py, with the same functions as chunked.py.

The backward walks the vocabulary in panels: dlogits of all scored rows for P columns in the operands' dtype, then dW of
those columns (a sum over all rows in fp32 registers, written once) and the panel's share of dX (fp32). Workspace
beside the gradients: the panel (PANEL_BYTES) and dX in fp32. The weighted cross-entropy runs forward and backward at
once with the logits recomputed (8MHV): gradient-in-forward would need a row's whole logits in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool.compaction import Scored, scored_rows
from rime_fast.ops.logprob_pool.statistics import Gradients, Needs, Statistics, gradient_dtype, new_statistics

__all__ = ["backward", "forward", "forward_with_gradient", "scored_rows", "tiles_for", "why_not"]

PANEL_BYTES = 128 << 20
SPLIT = 8  # tiles of one unit of the forward; part of what fixes a row's bits
INTERPRETER_PROGRAMS = 3


class Tiles(NamedTuple):
    """Tile sizes: BM rows x BN columns with depth BK where logits are made, and the two products of the backward."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def interpreted() -> bool:
    """True when Triton's CPU interpreter runs the kernels (the variable is read when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(tensor: Tensor) -> str | None:
    """The reason Triton cannot serve a call on ``tensor``, or None."""
    if tensor.dtype == torch.float64:
        return "it computes in fp32; fp64 runs on the reference"
    if not tensor.is_cuda and not (interpreted() and tensor.device.type == "cpu"):
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1 for the CPU), got {tensor.device.type}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def tiles_for(dtype: torch.dtype, capability: tuple[int, int], heavy: bool) -> Tiles:
    """Fixed per dtype, generation and options, never per batch: a row's bits depend on it.

    heavy: the kernel makes more of a tile than its softmax (soft cap, the entropy's gradient); half the columns then
    keep it in registers. Chosen as the largest that tests/ops/test_logprob_pool_triton.py compiles without a spill;
    8.6, 8.9 and 12.0, whose shared memory is 100 KB, take the sizes of 8.0.
    """
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2)
    columns = 64 if heavy else 128
    if capability[0] in (9, 10):
        return Tiles(128, columns, 64, 8, 4)
    return Tiles(128, columns, 32, 8, 3)


def heavy_forward(capability: tuple[int, int], softcap: float) -> bool:
    """Whether the forward takes the small tiles. Not for the entropy: logp is the same bits without it."""
    return softcap != 0.0 or capability[0] == 10


def _capability(hidden: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (0, 0)


def _tiles(hidden: Tensor, heavy: bool) -> Tiles:
    if hidden.is_cuda:
        return tiles_for(hidden.dtype, _capability(hidden), heavy)
    return Tiles(32, 32, 16, 4, 1)  # the interpreter


def _programs(hidden: Tensor, units: int) -> tuple[int]:
    """Persistent: as many programs as processors, or as units of work if these are fewer."""
    if not hidden.is_cuda:
        return (max(1, min(INTERPRETER_PROGRAMS, units)),)
    return (max(1, min(torch.cuda.get_device_properties(hidden.device).multi_processor_count, units)),)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class _Launch:
    """What every kernel of one call shares."""

    def __init__(self, hidden: Tensor, lm_head: Tensor, bias: Tensor | None, softcap: float, heavy: bool) -> None:
        self.hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        self.lm_head = lm_head if lm_head.stride(1) == 1 else lm_head.contiguous()
        self.rows, self.width = hidden.shape
        self.vocabulary = lm_head.shape[0]
        self.tiles = _tiles(hidden, heavy)
        self.products = _tiles(hidden, heavy=False)
        self.flags = {"HAS_BIAS": bias is not None, "HAS_CAP": softcap != 0.0, "WIDEN": not hidden.is_cuda}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.hidden.device)


def forward(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    scored: Scored,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    entropy: bool,
) -> Statistics:
    """The rows' statistics; 2MHV FLOP."""
    from rime_fast.ops.logprob_pool import triton_kernels as kernels

    run = _Launch(hidden, lm_head, bias, softcap, heavy_forward(_capability(hidden), softcap))
    t, rows = run.tiles, run.rows
    stats = new_statistics(hidden, entropy)
    if rows == 0:
        return stats
    splits = _cdiv(run.vocabulary, t.BN * SPLIT)
    partial = run.empty(4, splits, rows)
    kernels.forward_kernel[_programs(hidden, _cdiv(rows, t.BM) * splits)](
        run.hidden, run.lm_head, bias, targets, *scored, temperature, partial, rows, run.width, run.vocabulary,
        run.hidden.stride(0), run.lm_head.stride(0), softcap, BM=t.BM, BN=t.BN, BK=t.BK, SPLIT=SPLIT, ENTROPY=entropy,
        **run.flags, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    kernels.merge_kernel[(_cdiv(rows, 128),)](
        partial, *scored, *stats, rows, splits, BM=128, ENTROPY=entropy, num_warps=4
    )
    return stats


def backward(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    scored: Scored,
    lse: Tensor,
    hit: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    needs: Needs,
) -> Gradients:
    """Gradients of the rows from upstream gradients [T]; recomputes the logits panel by panel."""
    from rime_fast.ops.logprob_pool import triton_kernels as kernels

    run = _Launch(hidden, lm_head, bias, softcap, heavy=softcap != 0.0 or grad_entropy is not None)
    t, rows, width, vocabulary = run.tiles, run.rows, run.width, run.vocabulary
    sums = _Sums(run, needs, bias)
    if rows == 0 or not any(needs):
        return sums.finish(scored, temperature)
    fitting = PANEL_BYTES // (rows * hidden.element_size()) // t.BN
    columns = min(_cdiv(vocabulary, t.BN), max(1, fitting)) * t.BN
    panel = run.empty(rows, columns, dtype=hidden.dtype)
    products = run.empty(_cdiv(columns, t.BN), rows) if needs.temperature else None
    for first in range(0, vocabulary, columns):
        here = min(columns, vocabulary - first)
        tiles = _cdiv(here, t.BN)
        if products is not None:
            products.zero_()
        kernels.dlogits_kernel[_programs(hidden, _cdiv(rows, t.BM) * tiles)](
            run.hidden, run.lm_head, bias, targets, *scored, temperature, lse, hit, entropy, grad_logp.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(), panel, products, first, here, rows, width,
            vocabulary, run.hidden.stride(0), run.lm_head.stride(0), columns, softcap, BM=t.BM, BN=t.BN, BK=t.BK,
            ENTROPY=grad_entropy is not None, PRODUCTS=products is not None, **run.flags,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        sums.add(panel, scored, first, here, products)
    return sums.finish(scored, temperature)


def forward_with_gradient(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    scored: Scored,
    token_weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    entropy: bool,
    needs: Needs,
    merge: Callable[[Statistics], Statistics] | None = None,
) -> tuple[Statistics, Gradients]:
    """Statistics (made whole by ``merge`` for a part of a vocabulary), and the gradients of the weighted -logp."""
    stats = forward(hidden, lm_head, targets, scored, bias, temperature, softcap, entropy)
    stats = merge(stats) if merge else stats
    return stats, backward(
        hidden, lm_head, targets, scored, stats.lse, stats.hit, None, -token_weight, None, bias, temperature, softcap,
        needs,
    )  # fmt: skip


class _Sums:
    """The gradients, panel by panel."""

    def __init__(self, run: _Launch, needs: Needs, bias: Tensor | None) -> None:
        self.run, self.needs = run, needs
        head = run.lm_head
        self.head = run.empty(*head.shape, dtype=gradient_dtype(head.dtype)) if needs.lm_head else None
        wants_bias = needs.bias and bias is not None
        self.bias = run.empty(run.vocabulary) if wants_bias else None
        self.dx = run.empty(run.rows, run.width) if needs.hidden else None
        self.products = torch.zeros((), dtype=torch.float64, device=head.device) if needs.temperature else None
        self.first = True

    def add(self, panel: Tensor, scored: Scored, first: int, columns: int, products: Tensor | None) -> None:
        from rime_fast.ops.logprob_pool import triton_kernels as kernels

        run, t = self.run, self.run.products
        shared = {"WIDEN": run.flags["WIDEN"], "num_warps": t.warps, "num_stages": t.stages}
        if self.head is not None:
            units = _cdiv(columns, t.BM) * _cdiv(run.width, t.BN)
            kernels.dhead_kernel[_programs(run.hidden, units)](
                panel, run.hidden, *scored, self.head, self.bias, first, columns, run.width, panel.stride(0),
                run.hidden.stride(0), self.head.stride(0), BV=t.BM, BH=t.BN, BR=t.BK, BIAS=self.bias is not None,
                **shared,
            )  # fmt: skip
        elif self.bias is not None:
            live = torch.arange(panel.shape[0], device=panel.device) < scored.number
            part = panel[:, :columns].float().masked_fill_(~live.unsqueeze(1), 0.0)
            self.bias[first : first + columns] = part.sum(dim=0)
        if self.dx is not None:
            units = _cdiv(run.rows, t.BM) * _cdiv(run.width, t.BN)
            kernels.dhidden_kernel[_programs(run.hidden, units)](
                panel, run.lm_head, scored.number, self.dx, first, columns, run.width, panel.stride(0),
                run.lm_head.stride(0), ADD=not self.first, BM=t.BM, BH=t.BN, BV=t.BK // 2, **shared,
            )  # fmt: skip
        if self.products is not None and products is not None:
            live = torch.arange(products.shape[1], device=products.device) < scored.number
            self.products += torch.where(live, products, 0.0).sum(dtype=torch.float64)
        self.first = False

    def finish(self, scored: Scored, temperature: Tensor) -> Gradients:
        from rime_fast.ops.logprob_pool import triton_kernels as kernels

        hidden = self.run.hidden
        if self.first:  # nothing was added
            for grad in (self.head, self.bias, self.dx):
                if grad is not None:
                    grad.zero_()
        grad_hidden = None
        if self.dx is not None:
            grad_hidden = torch.zeros(hidden.shape, dtype=gradient_dtype(hidden.dtype), device=hidden.device)
            if hidden.shape[0]:
                kernels.scatter_kernel[(_cdiv(hidden.shape[0], 32), _cdiv(hidden.shape[1], 128))](
                    self.dx, *scored, grad_hidden, hidden.shape[1], BM=32, BH=128, num_warps=4
                )
        heat = None if self.products is None else (-self.products / temperature.double()).float()
        return Gradients(grad_hidden, self.head, self.bias, heat)
