"""Operator A on Triton: host side of triton_kernels.py, with the same functions as panels.py.

The backward walks the vocabulary in panels: dlogits of all scored rows for P columns in the operands' dtype, then dW of
those columns (a sum over all rows in fp32 registers, written once) and the panel's share of dX, added to the gradient
itself (fp32, or bf16 with the rounding kept beside it). The workspace, panel and roundings, is within one limit
(triton_tiles.plan). The weighted cross-entropy runs forward and backward at once with the logits recomputed (8MHV):
gradient-in-forward would need a row's whole logits in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool.compaction import Scored, scored_rows, workspace_limit
from rime_fast.ops.logprob_pool.statistics import Gradients, Needs, Statistics, gradient_dtype, new_statistics
from rime_fast.ops.logprob_pool.triton_tiles import (
    FORWARD_ROWS,
    GROUP,
    INTERPRETER_PROGRAMS,
    SPLIT_COLUMNS,
    Tiles,
    capability_of,
    head_tiles,
    hidden_tiles,
    interpreted,
    plan,
    score_tiles,
)

__all__ = ["backward", "forward", "scored_rows", "why_not"]

INTERPRETER_TMA = True  # descriptors where a GPU would take them; tests compare both


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


def uses_tma(tensor: Tensor) -> bool:
    """Whether tensor descriptors load it: the generation has them, and every row starts on 16 bytes."""
    aligned = tensor.stride(1) == 1 and tensor.stride(0) * tensor.element_size() % 16 == 0
    if not aligned or tensor.data_ptr() % 16:
        return False
    if not tensor.is_cuda:
        return INTERPRETER_TMA
    return capability_of(tensor)[0] in (9, 10) and tensor.element_size() == 2


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class _Launch:
    """What every kernel of one call shares."""

    def __init__(self, hidden: Tensor, lm_head: Tensor, bias: Tensor | None, softcap: float, heavy: bool) -> None:
        self.hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        self.lm_head = lm_head if lm_head.stride(1) == 1 else lm_head.contiguous()
        self.length, self.width = hidden.shape
        self.vocabulary = lm_head.shape[0]
        chip = capability_of(hidden)
        self.head_tiles, self.hidden_tiles = head_tiles(hidden.dtype, chip), hidden_tiles(hidden.dtype, chip)
        self.tma = uses_tma(self.lm_head)
        self.tiles = score_tiles(hidden.dtype, chip, heavy, self.tma)
        self.flags = {"HAS_BIAS": bias is not None, "HAS_CAP": softcap != 0.0}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)

    def operand(self, tensor: Tensor, rows: int, columns: int) -> Any:
        """``tensor`` as a kernel takes it: a descriptor of blocks [rows, columns], or the pointer."""
        if not self.tma:
            return tensor
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(tensor, [rows, columns])

    def cut(self, tiles: Tiles) -> dict[str, Any]:
        """The constants that all kernels with products take."""
        return {
            "BM": tiles.BM,
            "BN": tiles.BN,
            "BK": tiles.BK,
            "GROUP": GROUP,
            "WIDEN": not self.hidden.is_cuda,
            "TMA": self.tma,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def programs(self, units: int) -> tuple[int]:
        """Persistent: as many programs as processors, or as units of work if these are fewer."""
        if not self.hidden.is_cuda:
            return (max(1, min(INTERPRETER_PROGRAMS, units)),)
        return (max(1, min(torch.cuda.get_device_properties(self.hidden.device).multi_processor_count, units)),)


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

    run = _Launch(hidden, lm_head, bias, softcap, heavy=softcap != 0.0)
    t = run.tiles
    stats = new_statistics(hidden, entropy)
    split = SPLIT_COLUMNS // t.BN
    splits = _cdiv(run.vocabulary, SPLIT_COLUMNS)
    for start in range(0, scored.order.shape[0], FORWARD_ROWS):
        part = scored.part(start, FORWARD_ROWS)
        rows = part.order.shape[0]
        partial = run.empty(4, splits, rows)
        kernels.forward_kernel[run.programs(_cdiv(rows, t.BM) * splits)](
            run.hidden,
            run.operand(run.lm_head, t.BN, t.BK),
            bias,
            targets,
            *part,
            temperature,
            partial,
            rows,
            run.width,
            run.vocabulary,
            run.hidden.stride(0),
            run.lm_head.stride(0),
            softcap,
            SPLIT=split,
            ENTROPY=entropy,
            **run.flags,
            **run.cut(t),
        )
        kernels.merge_kernel[(_cdiv(rows, 128),)](
            partial, *part, *stats, rows, run.length, splits, BM=128, ENTROPY=entropy, num_warps=4
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
    run = _Launch(hidden, lm_head, bias, softcap, heavy=softcap != 0.0 or grad_entropy is not None)
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    rows = _Rows(targets, lse, hit, entropy, grad_logp.contiguous(), grad_entropy, bias, temperature, softcap)
    sums = _Sums(run, needs, bias)
    capacity = scored.order.shape[0]
    if capacity == 0 or not any(needs):
        return sums.finish(temperature)
    low = needs.hidden and hidden.dtype == torch.bfloat16
    limit = workspace_limit()
    itemsize = hidden.element_size()
    cut = plan(capacity, run.width, run.vocabulary, itemsize, low, any(needs[1:]), limit)
    if cut.rows == capacity or not needs.hidden:
        _sweep(run, scored, rows, sums, needs, cut.columns)
        return sums.finish(temperature)
    columns = plan(cut.rows, run.width, run.vocabulary, itemsize, low, False, limit).columns
    for start in range(0, capacity, cut.rows):
        _sweep(run, scored.part(start, cut.rows), rows, sums, Needs(True, False, False, False), columns)
    if any(needs[1:]):
        columns = plan(capacity, run.width, run.vocabulary, itemsize, False, True, limit).columns
        _sweep(run, scored, rows, sums, needs._replace(hidden=False), columns)
    return sums.finish(temperature)


class _Rows:
    """What the kernel that makes dlogits reads of every row."""

    def __init__(
        self,
        targets: Tensor,
        lse: Tensor,
        hit: Tensor,
        entropy: Tensor | None,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
        bias: Tensor | None,
        temperature: Tensor,
        softcap: float,
    ) -> None:
        self.targets, self.bias, self.temperature, self.softcap = targets, bias, temperature, softcap
        self.entropy = grad_entropy is not None
        self.upstream = (lse, hit, entropy, grad_logp, grad_entropy)


def _sweep(run: _Launch, scored: Scored, rows: _Rows, sums: _Sums, needs: Needs, columns: int) -> None:
    """Every panel of the vocabulary for the rows in ``scored``."""
    from rime_fast.ops.logprob_pool import triton_kernels as kernels

    t, capacity = run.tiles, scored.order.shape[0]
    # Zeros: the kernels write the tiles of the rows there are, and torch sums over the whole panel.
    panel = torch.zeros(capacity, columns, dtype=run.hidden.dtype, device=run.hidden.device)
    products = run.empty(_cdiv(columns, t.BN), capacity) if needs.temperature else None
    low = run.empty(0)
    if needs.hidden and run.hidden.dtype == torch.bfloat16:
        low = torch.empty(capacity, run.width, dtype=torch.bfloat16, device=run.hidden.device)
    for first in range(0, run.vocabulary, columns):
        here = min(columns, run.vocabulary - first)
        tiles = _cdiv(here, t.BN)
        if products is not None:
            products.zero_()
        kernels.dlogits_kernel[run.programs(_cdiv(capacity, t.BM) * tiles)](
            run.hidden,
            run.operand(run.lm_head, t.BN, t.BK),
            rows.bias,
            rows.targets,
            *scored,
            rows.temperature,
            *rows.upstream,
            run.operand(panel, t.BM, t.BN),
            products,
            first,
            here,
            capacity,
            run.length,
            run.width,
            run.vocabulary,
            run.hidden.stride(0),
            run.lm_head.stride(0),
            columns,
            rows.softcap,
            ENTROPY=rows.entropy,
            PRODUCTS=products is not None,
            **run.flags,
            **run.cut(t),
        )
        sums.add(panel, scored, needs, low, first, here, products)


class _Sums:
    """The gradients, panel by panel."""

    def __init__(self, run: _Launch, needs: Needs, bias: Tensor | None) -> None:
        self.run = run
        hidden, head = run.hidden, run.lm_head
        kind, device = gradient_dtype(hidden.dtype), hidden.device
        self.hidden = torch.zeros(hidden.shape, dtype=kind, device=device) if needs.hidden else None
        self.head = torch.zeros(head.shape, dtype=kind, device=device) if needs.lm_head else None
        self.bias = torch.zeros(run.vocabulary, device=device) if needs.bias and bias is not None else None
        self.products = torch.zeros((), dtype=torch.float64, device=device) if needs.temperature else None

    def add(
        self,
        panel: Tensor,
        scored: Scored,
        needs: Needs,
        low: Tensor,
        first: int,
        columns: int,
        products: Tensor | None,
    ) -> None:
        """One panel: dlogits of ``columns`` columns from ``first``."""
        from rime_fast.ops.logprob_pool import triton_kernels as kernels

        run = self.run
        if needs.lm_head and self.head is not None:
            t = run.head_tiles
            units = _cdiv(columns, t.BM) * _cdiv(run.width, t.BN)
            kernels.dhead_kernel[run.programs(units)](
                run.operand(panel, t.BK, t.BM),
                run.hidden,
                *scored,
                self.head,
                self.bias,
                first,
                columns,
                run.width,
                panel.stride(0),
                run.hidden.stride(0),
                self.head.stride(0),
                BIAS=self.bias is not None,
                **run.cut(t),
            )
        elif needs.bias and self.bias is not None:
            self.bias[first : first + columns] = panel[:, :columns].sum(dim=0, dtype=torch.float32)
        if needs.hidden and self.hidden is not None:
            t = run.hidden_tiles
            units = _cdiv(panel.shape[0], t.BM) * _cdiv(run.width, t.BN)
            kernels.dhidden_kernel[run.programs(units)](
                run.operand(panel, t.BM, t.BK),
                run.operand(run.lm_head, t.BK, t.BN),
                *scored,
                self.hidden,
                low,
                first,
                columns,
                run.width,
                panel.stride(0),
                run.lm_head.stride(0),
                ADD=first > 0,
                LOW=low.numel() > 0,
                **run.cut(t),
            )
        if products is not None and self.products is not None:
            self.products += products.sum(dtype=torch.float64)

    def finish(self, temperature: Tensor) -> Gradients:
        heat = None if self.products is None else (-self.products / temperature.double()).float()
        return Gradients(self.hidden, self.head, self.bias, heat)
