"""Nested widths (Matryoshka) in one sweep: partial products on the way to the widest, suffix sums on the way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from rime_fast.ops import cpu_products
from rime_fast.ops.contrastive.problem import accumulation_dtype, inverse_norms
from rime_fast.ops.contrastive.softmax import Slopes, Statistics
from rime_fast.ops.contrastive.tiles import TileSweep, add_product, similarities

NARROW = 128  # columns


@dataclass
class NestedSweep(TileSweep):
    """One pass over nested widths (Matryoshka): every width at the products of the widest alone.

    Rows have unit norm at the widest, whose similarities P are a sum of partial products over the columns between one
    width and the next. On the way width m has S_m = P_m a_m b_m^T, with a_m and b_m the inverse norms of its part of
    the rows. Backward, with G_m the gradient to S_m: the columns between two widths get the sum of a_m b_m^T G_m over
    all widths that hold them (a suffix sum), and each row of width m loses its own direction times sum_j G_m S_m.
    """

    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.query_norms = [all_inverse_norms(q, self.widths) for q in self.queries]
        self.key_norms = [all_inverse_norms(k, self.widths) for k in self.keys]
        self.query_parts = [_parts(q, self.widths) for q in self.queries]
        self.key_parts = [_parts(k, self.widths) for k in self.keys]

    def nested(self, qm: int, km: int) -> Iterator[tuple[list[Tensor], int, int]]:
        """Make the tiles of partial products: (one for each width, first row, first column), valid until the next."""
        q, k = self.queries[qm], self.keys[km]
        height, width = (-(-n // -(-n // most)) for n, most in zip((q.shape[0], k.shape[0]), self.tile, strict=True))
        buffers: Tensor | None = None
        found: list[Tensor] = list(self.query_parts[qm])  # replaced one by one, so that memory is used again in place
        for row in range(0, q.shape[0], height):
            for col in range(0, k.shape[0], width):
                rows, cols = min(height, q.shape[0] - row), min(width, k.shape[0] - col)
                stride = -(-cols // self.align) * self.align
                for at, (left, right) in enumerate(zip(self.query_parts[qm], self.key_parts[km], strict=True)):
                    block, candidates = left[row : row + rows], right[col : col + cols]
                    if cpu_products.fast_products(block, candidates.T):
                        found[at] = cpu_products.fast_product(block, candidates.T)
                        continue
                    if buffers is None:
                        size = height * (width + self.align - 1)
                        buffers = q.new_empty(len(self.widths), size, dtype=accumulation_dtype(q.dtype))
                    tile = buffers[at, : rows * stride].view(rows, stride)[:, :cols]
                    found[at] = similarities(block, candidates, tile)
                yield found, row, col

    def statistics(self, into: Statistics) -> None:
        for term, (qm, km) in enumerate(self.terms):
            losses = slice(term * len(self.widths), (term + 1) * len(self.widths))
            norms = self.query_norms[qm], self.key_norms[km]
            for parts, row, col in self.nested(qm, km):
                self.rows.nested_statistics(parts, row, col, norms, self.masks[losses], into[losses])

    def gradients(self, slopes: Slopes, dq: list[Tensor | None], dk: list[Tensor | None]) -> None:
        edges = list(pairwise((0, *self.widths)))
        for term, (qm, km) in enumerate(self.terms):
            losses = slice(term * len(edges), (term + 1) * len(edges))
            q, k, norms = self.queries[qm], self.keys[km], (self.query_norms[qm], self.key_norms[km])
            by_row = q.new_zeros(len(edges) - 1, q.shape[0], dtype=torch.float64)
            by_col = k.new_zeros(len(edges) - 1, k.shape[0], dtype=torch.float64)
            query_grad, key_grad = dq[qm], dk[km]
            turned, query_turned = self._turned(key_grad, qm)
            into = [None if query_grad is None else query_grad[:, start:stop] for start, stop in edges]
            key_into = [None if key_grad is None else key_grad[:, start:stop] for start, stop in edges]
            for parts, row, col in self.nested(qm, km):
                rows, cols = slice(row, row + parts[0].shape[0]), slice(col, col + parts[0].shape[1])
                self.rows.nested_gradient(parts, row, col, norms, self.masks[losses], slopes[losses], by_row, by_col)
                parts[0] = parts[first_part(self.widths)]
                for at, total in enumerate(parts):
                    part, narrow = slice(*edges[at]), total.to(q.dtype)
                    self._add_rows(into[at], rows, narrow, self.key_parts[km][at][cols])
                    if at < len(query_turned):
                        add_product(turned[:, cols], part, query_turned[at][:, rows], narrow)
                    else:
                        add_product(key_into[at], cols, narrow.T, self.query_parts[qm][at][rows])
            if key_grad is not None and query_turned:
                key_grad[:, : turned.shape[0]].add_(turned.T)
            for at, (_, width) in enumerate(edges[:-1]):
                subtract_own(query_grad, by_row[at], norms[0][at], q, width)
                subtract_own(key_grad, by_col[at], norms[1][at], k, width)
            self.row_products.append(by_row)

    def _add_rows(self, into: Tensor | None, rows: slice, a: Tensor, b: Tensor) -> None:
        """Add a b to some rows; on the CPU of few columns by oneDNN, which makes these in two thirds of MKL's time."""
        if into is not None and b.shape[1] <= NARROW and cpu_products.serves(a):
            into[rows] += cpu_products.fast_product(a, b)
        else:
            add_product(into, rows, a, b)

    def _turned(self, key_grad: Tensor | None, qm: int) -> tuple[Tensor, list[Tensor]]:
        """Make room for the keys' gradients to the first parts, turned, and turn the queries' parts for them: products
        of few columns are faster the other way round, MKL's only of up to NARROW."""
        parts = self.query_parts[qm]
        if key_grad is None:
            return parts[0].new_empty(0, 0), []
        mkl = not key_grad.is_cuda and not cpu_products.prefers_onednn()
        first = takewhile(lambda part: not mkl or part.shape[1] <= NARROW, parts)
        rows = [part.T if part.is_cuda else part.T.contiguous() for part in first]
        return key_grad.new_zeros(sum(part.shape[0] for part in rows), key_grad.shape[0]), rows


def all_inverse_norms(rows: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Compute the inverse norms [N] of the rows' parts at each width; 1 at the widest, whose rows are unit."""
    inner = [inverse_norms(rows, width) for width in widths[:-1]]
    return [*inner, rows.new_ones(rows.shape[0], dtype=accumulation_dtype(rows.dtype))]


def _parts(rows: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """The columns between one width and the next; on the CPU as matrices of their own, where products are faster."""
    parts = [rows[:, start:stop] for start, stop in pairwise((0, *widths))]
    return parts if rows.is_cuda else [part.contiguous() for part in parts]


def first_part(widths: Sequence[int]) -> int:
    """Say whose suffix sum is the gradient to the first columns: the narrowest width's; at width 1 the next one's."""
    return int(widths[0] == 1)


def subtract_own(into: Tensor | None, products: Tensor, inverse_norm: Tensor, rows: Tensor, width: int) -> None:
    """Subtract the normalisation's part of a gradient: along each row's own first columns."""
    if into is not None and width > 1:
        along = (products * inverse_norm.double().square()).to(into.dtype)
        into[:, :width].addcmul_(along[:, None], rows[:, :width].to(into.dtype), value=-1)
