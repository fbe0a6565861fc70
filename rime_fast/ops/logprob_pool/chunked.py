"""Operator A by library products over blocks of scored rows: one bounded, reused buffer of logits.

The scored rows are taken out of ``hidden`` a block at a time; a block's logits [R, V] (fp32) live in one buffer, the
row kernel (rows.py) reads them once for the statistics and once more, in place, for their gradient. R depends on V
alone and the last block is padded to a multiple of 16 rows, so a row's logits are the same bits whatever else is in
the batch. dW is accumulated in fp32. Memory beside the outputs: the block (on the CPU at
most 48 MiB, or 16 rows) and its rows.

Products: 8MHV FLOP when the backward recomputes the logits (`backward`), 6MHV when the gradient is made in the
forward (`forward_with_gradient`), for M scored rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool.rows import rows_backward_, rows_forward

BLOCK_BYTES = {"cpu": 48 << 20, "cuda": 192 << 20}  # of fp32 logits
BLOCK_ROWS = 512  # at most
PANEL_BYTES = 8 << 20  # of a head widened to fp32 a panel at a time
STEP = 16  # rows are padded to a multiple of this


class Statistics(NamedTuple):
    """Per row, 0 where ignored: log-sum-exp [2, T] (rows.py), the target's score [T], the entropy [T] or [0]."""

    lse: Tensor
    hit: Tensor
    entropy: Tensor


def new_statistics(hidden: Tensor, entropy: bool) -> Statistics:
    """All zero, for the rows of ``hidden``."""
    rows, device = hidden.shape[0], hidden.device
    lse, hit, row_entropy = (torch.zeros(s, device=device) for s in ((2, rows), (rows,), (rows if entropy else 0,)))
    return Statistics(lse, hit, row_entropy)


class Gradients(NamedTuple):
    """What a backward gives; an entry that was not needed is None."""

    hidden: Tensor | None  # [T, H] in gradient_dtype(hidden.dtype)
    lm_head: Tensor | None  # [V, H] in gradient_dtype(lm_head.dtype)
    bias: Tensor | None  # [V] fp32
    temperature: Tensor | None  # 0-d fp32


class Needs(NamedTuple):
    """Which gradients to make."""

    hidden: bool
    lm_head: bool
    bias: bool
    temperature: bool


def block_rows(vocabulary: int, device_type: str = "cpu") -> int:
    """Rows of one block of logits: a multiple of STEP, at most BLOCK_ROWS and BLOCK_BYTES but never less than STEP."""
    rows = BLOCK_BYTES.get(device_type, BLOCK_BYTES["cpu"]) // (4 * vocabulary) // STEP * STEP
    return max(STEP, min(BLOCK_ROWS, rows))


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype gradients wait in between forward and backward: fp16 would underflow before the loss scale arrives."""
    return torch.float32 if dtype == torch.float16 else dtype


def scored_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """Row numbers [M] of the scored rows, ascending."""
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
    stats = blocks.new_statistics(entropy)
    for rows, x, aim in blocks:
        logits = blocks.logits(x)
        blocks.store(stats, rows, rows_forward(logits, aim, bias, temperature, softcap, entropy))
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
            logits, aim, blocks.pick(lse, rows), _maybe(blocks, entropy, rows), blocks.pick(hit, rows),
            blocks.pick(grad_logp, rows), _maybe(blocks, grad_entropy, rows), bias, temperature, softcap,
            blocks.dtype,
        )  # fmt: skip
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
) -> tuple[Statistics, Gradients]:
    """Statistics, and the gradients of sum_t token_weight_t * (-logp_t) from the same logits: 6MHV FLOP in all."""
    blocks = _Blocks(hidden, lm_head, targets, scored)
    stats = blocks.new_statistics(entropy)
    sums = _Sums(blocks, needs, bias)
    grad_logp = -token_weight
    for rows, x, aim in blocks:
        logits = blocks.logits(x)
        found = rows_forward(logits, aim, bias, temperature, softcap, entropy)
        blocks.store(stats, rows, found)
        dlogits, products = rows_backward_(
            logits, aim, found[0], None, found[1], blocks.pick(grad_logp, rows), None, bias, temperature, softcap,
            blocks.dtype,
        )  # fmt: skip
        sums.add(rows, x, dlogits, products)
    return stats, sums.finish(temperature)


def _maybe(blocks: _Blocks, values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else blocks.pick(values, rows)


class _Blocks:
    """Iterates over the scored rows: (row numbers [m], x [R, H] padded with zero rows, targets [R] padded with -1)."""

    def __init__(self, hidden: Tensor, lm_head: Tensor, targets: Tensor, scored: Tensor) -> None:
        self.hidden, self.lm_head, self.targets, self.scored = hidden, lm_head, targets, scored
        self.vocabulary, self.width = lm_head.shape
        self.block = block_rows(self.vocabulary, hidden.device.type)
        rows = min(self.block, -(-scored.shape[0] // STEP) * STEP)
        self.buffer = torch.empty(rows, self.vocabulary, dtype=torch.float32, device=hidden.device)
        self.panel = max(1, PANEL_BYTES // (4 * self.width))
        # On CUDA 16-bit operands go to the tensor cores with fp32 results; on the CPU they are widened panel by panel.
        narrow = hidden.dtype != torch.float32
        self.widen = narrow and not hidden.is_cuda
        self.mixed = narrow and hidden.is_cuda
        self.dtype = hidden.dtype if self.mixed else torch.float32

    def __iter__(self):
        for rows in self.scored.split(self.block):
            count = rows.shape[0]
            padded = -(-count // STEP) * STEP
            x = torch.empty(padded, self.width, dtype=self.dtype, device=self.hidden.device)
            x[:count] = self.hidden.index_select(0, rows)
            x[count:] = 0
            aim = self.targets.new_full((padded,), -1)
            torch.index_select(self.targets, 0, rows, out=aim[:count])
            yield rows, x, aim

    def panels(self):
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
        if self.mixed:
            return torch.mm(x, self.lm_head.t(), torch.float32, out=out)
        for part, head in self.panels():
            torch.mm(x, head.t(), out=out[:, part])
        return out

    def pick(self, values: Tensor, rows: Tensor) -> Tensor:
        """values [..., T] at ``rows``, padded with zeros like the block."""
        padded = -(-rows.shape[0] // STEP) * STEP
        out = values.new_zeros(*values.shape[:-1], padded, dtype=torch.float32)
        out[..., : rows.shape[0]] = values.index_select(-1, rows)
        return out

    def new_statistics(self, entropy: bool) -> Statistics:
        return new_statistics(self.hidden, entropy)

    def store(self, stats: Statistics, rows: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> None:
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
        if self.hidden is not None and self.blocks.mixed:
            dx = torch.mm(dlogits, self.blocks.lm_head, torch.float32)
            self.hidden.index_copy_(0, rows, dx.to(self.hidden.dtype))
        elif self.hidden is not None:
            dx = x.new_zeros(x.shape) if self.blocks.widen else None
            for part, head in self.blocks.panels():
                dx = torch.mm(dlogits, head) if dx is None else dx.addmm_(dlogits[:, part], head)
            assert dx is not None
            self.hidden.index_copy_(0, rows, dx.to(self.hidden.dtype))
        if self.lm_head is not None:
            wide = (torch.float32,) if self.blocks.mixed else ()
            if self.first:
                torch.mm(dlogits.t(), x, *wide, out=self.lm_head)
            else:
                torch.addmm(self.lm_head, dlogits.t(), x, *wide, out=self.lm_head)
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
