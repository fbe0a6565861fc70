"""The sweep of the chunked backends: a library product fills a tile of similarities, a row kernel consumes it at once.

Forward: one product a tile gives the statistics of its rows AND its columns (2 N K D FLOP a term). Backward: the same
product again, turned in place into the gradient G of the tile, then dq += G k and dk += G^T q (6 N K D FLOP). Memory:
one tile plus O(N D). Tiles, and with them all sums, depend on the shapes alone: the result is deterministic.

Row kernels come compiled (csrc, fp32 tiles) or in plain torch (fp64, installations without a compiler). Element rules
are documented in csrc/rime; both follow them. Sizes of tiles and operands are the device's: cpu.py, cuda.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rime_fast.ops import cpu_products, native
from rime_fast.ops.contrastive.problem import SAME_SIMILARITY, accumulation_dtype
from rime_fast.ops.contrastive.softmax import Slopes, Statistics


@dataclass
class Masks:
    """The candidates that do not count: ids as int32 classes, limits as similarities; None where there is no such mask.

    labels [N, P] int64: the positives of each row; one outside the keys at hand (or -1) is not met here. row_ids [N],
    col_ids [K] int32. row_limit [N], col_limit [K]: a candidate more similar than this is
    left out of that row's / column's softmax.
    """

    labels: Tensor
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None

    def columns(self, start: int, stop: int, labels: Tensor) -> Masks:
        """The same rows against keys start .. stop - 1 only; labels: those of the rows from key ``start`` on."""
        return replace(
            self,
            labels=labels,
            col_ids=None if self.col_ids is None else self.col_ids[start:stop],
            col_limit=None if self.col_limit is None else self.col_limit[start:stop],
        )


def id_classes(ids: Tensor) -> Tensor:
    """Number 64-bit ids as int32 classes, equal exactly where the ids are: half the bytes to compare in a tile.

    By a sort, as counting classes (torch.unique) would make the host wait for an accelerator.
    """
    ordered, place = ids.sort()
    rank = torch.zeros_like(place)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(rank, dtype=torch.int32).scatter_(0, place, rank.to(torch.int32))


def pair_similarity(queries: Tensor, keys: Tensor, at: Tensor) -> Tensor:
    """Compute the similarity of each query with the keys ``at`` [N, P], [N, P], and what counts as equal to it, added.

    By blocks (no copy of the keys).
    """
    dtype = accumulation_dtype(queries.dtype)
    columns = []
    for column in at.unbind(1):
        parts = []
        for q, index in zip(queries.split(4096), column.split(4096), strict=True):
            q, k = q.to(dtype), keys[index].to(dtype)
            parts.append((q * k).sum(1) + SAME_SIMILARITY * q.norm(dim=1) * k.norm(dim=1))
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=1)


# Library products with fp32 accumulation and result, whatever the operands' dtype. Gradients of similarities reach them
# relative to the largest factor of the call (``unit_of``), so that G stays within +-2 and neither bf16 nor fp16 can
# underflow, whatever the batch size and the loss scale.


def similarities(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute a tile of similarities, out = a b^T, by the library that is faster here."""
    if a.dtype == out.dtype:
        return torch.mm(a, b.T, out=out)
    if not a.is_cuda:
        return torch.mm(a.to(out.dtype), b.T.to(out.dtype), out=out)
    return torch.mm(a, b.T, out_dtype=out.dtype, out=out)


def add_product(into: Tensor | None, rows: slice, a: Tensor, b: Tensor) -> None:
    """Add a product to some rows of a gradient, into[rows] += a b; does nothing where ``into`` is not wanted."""
    if into is None:
        return
    target = into[rows]
    if a.dtype == target.dtype:
        cpu_products.add_product(target, a, b)
    elif not a.is_cuda:
        target.addmm_(a.to(target.dtype), b.to(target.dtype))
    else:
        torch.addmm(target, a, b, out_dtype=target.dtype, out=target)


def unit_of(factors: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The unit of 16-bit gradients, 0-d: the largest factor in magnitude; None (no unit is needed) for other dtypes."""
    if dtype in (torch.float32, torch.float64):
        return None
    largest = factors.abs().amax()
    return torch.where(largest > 0, largest, 1.0)


def scale_by(unit: Tensor | None, tensors: Sequence[Tensor | None]) -> None:
    """Give gradients that were made relative to ``unit`` their size, in place."""
    if unit is None:
        return
    for tensor in tensors:
        if tensor is not None:
            tensor.mul_(unit)


def sized(gradient: Tensor | None, unit: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Give one gradient its size and its last dtype, in one pass over it."""
    if gradient is None or unit is None:
        return None if gradient is None else gradient.to(dtype)
    return torch.mul(gradient, unit, out=gradient if gradient.dtype == dtype else gradient.new_empty(0, dtype=dtype))


@dataclass
class TileSweep:
    """One pass over the tiles of all terms; queries and keys are contiguous, their rows of one dtype.

    tile: (rows, columns) of a tile at most. align: elements at whose multiples a tile's rows start. kept: memory
    [terms, N, K up to align] for all similarities, filled by ``statistics`` and read by ``gradients`` (6 N K D FLOP a
    term in all instead of 8).
    """

    queries: list[Tensor]
    keys: list[Tensor]
    terms: Sequence[tuple[int, int]]
    masks: list[Masks]
    rows: CompiledRows | TorchRows
    tile: tuple[int, int]
    align: int
    row_products: list[Tensor] = field(init=False, default_factory=list)  # of nested widths: [inner widths, N] a term
    kept: Tensor | None = field(init=False, default=None)

    def tiles(self, q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """Make the tiles one after the other: (similarities of a tile, first row, first column), each valid until the
        next."""
        height, width = min(self.tile[0], q.shape[0]), min(self.tile[1], k.shape[0])
        buffer: Tensor | None = None
        for row in range(0, q.shape[0], height):
            for col in range(0, k.shape[0], width):
                block, candidates = q[row : row + height], k[col : col + width]
                if cpu_products.fast_products(block, candidates.T):
                    yield cpu_products.fast_product(block, candidates.T), row, col
                    continue
                if buffer is None:
                    buffer = q.new_empty(height * (width + self.align - 1), dtype=accumulation_dtype(q.dtype))
                rows, cols = block.shape[0], candidates.shape[0]
                stride = -(-cols // self.align) * self.align
                tile = buffer[: rows * stride].view(rows, stride)[:, :cols]
                yield similarities(block, candidates, tile), row, col

    def statistics(self, into: Statistics) -> None:
        """Add every tile of every term to that term's statistics."""
        for term, ((q, k), masks, state) in enumerate(zip(self.terms, self.masks, into, strict=True)):
            if self.kept is not None:
                whole = self.kept[term, :, : self.keys[k].shape[0]]
                self.rows.statistics(similarities(self.queries[q], self.keys[k], whole), 0, 0, masks, state)
                continue
            for tile, row, col in self.tiles(self.queries[q], self.keys[k]):
                self.rows.statistics(tile, row, col, masks, state)
                del tile  # before the next one is made

    def gradients(self, slopes: Slopes, dq: list[Tensor | None], dk: list[Tensor | None]) -> None:
        """Add every tile's gradient to dq and dk (None: not wanted)."""
        out = None if self.kept is None else self.kept.new_empty(self.kept.shape[1:], dtype=self.queries[0].dtype)
        for term, ((qm, km), masks, slope) in enumerate(zip(self.terms, self.masks, slopes, strict=True)):
            q, k = self.queries[qm], self.keys[km]
            if self.kept is not None and out is not None:
                whole = self.kept[term, :, : k.shape[0]]
                g = self.rows.gradient(whole, 0, 0, masks, slope, q.dtype, out[:, : k.shape[0]])
                add_product(dq[qm], slice(None), g, k)
                add_product(dk[km], slice(None), g.T, q)
                continue
            for tile, row, col in self.tiles(q, k):
                g = self.rows.gradient(tile, row, col, masks, slope, q.dtype)
                rows, cols = slice(row, row + g.shape[0]), slice(col, col + g.shape[1])
                add_product(dq[qm], rows, g, k[cols])
                add_product(dk[km], cols, g.T, q[rows])
                del tile, g


def has_compiled_rows(tensor: Tensor) -> bool:
    """Whether the compiled kernels handle the tiles of these operands."""
    return tensor.dtype != torch.float64 and native.available(cuda=tensor.is_cuda)


Norms = tuple[list[Tensor], list[Tensor]]  # inverse norms of queries and of keys, of each width


class NestedRows:
    """Takes nested widths by a kernel's own ``statistics`` and ``gradient``, with what is between them in torch."""

    if TYPE_CHECKING:
        statistics: Any
        gradient: Any

    def nested_statistics(
        self, parts: list[Tensor], row: int, col: int, norms: Norms, masks: list[Masks], into: Statistics
    ) -> None:
        """Add a tile's partial products, which are used up."""
        _prefix(parts, row, col, norms)
        for tile, mask, state in zip(parts, masks, into, strict=True):
            self.statistics(tile, row, col, mask, state)

    def nested_gradient(
        self,
        parts: list[Tensor],
        row: int,
        col: int,
        norms: Norms,
        masks: list[Masks],
        slopes: Slopes,
        by_row: Tensor,
        by_col: Tensor,
    ) -> None:
        """Turn partial products into the gradients to themselves; sum G S of the inner widths is added to by_row
        [widths - 1, N] and by_col [widths - 1, K]."""
        _prefix(parts, row, col, norms)
        rows, cols = slice(row, row + parts[0].shape[0]), slice(col, col + parts[0].shape[1])
        for at in reversed(range(len(parts))):
            tile, inner = parts[at], at < len(by_row)
            kept = tile.clone() if inner else tile
            g = self.gradient(tile, row, col, masks[at], slopes[at], tile.dtype)
            if inner:
                kept.mul_(g)
                by_row[at, rows] += kept.sum(1)
                by_col[at, cols] += kept.sum(0)
                g.mul_(norms[0][at][rows, None]).mul_(norms[1][at][None, cols]).add_(parts[at + 1])
            parts[at] = g


def _prefix(parts: list[Tensor], row: int, col: int, norms: Norms) -> None:
    """Partial products to the similarities at each width, in place."""
    total = parts[0].clone()
    for at, part in enumerate(parts):
        total = total if at == 0 else total.add_(part)
        a, b = norms[0][at][row : row + part.shape[0], None], norms[1][at][None, col : col + part.shape[1]]
        torch.mul(total, a, out=part).mul_(b)


class CompiledRows(NestedRows):
    """Runs csrc's kernels on one tile: that of keys ``col`` onwards and queries ``row`` onwards, in fp32.

    flag: 0-d int32, 1 when every |logit| <= BOUNDED.
    """

    def __init__(self, scale: Tensor, flag: Tensor) -> None:
        self.scale, self.flag = scale, flag

    def statistics(self, tile: Tensor, row: int, col: int, masks: Masks, into: Statistics) -> None:
        torch.ops.rime_fast_C.contrast_statistics(
            tile,
            self.scale,
            row,
            col,
            masks.labels,
            masks.row_ids,
            masks.col_ids,
            masks.row_limit,
            masks.col_limit,
            self.flag,
            into.row_max,
            into.row_sum,
            into.col_max,
            into.col_sum,
            into.positive,
            into.rival,
            self.workspace(tile),
        )

    def gradient(
        self,
        tile: Tensor,
        row: int,
        col: int,
        masks: Masks,
        slopes: Slopes,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Turn the tile's similarities into their gradient, in ``dtype``, in the memory of ``out`` (the tile's, where
        none is given)."""
        if out is None:
            out = self.narrow(tile, dtype)
        elif not tile.is_cuda:  # whose kernel works in place
            tile = out = tile.clone()
        torch.ops.rime_fast_C.contrast_gradient(
            tile,
            self.scale,
            row,
            col,
            masks.labels,
            masks.row_ids,
            masks.col_ids,
            masks.row_limit,
            masks.col_limit,
            self.flag,
            slopes.row_shift,
            slopes.row_coef,
            slopes.col_shift,
            slopes.col_coef,
            slopes.positive_slope,
            slopes.factor,
            out,
        )
        return out

    def workspace(self, tile: Tensor) -> Tensor | None:
        """The memory that the statistics kernel needs besides."""
        return None

    def narrow(self, tile: Tensor, dtype: torch.dtype) -> Tensor:
        """The memory that the gradient goes to."""
        return tile


class TorchRows(NestedRows):
    """Does what ``CompiledRows`` does in torch operations, for any dtype and device (nothing is read back)."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def statistics(self, tile: Tensor, row: int, col: int, masks: Masks, into: Statistics) -> None:
        rows, cols = slice(row, row + tile.shape[0]), slice(col, col + tile.shape[1])
        row_masked, col_masked = _masked(tile, rows, cols, masks)
        logits = tile * self.scale
        labels = masks.labels[rows]
        met = (labels >= cols.start) & (labels < cols.stop)
        found = logits.gather(1, torch.where(met, labels - cols.start, 0))
        into.positive[rows] = torch.where(met, found, into.positive[rows])
        by_row = logits.masked_fill(row_masked, -torch.inf)
        into.rival[rows] = torch.maximum(into.rival[rows], by_row.amax(1))
        _merge(by_row, 1, into.row_max[rows], into.row_sum[rows], into.shiftless)
        _merge(logits.masked_fill_(col_masked, -torch.inf), 0, into.col_max[cols], into.col_sum[cols], into.shiftless)

    def gradient(
        self,
        tile: Tensor,
        row: int,
        col: int,
        masks: Masks,
        slopes: Slopes,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Do what ``CompiledRows.gradient`` does; a narrow dtype takes memory of its own."""
        rows, cols = slice(row, row + tile.shape[0]), slice(col, col + tile.shape[1])
        row_masked, col_masked = _masked(tile, rows, cols, masks)
        logits = tile * self.scale
        by_row = (logits - slopes.row_shift[rows, None]).exp_().mul_(slopes.row_coef[rows, None])
        by_col = (logits - slopes.col_shift[None, cols]).exp_().mul_(slopes.col_coef[None, cols])
        total = by_row.masked_fill_(row_masked, 0).add_(by_col.masked_fill_(col_masked, 0))
        for index in range(masks.labels.shape[1]):
            here = masks.labels[rows, index, None] == torch.arange(cols.start, cols.stop, device=tile.device)
            total = torch.where(here, slopes.positive_slope[rows, index, None], total)
        return torch.mul(total, slopes.factor, out=tile if out is None else total).to(dtype)


def _masked(tile: Tensor, rows: slice, cols: slice, masks: Masks) -> tuple[Tensor, Tensor]:
    """(no rival for the row, no rival for the column) of a tile, boolean; positives are neither's."""
    columns = torch.arange(cols.start, cols.stop, device=tile.device)
    own = torch.zeros_like(tile, dtype=torch.bool)
    for labels in masks.labels[rows].unbind(1):
        own |= labels[:, None] == columns
    row_masked = col_masked = torch.zeros_like(own)
    if masks.row_ids is not None and masks.col_ids is not None:
        row_masked = col_masked = masks.row_ids[rows, None] == masks.col_ids[None, cols]
    if masks.row_limit is not None and masks.col_limit is not None:
        row_masked = row_masked | (tile > masks.row_limit[rows, None])
        col_masked = col_masked | (tile > masks.col_limit[None, cols])
    return row_masked | own, col_masked | own


def _merge(logits: Tensor, dim: int, running_max: Tensor, running_sum: Tensor, shiftless: bool) -> None:
    """Add a tile's exponentials to running (max, sum) views; masked logits are -inf."""
    if shiftless:
        running_sum += logits.exp_().sum(dim)
        return
    new_max = torch.maximum(running_max, logits.amax(dim))
    shift = torch.where(new_max == -torch.inf, 0, new_max)
    part = (logits - shift.unsqueeze(dim)).exp_().sum(dim)
    running_sum.mul_((running_max - shift).double().exp()).add_(part)
    running_max.copy_(new_max)
