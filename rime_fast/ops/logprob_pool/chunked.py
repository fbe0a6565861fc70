"""Operator A on the CPU by library products over blocks of scored rows: one bounded, reused buffer of logits.

The scored rows are taken out of ``hidden`` a block at a time; a block's logits [R, V] (fp32) live in one buffer, the
row kernel (rows.py) reads them once for the statistics and once more, in place, for their gradient. R depends on V
alone and the last block is padded to a multiple of 16 rows, so a row's logits are the same bits whatever else is in
the batch. dW is accumulated in fp32. Memory beside the outputs: the block (at most 48 MiB, or 16 rows) and its rows.
CUDA has a schedule of its own, panels.py.

Products: 8MHV FLOP when the backward recomputes the logits (`backward`), 6MHV when the gradient is made in the
forward (`forward_with_gradient`), for M scored rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rime_fast.ops.cpu_products import product, set_or_add_product
from rime_fast.ops.logprob_pool.rows import rows_backward_, rows_forward
from rime_fast.ops.logprob_pool.statistics import Gradients, Needs, Statistics, gradient_dtype, new_statistics

BLOCK_BYTES = 48 << 20  # of fp32 logits
BLOCK_ROWS = 512  # at most
PANEL_BYTES = 8 << 20  # of a head widened to fp32 a panel at a time
STEP = 16  # rows are padded to a multiple of this


def block_rows(vocabulary: int) -> int:
    """Rows of one block of logits: a multiple of STEP, at most BLOCK_ROWS and BLOCK_BYTES but never less than STEP."""
    rows = BLOCK_BYTES // (4 * vocabulary) // STEP * STEP
    return max(STEP, min(BLOCK_ROWS, rows))


def scored_rows(targets: Tensor, ignore_index: int, max_scored: int = -1) -> Tensor:
    """Row numbers [M] of the scored rows, ascending; counting them costs nothing here."""
    return (targets != ignore_index).nonzero().squeeze(1)


def forward(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    scored: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    entropy: bool,
) -> Statistics:
    """The rows' statistics; 2MHV FLOP."""
    blocks = _Blocks(hidden, lm_head, targets, scored)
    stats = new_statistics(hidden, entropy)
    for rows, x, aim in blocks:
        logits = blocks.logits(x)
        blocks.store(stats, rows, Statistics(*rows_forward(logits, aim, bias, temperature, softcap, entropy)))
    return stats


def backward(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    scored: Tensor,
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
    """Gradients of the rows from upstream gradients [T]; recomputes the logits: 2MHV + 2MHV (dX) + 2MHV (dW) FLOP."""
    blocks = _Blocks(hidden, lm_head, targets, scored)
    sums = _Sums(blocks, needs, bias)
    for rows, x, aim in blocks:
        logits = blocks.logits(x)
        dlogits, products = rows_backward_(
            logits,
            aim,
            blocks.pick(lse, rows),
            _maybe(blocks, entropy, rows),
            blocks.pick(hit, rows),
            blocks.pick(grad_logp, rows),
            _maybe(blocks, grad_entropy, rows),
            bias,
            temperature,
            softcap,
        )
        sums.add(rows, x, dlogits, products)
    return sums.finish(temperature)


def forward_with_gradient(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    scored: Tensor,
    token_weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    entropy: bool,
    needs: Needs,
    merge: Callable[[Statistics], Statistics] | None = None,
) -> tuple[Statistics, Gradients]:
    """Statistics, and the gradients of sum_t token_weight_t * (-logp_t) from the same logits: 6MHV FLOP in all.

    merge makes a block's statistics those of the whole vocabulary where ``lm_head`` is a part of it.
    """
    blocks = _Blocks(hidden, lm_head, targets, scored)
    stats = new_statistics(hidden, entropy)
    sums = _Sums(blocks, needs, bias)
    grad_logp = -token_weight
    for rows, x, aim in blocks:
        logits = blocks.logits(x)
        found = Statistics(*rows_forward(logits, aim, bias, temperature, softcap, entropy))
        found = merge(found) if merge else found
        blocks.store(stats, rows, found)
        dlogits, products = rows_backward_(
            logits, aim, found.lse, None, found.hit, blocks.pick(grad_logp, rows), None, bias, temperature, softcap
        )
        sums.add(rows, x, dlogits, products)
    return stats, sums.finish(temperature)


def _maybe(blocks: _Blocks, values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else blocks.pick(values, rows)


class _Blocks:
    """Iterates over the scored rows: (row numbers [m], x [R, H] padded with zero rows, targets [R] padded with -1)."""

    def __init__(self, hidden: Tensor, lm_head: Tensor, targets: Tensor, scored: Tensor) -> None:
        self.hidden, self.lm_head, self.targets, self.scored = hidden, lm_head, targets, scored
        self.vocabulary, self.width = lm_head.shape
        self.block = block_rows(self.vocabulary)
        rows = min(self.block, -(-scored.shape[0] // STEP) * STEP)
        self.buffer = torch.empty(rows, self.vocabulary, dtype=torch.float32, device=hidden.device)
        self.panel = max(1, PANEL_BYTES // (4 * self.width))
        self.widen = hidden.dtype != torch.float32  # the head is made fp32 panel by panel

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in self.scored.split(self.block):
            count = rows.shape[0]
            padded = -(-count // STEP) * STEP
            x = torch.empty(padded, self.width, dtype=torch.float32, device=self.hidden.device)
            x[:count] = self.hidden.index_select(0, rows)
            x[count:] = 0
            aim = self.targets.new_full((padded,), -1)
            torch.index_select(self.targets, 0, rows, out=aim[:count])
            yield rows, x, aim

    def panels(self) -> Iterator[tuple[slice, Tensor]]:
        """(slice of the vocabulary, that part of the head in fp32)."""
        if not self.widen:
            yield slice(0, self.vocabulary), self.lm_head
            return
        for first in range(0, self.vocabulary, self.panel):
            part = slice(first, min(first + self.panel, self.vocabulary))
            yield part, self.lm_head[part].float()

    def logits(self, x: Tensor) -> Tensor:
        """x W^T into the buffer."""
        out = self.buffer[: x.shape[0]]
        for part, head in self.panels():
            torch.mm(x, head.t(), out=out[:, part])
        return out

    def pick(self, values: Tensor, rows: Tensor) -> Tensor:
        """values [..., T] at ``rows``, padded with zeros like the block."""
        padded = -(-rows.shape[0] // STEP) * STEP
        out = values.new_zeros(*values.shape[:-1], padded, dtype=torch.float32)
        out[..., : rows.shape[0]] = values.index_select(-1, rows)
        return out

    def store(self, stats: Statistics, rows: Tensor, found: Statistics) -> None:
        for whole, part in zip(stats, found, strict=True):
            if whole.numel():
                whole.index_copy_(-1, rows, part[..., : rows.shape[0]])


class _Sums:
    """Collects the gradients over the blocks."""

    def __init__(self, blocks: _Blocks, needs: Needs, bias: Tensor | None) -> None:
        self.blocks, self.needs = blocks, needs
        hidden, lm_head = blocks.hidden, blocks.lm_head
        self.hidden = hidden.new_zeros(hidden.shape, dtype=gradient_dtype(hidden.dtype)) if needs.hidden else None
        self.lm_head = torch.empty(lm_head.shape, dtype=torch.float32, device=hidden.device) if needs.lm_head else None
        wants_bias = needs.bias and bias is not None
        self.bias = hidden.new_zeros(lm_head.shape[0], dtype=torch.float32) if wants_bias else None
        self.products = hidden.new_zeros((), dtype=torch.float64) if needs.temperature else None
        self.first = True

    def add(self, rows: Tensor, x: Tensor, dlogits: Tensor, products: Tensor) -> None:
        """One block: its logits' gradient [R, V] and sum_v dz (z - centre) [R]. Padding rows are left out."""
        count = rows.shape[0]
        x, dlogits = x[:count], dlogits[:count]
        dx: Tensor | None
        if self.hidden is not None:
            dx = x.new_zeros(x.shape) if self.blocks.widen else None
            for part, head in self.blocks.panels():
                dx = product(dlogits, head) if dx is None else dx.addmm_(dlogits[:, part], head)
            assert dx is not None
            self.hidden.index_copy_(0, rows, dx.to(self.hidden.dtype))
        if self.lm_head is not None:
            set_or_add_product(self.lm_head, dlogits.t(), x, self.first)
        if self.bias is not None:
            self.bias += dlogits.sum(dim=0, dtype=torch.float32)
        if self.products is not None:
            self.products += products[:count].sum(dtype=torch.float64)
        self.first = False

    def finish(self, temperature: Tensor) -> Gradients:
        head = self.lm_head
        if head is not None:
            head = head.zero_() if self.first else head
            head = head.to(gradient_dtype(self.blocks.lm_head.dtype))
        heat = None if self.products is None else (-self.products / temperature.double()).float()
        return Gradients(self.hidden, head, self.bias, heat)
