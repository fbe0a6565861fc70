"""The chunked backend on CUDA by library products: bounded memory at any batch, no synchronisation.

forward    blocks of ROWS scored rows (padded, so a row's logits are the same bits in any batch) times the head, by wide
           panels of columns; the row kernel's statistics of the panels are merged in a fixed order. 2MHV FLOP.
backward   panels of columns outside, all scored rows inside: logits of the panel [M, P] fp32, their gradient over them
           in the operands' dtype, then dW of the P columns (one product over all rows, as it is wanted) and the panel's
           share of dX, in fp32. 6MHV FLOP: 8MHV with the forward.
both       (forward_with_gradient) chunks of R whole rows: logits by blocks of ROWS, statistics and gradient in place
           (rows.rows_both_), dX, dW. 6MHV FLOP in all. The logits have the operands' dtype
           (rounded once; everything computed from them is fp32), or with RIME_FAST_FP32_LOGITS=1 fp32. One chunk
           writes dW as it is wanted; more add theirs to a dW in fp32, which is cast once.

R is what the workspace holds, and that is at least as large as the head (R = H rows of 16-bit logits) and as a 32nd of
the card's memory (8,704 rows of 151,936 on an H100). A further chunk
reads and writes dW in fp32, 8VH bytes, and saves the second 2RVH FLOP of logits: it pays from R = 4 x FLOP per byte of
the card (295 on an H100) on, 1,180 rows. Below that, and where one chunk does not hold all rows, the logits are made
twice.

The host does not know M: it enqueues work for the capacity (places.Places), in which places past M hold zero rows
with a zero gradient; max_scored makes the capacity M. dX in fp32, the rows and the panel share one budget; where dX
does not fit beside a useful panel the rows go in groups, dX first and dW in a second sweep (10MHV): see ``plan``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool import read_outs, triton
from rime_fast.ops.logprob_pool.places import Places
from rime_fast.ops.logprob_pool.problem import (
    Gradients,
    Needs,
    Problem,
    Statistics,
    Upstream,
    gradient_dtype,
    logits_dtype,
    loss_slope,
    share_of_part,
    whole_of_parts,
    workspace_limit,
)
from rime_fast.ops.logprob_pool.read_outs import ReadOuts
from rime_fast.ops.logprob_pool.rows import rows_backward_, rows_both_, rows_forward

ROWS = 512  # of a block of the forward
WORTHWHILE = 1_180  # rows of a chunk from which on several chunks are faster than making the logits twice
TILED_ROWS = 4096  # from which on tiles make a panel's gradient faster than a product and a row kernel do
STEP = 64  # columns of a panel are a multiple of this, so that its rows start on 16 bytes


def tiled(problem: Problem) -> bool:
    """Whether Triton's tiles make the per-token schedule's logits (tests have its interpreter do it)."""
    return triton.makes_plain_logits(problem)


class Plan(NamedTuple):
    """How the backward is cut: rows of a group, columns of a panel, bytes in use at most."""

    rows: int
    columns: int
    workspace: int


def plan(capacity: int, width: int, vocabulary: int, itemsize: int, limit: int, logit: int = 4) -> Plan:
    """Plan the backward: the largest group of rows whose dX (fp32) and rows take 3/4 of ``limit``, the widest panel, of
    ``logit`` bytes a column and row, in what is left."""
    a_row = (4 + itemsize) * width
    rows = max(1, min(capacity, limit * 3 // 4 // a_row))
    a_column = logit * rows
    if rows < capacity and itemsize < 4:
        a_column += 4 * width  # dW, which several groups add up in fp32
    columns = max(STEP, (limit - rows * a_row) // a_column // STEP * STEP)
    columns = min(columns, -(-vocabulary // STEP) * STEP)
    return Plan(rows, columns, rows * a_row + columns * a_column)


def forward_columns(vocabulary: int, limit: int) -> int:
    """Plan the forward: the columns of its panel are fixed by V and the limit, as the bits of a row depend on them."""
    return max(STEP, min(vocabulary, limit * 3 // 4 // (4 * ROWS) // STEP * STEP))


def whole_rows(capacity: int, vocabulary: int, itemsize: int, limit: int) -> int:
    """Plan how many rows a chunk of whole logits has (a multiple of ROWS), 0 where making the logits twice is the
    better way."""
    room = limit // (itemsize * vocabulary) // ROWS * ROWS
    wanted = -(-capacity // ROWS) * ROWS
    return wanted if wanted <= room else room if room >= WORTHWHILE else 0


def _limit(lm_head: Tensor) -> int:
    return workspace_limit(lm_head.nbytes, lm_head)


def why_not(tensor: Tensor) -> str | None:
    """The reason library products cannot serve a call on ``tensor``, or None."""
    if tensor.dtype == torch.float64:
        return "it computes in fp32; fp64 runs on the reference"
    return triton.why_not(tensor) if tensor.is_cuda else None


def start_gradient_(out: Tensor, factor: Tensor | None, rows: Tensor | None, spans: Any) -> None:
    """Do on CUDA what read_outs.start_gradient_ does."""
    (triton if out.is_cuda else read_outs).start_gradient_(out, factor, rows, spans)


def scale_(out: Tensor, factor: Tensor | None) -> None:
    """Do on CUDA what read_outs.scale_ does."""
    (triton if out.is_cuda else read_outs).scale_(out, factor)


def forward(problem: Problem) -> tuple[Statistics, ReadOuts]:
    """Compute the rows' statistics (2MHV FLOP) and the read-outs."""
    if tiled(problem):
        return triton.forward(problem)
    hidden, vocabulary, options = problem.hidden, problem.lm_head.shape[0], problem.options
    columns = forward_columns(vocabulary, _limit(problem.lm_head))
    places = Places(problem, ROWS)
    # The rows of many blocks are gathered at once, in the quarter of the workspace that the panel leaves.
    at_once = max(1, _limit(problem.lm_head) // 4 // (hidden.element_size() * hidden.shape[1]) // ROWS)
    buffer = hidden.new_empty(ROWS * columns if places.capacity else 0, dtype=torch.float32)
    made = []
    for start in range(0, places.capacity, at_once * ROWS):
        for i, x in enumerate(places.take(hidden, start, at_once * ROWS).split(ROWS)):
            live = slice(start + i * ROWS, min(start + (i + 1) * ROWS, places.capacity))
            parts = []
            for first in range(0, vocabulary, columns):
                part = slice(first, min(first + columns, vocabulary))
                logits = _product(x, problem.lm_head[part].t(), buffer)[: live.stop - live.start]
                targets = _within(places.targets[live], first)
                parts.append(rows_forward(logits, targets, problem.scoring.part(part), options.entropy))
            made.append(_merge(parts))
    return places.spread(made), _read_outs(problem)


def _read_outs(problem: Problem) -> ReadOuts:
    made = triton if problem.hidden.is_cuda else read_outs
    return made.read_outs_forward(problem.hidden, problem.spans, problem.options.normalize)


def _merge(parts: list[Statistics]) -> Statistics:
    if len(parts) == 1:
        return parts[0]
    top = torch.stack([part.lse[0] for part in parts]).amax(0)
    total = share_of_part(parts[0], top)
    for part in parts[1:]:
        total += share_of_part(part, top)
    return whole_of_parts(total, top)


def backward(problem: Problem, stats: Statistics, upstream: Upstream, rows: Tensor | None) -> Gradients:
    """Compute the gradients, that of hidden on top of the read-outs' ``rows``; makes the logits
    again, panel by panel."""
    needs, places = problem.options.needs, Places(problem, 1)
    capacity, itemsize, (vocabulary, width) = places.capacity, problem.hidden.element_size(), problem.lm_head.shape
    work = _Backward(problem, places, stats, upstream, rows)
    logit = 4 if work.tiles is None else itemsize
    cut = plan(capacity, width, vocabulary, itemsize, _limit(problem.lm_head), logit)
    groups = [slice(i, min(i + cut.rows, capacity)) for i in range(0, capacity, cut.rows)]
    if len(groups) <= 1 or not needs.hidden:
        work.sweep(groups, cut, needs)
    else:
        for group in groups:
            work.sweep([group], cut, Needs(hidden=True))
        if any(needs[1:]):
            work.sweep(groups, cut, needs._replace(hidden=False))
    return work.finish()


def forward_with_gradient(
    problem: Problem, token_weight: Tensor | None, merge: Callable[[Statistics], Statistics] | None
) -> tuple[Statistics, ReadOuts, Gradients]:
    """Compute the forward, and the gradients of sum_t token_weight_t * (-logp_t), from the same logits where they fit
    (6MHV).

    merge makes a chunk's statistics those of the whole vocabulary where ``lm_head`` is a part of it; None where not.
    """
    hidden, lm_head, dtype = problem.hidden, problem.lm_head, logits_dtype(problem.hidden.dtype)
    vocabulary, width = lm_head.shape
    needs, bound = problem.options.needs, problem.options.max_scored
    capacity = hidden.shape[0] if bound < 0 else min(bound, hidden.shape[0])
    size = whole_rows(capacity, vocabulary, dtype.itemsize, _limit(lm_head))
    if not any(needs) or (capacity and not size):
        stats, found = forward(problem)
        stats = stats if merge is None else merge(stats)
        return stats, found, backward(problem, stats, Upstream(loss_slope(problem, token_weight), None), None)
    places, sums, weight, made = Places(problem, ROWS, True, token_weight), None, None, []
    buffer = lm_head.new_empty(size * vocabulary, dtype=dtype)
    for first in range(0, capacity, max(size, 1)):
        x = places.take(hidden, first, size)
        logits = buffer[: x.shape[0] * vocabulary].view(-1, vocabulary)
        for part, out in zip(x.split(ROWS), logits.split(ROWS), strict=True):
            _product_into(out, part, lm_head.t())
        if sums is None:  # only now, so that the device has the first products by then
            sums = _Sums(problem, None, scored=True)
            if needs.lm_head and capacity > size:
                weight = lm_head.new_empty(vocabulary, width, dtype=torch.float32)
        live = slice(first, min(first + size, capacity))  # what fills a block up has had its use
        x, logits, above = x[: live.stop - first], logits[: live.stop - first], places.slope[live]  # type: ignore
        rows = logits, places.targets[live], problem.scoring
        narrow = dtype if dtype != torch.float32 or not x.is_cuda else x.dtype
        if merge is None:
            own, dlogits, products = rows_both_(*rows, above, problem.options.entropy, narrow, needs.temperature)
        else:
            own = merge(rows_forward(*rows, problem.options.entropy))
            dlogits, products = rows_backward_(*rows, own, Upstream(above, None), narrow)
        made.append(own)
        if sums.hidden is not None:
            places.put(_product_into(sums.hidden.new_empty(x.shape), dlogits, lm_head), first, sums.hidden)
        if weight is not None:
            _add_product(weight, dlogits.t(), x, fresh=first == 0)
        elif sums.lm_head is not None:
            _product_into(sums.lm_head, dlogits.t(), x)
        if sums.bias is not None:
            sums.bias += dlogits.sum(dim=0, dtype=torch.float32)
        if sums.products is not None and products is not None:
            sums.products.add_(products.sum(dtype=torch.float64))
    sums = sums or _Sums(problem, None, scored=False)
    if weight is not None and sums.lm_head is not None:
        sums.lm_head.copy_(weight)
    return places.spread(made), _read_outs(problem), sums.finish()


class _Sums:
    """The gradients of one call as they add up."""

    def __init__(self, problem: Problem, rows: Tensor | None, scored: bool) -> None:
        """rows: the read-outs' gradient. scored: whether a row of the head's may be; then all of dW is written."""
        self.problem, needs = problem, problem.options.needs
        hidden, lm_head = problem.hidden, problem.lm_head
        self.hidden = self.lm_head = self.bias = self.products = None
        if needs.hidden:  # and one row more, for the padding
            self.hidden = hidden.new_zeros(hidden.shape[0] + 1, hidden.shape[1], dtype=gradient_dtype(hidden.dtype))
            if rows is not None:
                start_gradient_(self.hidden[:-1], None, rows, problem.spans)
        if needs.lm_head:
            made = torch.empty_like if scored else torch.zeros_like
            self.lm_head = made(lm_head, dtype=gradient_dtype(lm_head.dtype))
        if needs.bias:
            self.bias = hidden.new_zeros(lm_head.shape[0], dtype=torch.float32)
        if needs.temperature:
            self.products = hidden.new_zeros((), dtype=torch.float64)

    def finish(self) -> Gradients:
        d_temperature = self.products
        if d_temperature is not None:
            d_temperature = (-d_temperature / self.problem.scoring.temperature.double()).float()
        return Gradients(None if self.hidden is None else self.hidden[:-1], self.lm_head, self.bias, d_temperature)


class _Backward(_Sums):
    """One backward that makes the logits again: what all its panels share."""

    def __init__(
        self, problem: Problem, places: Places, stats: Statistics, upstream: Upstream, rows: Tensor | None
    ) -> None:
        super().__init__(problem, rows, scored=places.capacity > 0)
        self.places, self.started = places, rows is not None
        self.stats, self.upstream = places.pick(stats, upstream)
        plain = upstream.entropy is None and not problem.options.needs.temperature and places.capacity >= TILED_ROWS
        self.tiles = triton.Launch(problem, False, triton.DLOGITS_WIDE) if plain and tiled(problem) else None

    def sweep(self, groups: list[slice], cut: Plan, needs: Needs) -> None:
        """Every panel of columns with every group of rows; dX only with a single group."""
        hidden, lm_head, places = self.problem.hidden, self.problem.lm_head, self.places
        vocabulary, width = lm_head.shape
        if not groups or not any(needs):
            return
        rows, single = groups[0].stop - groups[0].start, len(groups) == 1
        buffer = hidden.new_empty(rows, cut.columns, dtype=torch.float32 if self.tiles is None else hidden.dtype)
        dx = None
        if needs.hidden and self.hidden is not None:
            dx = hidden.new_empty(rows, width, dtype=torch.float32)
            if self.started:  # with the read-outs' gradient
                dx = places.take(self.hidden, groups[0].start, rows, torch.float32)
        head = self.lm_head if needs.lm_head else None
        # A panel of one group is complete at once; what several add up is fp32.
        wide = head is None or single or head.dtype == torch.float32
        scratch = None if wide else hidden.new_empty(cut.columns, width, dtype=torch.float32)
        whole = places.take(hidden, groups[0].start, rows) if single else None
        known = [
            (
                Statistics(*(t[..., group].contiguous() if t.numel() else t for t in self.stats)),
                Upstream(*(None if t is None else t[group] for t in self.upstream)),  # type: ignore[arg-type]
            )
            for group in groups
        ]
        for first in range(0, vocabulary, cut.columns):
            part = slice(first, min(first + cut.columns, vocabulary))
            for i, group in enumerate(groups):
                x = places.take(hidden, group.start, group.stop - group.start) if whole is None else whole
                dlogits, products = self.dlogits(x, places.targets[group], *known[i], part, buffer)
                if dx is not None:
                    _add_product(dx, dlogits, lm_head[part], fresh=first == 0 and not self.started)
                if head is not None:
                    total = head[part] if scratch is None else scratch[: part.stop - first]
                    if single:
                        _product_into(total, dlogits.t(), x)
                    else:
                        _add_product(total, dlogits.t(), x, fresh=i == 0)
                if needs.bias and self.bias is not None:
                    self.bias[part] += dlogits.sum(dim=0, dtype=torch.float32)
                if needs.temperature and self.products is not None and products is not None:
                    self.products.add_(products.sum(dtype=torch.float64))
            if head is not None and scratch is not None:
                head[part] = scratch[: part.stop - first]
        if dx is not None and self.hidden is not None:
            places.put(dx, groups[0].start, self.hidden)

    def dlogits(
        self, x: Tensor, targets: Tensor, stats: Statistics, upstream: Upstream, part: slice, buffer: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """One panel: (its gradient [m, P] in the operands' dtype, sum_v dz (z - z[target]) [m] or None)."""
        if self.tiles is not None:
            panel, columns = buffer[: x.shape[0]], part.stop - part.start
            triton.dlogits(self.tiles, x, None, targets, stats, upstream, panel, None, part.start, columns)
            return panel[:, :columns], None
        logits, targets = _product(x, self.problem.lm_head[part].t(), buffer.view(-1)), _within(targets, part.start)
        dtype = x.dtype if x.is_cuda else torch.float32
        return rows_backward_(logits, targets, self.problem.scoring.part(part), stats, upstream, dtype)


def _within(targets: Tensor, first: int) -> Tensor:
    """Targets as columns of a panel that begins with column ``first``."""
    return targets if first == 0 else targets - first


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
