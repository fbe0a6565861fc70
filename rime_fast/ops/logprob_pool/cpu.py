"""The chunked backend on the CPU: library products over bounded blocks of scored rows.

The scored rows are taken out of ``hidden`` a block at a time; the blocks' logits [R, V] (fp32) share one buffer, the
row kernel (rows.py) reads them once for the statistics and once more, in place, for their gradient. Their product
(``set_logits``) gives a row the same bits whatever else is in the batch. dW is accumulated in fp32. Memory beside the
outputs: the block (at most 48 MiB, or 16 rows), its rows, and what the product makes at a time (at most 8 MiB).

Products: 8MHV FLOP when the backward recomputes the logits (`backward`), 6MHV when the gradient is made in the
forward (`forward_with_gradient`), for M scored rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from rime_fast.ops.cpu_products import ROWS, logits_of, product, set_logits, set_or_add_product
from rime_fast.ops.logprob_pool.problem import (
    Gradients,
    Problem,
    Statistics,
    Upstream,
    gradient_dtype,
    loss_slope,
    new_statistics,
)
from rime_fast.ops.logprob_pool.read_outs import ReadOuts, read_outs_forward, scale_, start_gradient_
from rime_fast.ops.logprob_pool.rows import rows_backward_, rows_both_, rows_forward

__all__ = ["backward", "forward", "forward_with_gradient", "scale_", "start_gradient_"]

BLOCK_BYTES = 48 << 20  # of fp32 logits
BLOCK_ROWS = 512  # at most
PANEL_BYTES = 8 << 20  # of a head widened to fp32 a panel at a time
Rows = TypeVar("Rows", Statistics, Upstream)


def block_rows(vocabulary: int) -> int:
    """Rows of one block of logits: a multiple of ROWS, at most BLOCK_ROWS and BLOCK_BYTES but never less than ROWS."""
    return max(ROWS, min(BLOCK_ROWS, BLOCK_BYTES // (4 * vocabulary) // ROWS * ROWS))


def forward(problem: Problem) -> tuple[Statistics, ReadOuts]:
    """Compute the rows' statistics (2MHV FLOP) and the read-outs."""
    blocks = Blocks(problem)
    stats = new_statistics(problem.hidden, problem.options.entropy)
    for rows, logits, targets, _ in blocks:
        blocks.store(stats, rows, rows_forward(logits, targets, problem.scoring, problem.options.entropy))
    return stats, read_outs_forward(problem.hidden, problem.spans, problem.options.normalize)


def backward(problem: Problem, stats: Statistics, upstream: Upstream, rows: Tensor | None) -> Gradients:
    """Compute the gradients, that of hidden on top of the read-outs' ``rows``; makes the logits again: 6MHV FLOP."""
    blocks, sums = Blocks(problem), Sums(problem, rows)
    for at, logits, targets, x in blocks:
        found, above = blocks.pick(stats, at), blocks.pick(upstream, at)
        sums.add(at, x, *rows_backward_(logits, targets, problem.scoring, found, above))
    return sums.finish()


def forward_with_gradient(
    problem: Problem, token_weight: Tensor | None, merge: Callable[[Statistics], Statistics] | None
) -> tuple[Statistics, ReadOuts, Gradients]:
    """Compute the forward, and the gradients of sum_t token_weight_t * (-logp_t) from the same logits: 6MHV FLOP in
    all.

    merge makes a block's statistics those of the whole vocabulary where ``lm_head`` is a part of it; None where not.
    """
    blocks, sums = Blocks(problem), Sums(problem, None)
    stats = new_statistics(problem.hidden, problem.options.entropy)
    upstream = Upstream(loss_slope(problem, token_weight), None)
    for rows, logits, targets, x in blocks:
        given, above = (logits, targets, problem.scoring), blocks.pick(upstream, rows)
        if merge is None:
            found, dlogits, products = rows_both_(
                *given, above.logp, problem.options.entropy, torch.float32, problem.options.needs.temperature
            )
        else:
            found = merge(rows_forward(*given, problem.options.entropy))
            dlogits, products = rows_backward_(*given, found, above)
        blocks.store(stats, rows, found)
        sums.add(rows, x, dlogits, products)
    return stats, read_outs_forward(problem.hidden, problem.spans, problem.options.normalize), sums.finish()


class Blocks:
    """Iterates over the scored rows: (numbers [m], logits [R, V] padded, targets [R] padded, rows [m, H])."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.vocabulary, self.width = problem.lm_head.shape
        self.targets = problem.local_targets
        self.scored = (~problem.ignored).nonzero().squeeze(1)  # counting them costs nothing here
        self.block = block_rows(self.vocabulary)
        rows = _padded(self.scored.shape[0])
        self.buffer: Tensor | None = None  # one block, a head in fp32: nothing would be reused, so nothing is copied
        if rows > self.block or problem.lm_head.dtype != torch.float32:
            self.buffer = torch.empty(min(rows, self.block), self.vocabulary, dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        for rows in self.scored.split(self.block):
            count = rows.shape[0]
            x = torch.empty(_padded(count), self.width, dtype=torch.float32)
            x[:count] = self.problem.hidden.index_select(0, rows)
            x[count:] = 0
            targets = rows.new_full((_padded(count),), -1)
            torch.index_select(self.targets, 0, rows, out=targets[:count])
            yield rows, self.logits(x), targets, x[:count]

    def logits(self, x: Tensor) -> Tensor:
        """Make the logits x W^T, in the buffer where there is one."""
        if self.buffer is None:
            return logits_of(x, self.problem.lm_head)
        out = self.buffer[: x.shape[0]]
        for part, head in head_panels(self.problem.lm_head):
            set_logits(out[:, part], x, head)
        return out

    def pick(self, values: Rows, rows: Tensor) -> Rows:
        """Pick every tensor [..., T] of ``values`` at ``rows``, in fp32, padded with zeros like the block."""

        def picked(value: Tensor | None) -> Tensor | None:
            if value is None or not value.numel():
                return value
            out = value.new_zeros(*value.shape[:-1], _padded(rows.shape[0]), dtype=torch.float32)
            out[..., : rows.shape[0]] = value.index_select(-1, rows)
            return out

        return type(values)(*map(picked, values))  # type: ignore[arg-type]

    def store(self, stats: Statistics, rows: Tensor, found: Statistics) -> None:
        """Store what was found for ``rows``, at their places."""
        for whole, part in zip(stats, found, strict=True):
            if whole.numel():
                whole.index_copy_(-1, rows, part[..., : rows.shape[0]])


class Sums:
    """Collects the gradients over the blocks."""

    def __init__(self, problem: Problem, rows: Tensor | None) -> None:
        self.problem, needs = problem, problem.options.needs
        hidden, lm_head = problem.hidden, problem.lm_head
        self.hidden = torch.empty(hidden.shape, dtype=gradient_dtype(hidden.dtype)) if needs.hidden else None
        if self.hidden is not None:
            start_gradient_(self.hidden, None, rows, problem.spans)
        self.lm_head = torch.empty(lm_head.shape, dtype=torch.float32) if needs.lm_head else None
        self.bias = torch.zeros(lm_head.shape[0], dtype=torch.float32) if needs.bias else None
        self.products = torch.zeros((), dtype=torch.float64) if needs.temperature else None
        self.first = True

    def add(self, rows: Tensor, x: Tensor, dlogits: Tensor, products: Tensor | None) -> None:
        """Add one block: its logits' gradient [R, V] and sum_v dz (z - z[target]) [R]. Padding rows are left out."""
        dlogits = dlogits[: rows.shape[0]]
        if self.hidden is not None:
            dx = self.hidden[rows].float()
            for part, head in head_panels(self.problem.lm_head):
                dx += product(dlogits[:, part], head)
            self.hidden.index_copy_(0, rows, dx.to(self.hidden.dtype))
        if self.lm_head is not None:
            set_or_add_product(self.lm_head, dlogits.t(), x, self.first)
        if self.bias is not None:
            self.bias += dlogits.sum(dim=0, dtype=torch.float32)
        if self.products is not None and products is not None:
            self.products += products[: rows.shape[0]].sum(dtype=torch.float64)
        self.first = False

    def finish(self) -> Gradients:
        """Give the sums, dW in the dtype it waits in."""
        lm_head, d_temperature = self.lm_head, self.products
        if lm_head is not None:
            lm_head = (lm_head.zero_() if self.first else lm_head).to(gradient_dtype(self.problem.lm_head.dtype))
        if d_temperature is not None:
            d_temperature = (-d_temperature / self.problem.scoring.temperature.double()).float()
        return Gradients(self.hidden, lm_head, self.bias, d_temperature)


def head_panels(lm_head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut the head into (slice of the vocabulary, that part in fp32): all of it, or a 16-bit head widened in panels."""
    vocabulary, width = lm_head.shape
    columns = vocabulary if lm_head.dtype == torch.float32 else max(1, PANEL_BYTES // (4 * width))
    for first in range(0, vocabulary, columns):
        part = slice(first, min(first + columns, vocabulary))
        yield part, lm_head[part].float()


def _padded(rows: int) -> int:
    return -(-rows // ROWS) * ROWS
