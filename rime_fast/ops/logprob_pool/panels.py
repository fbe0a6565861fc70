"""Operator A on CUDA by library products: bounded memory at any batch, no synchronisation, no fp32 copy of dW.

forward    blocks of ROWS scored rows (padded, so a row's logits are the same bits in any batch) times the head, by wide
           panels of columns; the row kernel's statistics of the panels are merged in a fixed order. 2MHV FLOP.
backward   panels of columns outside, all scored rows inside: logits of the panel [M, P] fp32, their gradient over them
           in the operands' dtype, then dW of the P columns (one product over all rows, in fp32, cast once) and the
           panel's share of dX, in fp32. 6MHV FLOP: 8MHV with the forward.
Why the gradient is not made in the forward here (6MHV): that needs whole rows of logits, so with B bytes of workspace
R = B / 4V rows at a time, and dW in fp32 is read and written (8VH bytes) for every R rows.
That traffic takes 4 / R x (FLOP per byte of the card) of the time that 2MHV saves: 295 FLOP per byte (H100) and R = 441
(256 MiB, V 151,936) give 2.7. Recomputing is the faster of the two until R passes 1,180, V 57,000.

The host does not know M: it enqueues work for the capacity (compaction.py), in which places past M hold zero rows with
a zero gradient; max_scored makes the capacity M. dX in fp32, the rows and the panel share one budget; where dX
does not fit beside a useful panel the rows go in groups, dX first and dW in a second sweep (10MHV): see ``plan``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.ops.logprob_pool.compaction import Scored, scored_rows, workspace_limit
from rime_fast.ops.logprob_pool.rows import rows_backward_, rows_forward
from rime_fast.ops.logprob_pool.statistics import (
    Gradients,
    Needs,
    Statistics,
    gradient_dtype,
    new_statistics,
    share_of_part,
    whole_of_parts,
)

__all__ = ["backward", "forward", "plan", "scored_rows"]

ROWS = 512  # of a block of the forward
STEP = 64  # columns of a panel are a multiple of this, so that its rows start on 16 bytes


class Plan(NamedTuple):
    """How the backward is cut: rows of a group, columns of a panel, bytes in use at most."""

    rows: int
    columns: int
    workspace: int


def plan(capacity: int, width: int, vocabulary: int, itemsize: int, limit: int) -> Plan:
    """The largest group of rows whose dX (fp32) and rows take 3/4 of ``limit``, the widest panel in what is left."""
    a_row = (4 + itemsize) * width
    rows = max(1, min(capacity, limit * 3 // 4 // a_row))
    a_column = 4 * (rows + width)  # logits, and dW in fp32
    columns = max(STEP, (limit - rows * a_row) // a_column // STEP * STEP)
    columns = min(columns, -(-vocabulary // STEP) * STEP)
    return Plan(rows, columns, rows * a_row + columns * a_column)


def forward_columns(vocabulary: int, limit: int) -> int:
    """Columns of a panel of the forward's block: fixed by V and the limit, as the bits of a row depend on it."""
    return max(STEP, min(vocabulary, limit * 3 // 4 // (4 * ROWS) // STEP * STEP))


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
    """The rows' statistics."""
    rows, vocabulary = hidden.shape[0], lm_head.shape[0]
    stats = new_statistics(hidden, entropy, rows + 1)  # the last place takes what the padding gives
    columns = forward_columns(vocabulary, workspace_limit())
    order = F.pad(scored.order, (0, -scored.order.shape[0] % ROWS), value=rows)
    buffer = hidden.new_empty(ROWS * columns if order.shape[0] else 0, dtype=torch.float32)
    for block in order.split(ROWS):
        x, aim = _gather(hidden, targets, block)
        parts = []
        for first in range(0, vocabulary, columns):
            part = slice(first, min(first + columns, vocabulary))
            logits = _product(x, lm_head[part].t(), buffer)
            parts.append(_part_statistics(logits, aim - first, bias, part, temperature, softcap, entropy))
        for whole, found in zip(stats, _merge(parts), strict=True):
            if whole.numel():
                whole.index_copy_(-1, block, found)
    return Statistics(*(s[..., :rows].contiguous() for s in stats))


def _part_statistics(
    logits: Tensor, aim: Tensor, bias: Tensor | None, part: slice, temperature: Tensor, softcap: float, entropy: bool
) -> Statistics:
    here = None if bias is None else bias[part]
    return Statistics(*rows_forward(logits, aim, here, temperature, softcap, entropy))


def _merge(parts: list[Statistics]) -> Statistics:
    if len(parts) == 1:
        return parts[0]
    top = torch.stack([part.lse[0] for part in parts]).amax(0)
    total = share_of_part(parts[0], top)
    for part in parts[1:]:
        total += share_of_part(part, top)
    return whole_of_parts(total, top)


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
    work = _Backward(hidden, lm_head, targets, (lse, hit, entropy, grad_logp, grad_entropy), bias, temperature, softcap)
    capacity = scored.order.shape[0]
    itemsize = hidden.element_size()
    cut = plan(capacity, lm_head.shape[1], lm_head.shape[0], itemsize, workspace_limit())
    groups = [scored.order[i : i + cut.rows] for i in range(0, capacity, cut.rows)]
    sums = work.new_sums(needs)
    if len(groups) <= 1 or not needs.hidden:
        work.sweep(groups, cut, sums, needs)
    else:
        for group in groups:
            work.sweep([group], cut, sums, Needs(True, False, False, False))
        if any(needs[1:]):
            work.sweep(groups, cut, sums, needs._replace(hidden=False))
    return work.finish(sums)


class _Backward:
    """One backward: what all its panels share."""

    def __init__(
        self,
        hidden: Tensor,
        lm_head: Tensor,
        targets: Tensor,
        rows: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
        bias: Tensor | None,
        temperature: Tensor,
        softcap: float,
    ) -> None:
        self.hidden, self.lm_head, self.targets = hidden, lm_head, targets
        self.bias, self.temperature, self.softcap = bias, temperature, softcap
        lse, hit, entropy, grad_logp, grad_entropy = rows
        # The place past the rows: p = exp(z - inf) = 0 and no upstream gradient, so that padding adds exact zeros.
        self.lse = F.pad(lse, (0, 1), value=torch.inf)
        self.lse[1, -1] = 0.0
        upstream = (entropy, hit, grad_logp, grad_entropy)
        self.upstream = [None if t is None else F.pad(t.float(), (0, 1)) for t in upstream]

    def new_sums(self, needs: Needs) -> Gradients:
        """Zeroed gradients; dX has one row more, for the padding."""
        hidden, lm_head = self.hidden, self.lm_head
        rows, width = hidden.shape
        return Gradients(
            hidden.new_zeros(rows + 1, width, dtype=gradient_dtype(hidden.dtype)) if needs.hidden else None,
            torch.zeros_like(lm_head, dtype=gradient_dtype(lm_head.dtype)) if needs.lm_head else None,
            hidden.new_zeros(lm_head.shape[0], dtype=torch.float32) if needs.bias and self.bias is not None else None,
            hidden.new_zeros((), dtype=torch.float64) if needs.temperature else None,
        )

    def finish(self, sums: Gradients) -> Gradients:
        hidden, heat = sums.hidden, sums.temperature
        return sums._replace(
            hidden=None if hidden is None else hidden[:-1],
            temperature=None if heat is None else (-heat / self.temperature.double()).float(),
        )

    def sweep(self, groups: list[Tensor], cut: Plan, sums: Gradients, needs: Needs) -> None:
        """Every panel of columns with every group of rows; dX only with a single group."""
        vocabulary, width = self.lm_head.shape
        if not groups or not any(needs):
            return
        rows = groups[0].shape[0]
        buffer = self.hidden.new_empty(rows * cut.columns, dtype=torch.float32)
        dx = self.hidden.new_empty(rows, width, dtype=torch.float32) if needs.hidden else None
        head = sums.lm_head if needs.lm_head else None
        wide = head is None or head.dtype == torch.float32
        scratch = None if wide else self.hidden.new_empty(cut.columns, width, dtype=torch.float32)
        single = _gather(self.hidden, self.targets, groups[0]) if len(groups) == 1 else None
        for first in range(0, vocabulary, cut.columns):
            part = slice(first, min(first + cut.columns, vocabulary))
            for i, group in enumerate(groups):
                x, aim = single or _gather(self.hidden, self.targets, group)
                dlogits, products = self.dlogits(x, aim - first, group, part, buffer)
                if dx is not None:
                    _add_product(dx, dlogits, self.lm_head[part], fresh=first == 0)
                if head is not None:
                    total = head[part] if scratch is None else scratch[: part.stop - first]
                    _add_product(total, dlogits.t(), x, fresh=i == 0)
                if needs.bias and sums.bias is not None:
                    sums.bias[part] += dlogits.sum(dim=0, dtype=torch.float32)
                if needs.temperature and sums.temperature is not None:
                    sums.temperature.add_(products.sum(dtype=torch.float64))
            if head is not None and scratch is not None:
                head[part] = scratch[: part.stop - first]
        if dx is not None and sums.hidden is not None:
            for rows_part, dx_part in zip(groups[0].split(ROWS), dx.split(ROWS), strict=True):  # no second dX at once
                sums.hidden.index_copy_(0, rows_part, dx_part.to(sums.hidden.dtype))

    def dlogits(self, x: Tensor, aim: Tensor, group: Tensor, part: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """One panel: (its gradient [m, P] in the operands' dtype, sum_v dz (z - hit) [m])."""
        logits = _product(x, self.lm_head[part].t(), buffer)
        entropy, hit, grad_logp, grad_entropy = (None if t is None else t[group] for t in self.upstream)
        assert hit is not None
        assert grad_logp is not None
        dtype = x.dtype if x.is_cuda else torch.float32
        return rows_backward_(
            logits,
            aim,
            self.lse[:, group],
            entropy,
            hit,
            grad_logp,
            grad_entropy,
            None if self.bias is None else self.bias[part],
            self.temperature,
            self.softcap,
            dtype,
        )


def _gather(hidden: Tensor, targets: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and targets at ``order``; a place past the rows gives a zero row, whatever is in the rows, and no target."""
    rows = hidden.shape[0]
    past = order == rows
    at = order.clamp(max=rows - 1)
    x = hidden.index_select(0, at).masked_fill_(past.unsqueeze(1), 0.0)
    return x, targets.index_select(0, at).masked_fill_(past, -1)


def _product(x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
    """x w in fp32 in the memory of ``buffer``."""
    out = buffer[: x.shape[0] * w.shape[1]].view(x.shape[0], w.shape[1])
    return _product_into(out, x, w)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a b with fp32 sums, in the dtype of ``out``. On the CPU, which has no mixed products, operands are widened."""
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out.dtype, out=out)
    return out.copy_(a.float() @ b.float())


def _add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total (+)= a b in fp32."""
    if fresh:
        _product_into(total, a, b)
    elif a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, torch.float32, out=total)
    else:
        total += a.float() @ b.float()
