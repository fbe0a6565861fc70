"""Nested widths (Matryoshka) on Triton: the host side of triton_nested_kernels.py, with nested.NestedSweep's sweeps.

The forward runs over stripes of rows, the backward over panels of all widths' gradients (PANEL_BYTES together, their
fp32 scratch included), each consumed by two library GEMMs a width with fp32 accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rime_fast.ops import dispatch
from rime_fast.ops.contrastive import triton_parts as parts
from rime_fast.ops.contrastive.nested import all_inverse_norms, first_part, subtract_own
from rime_fast.ops.contrastive.softmax import Slopes, Statistics
from rime_fast.ops.contrastive.tiles import Masks, add_product


def nested_tiles(dtype: torch.dtype) -> parts.Tiles:
    """Choose the tiles of both kernels: the largest that compile without spills on every generation."""
    return parts.Tiles(64, 32, 32, 8, 2) if dtype == torch.float32 else parts.Tiles(64, 64, 32, 8, 3)


@dataclass
class NestedTritonSweep:
    """One pass over nested widths, as nested.NestedSweep, on operands in their own dtype. ``flag``: 0-d int32, 1 when
    every |logit| <= BOUNDED."""

    queries: list[Tensor]
    keys: list[Tensor]
    terms: Sequence[tuple[int, int]]
    scale: Tensor
    masks: list[Masks]
    flag: Tensor
    widths: tuple[int, ...]
    row_products: list[Tensor] = field(init=False, default_factory=list)  # as tiles.TileSweep's

    def statistics(self, into: Statistics) -> None:
        count = len(self.widths)
        with dispatch.on_device_of(self.scale):  # Triton launches on the current device
            for term, (qm, km) in enumerate(self.terms):
                losses = slice(term * count, (term + 1) * count)
                self._nested_statistics(self.queries[qm], self.keys[km], self.masks[losses], into[losses])

    def _nested_statistics(self, q: Tensor, k: Tensor, masks: list[Masks], into: Statistics) -> None:
        from rime_fast.ops.contrastive.triton_nested_kernels import nested_statistics_kernel

        q, k, edges, first, limits = parts.dense(q), parts.dense(k), self._edges(), masks[0], parts.limits_of(masks)
        scale2 = parts.scale_base2(self.scale)
        norms = torch.stack(all_inverse_norms(q, self.widths)), torch.stack(all_inverse_norms(k, self.widths))
        tiles, n_keys, count = self._tiles(q), k.shape[0], len(self.widths)
        for row in range(0, q.shape[0], parts.STRIPE):
            rows = slice(row, min(row + parts.STRIPE, q.shape[0]))
            part, labels = q[rows], first.labels[rows]
            ranges = parts.label_range(labels, tiles.BM)
            n, side = part.shape[0], parts.superblock(part.shape[0], n_keys, 1, max(tiles.BM, tiles.BN))
            a_blocks, b_blocks = -(-n // side), -(-n_keys // side)
            row_part = q.new_empty(count, 3, b_blocks, n, dtype=torch.float32)
            col_part = q.new_empty(count, 2, a_blocks, n_keys, dtype=torch.float32)
            positive = q.new_full((count, *labels.shape), -torch.inf, dtype=torch.float32)
            for bounded in (True, False):  # of which the flag on the device lets one run
                nested_statistics_kernel[(a_blocks * b_blocks,)](
                    part,
                    k,
                    edges,
                    norms[0][:, rows].contiguous(),
                    norms[1],
                    labels,
                    ranges,
                    None if first.row_ids is None else first.row_ids[rows],
                    first.col_ids,
                    None if limits is None else limits[0][:, rows].contiguous(),
                    None if limits is None else limits[1],
                    labels.shape[1],
                    scale2,
                    self.flag,
                    positive,
                    row_part,
                    col_part,
                    n,
                    n_keys,
                    count,
                    q.stride(0),
                    k.stride(0),
                    side,
                    side,
                    BOUNDED=bounded,
                    **self._nested_options(q, tiles, limits is not None),
                )
            parts.add_parts(row_part, col_part, positive, into, rows)

    def gradients(self, slopes: Slopes, dq: list[Tensor | None], dk: list[Tensor | None]) -> None:
        count = len(self.widths)
        with dispatch.on_device_of(self.scale):
            for term, (qm, km) in enumerate(self.terms):
                losses = slice(term * count, (term + 1) * count)
                sides = parts.dense(self.queries[qm]), parts.dense(self.keys[km])
                self._nested_gradients(*sides, self.masks[losses], slopes[losses], dq[qm], dk[km])

    def _nested_gradients(
        self, q: Tensor, k: Tensor, masks: list[Masks], slopes: Slopes, dq: Tensor | None, dk: Tensor | None
    ) -> None:
        from rime_fast.ops.contrastive.triton_nested_kernels import nested_gradient_kernel

        tiles, count, first, limits = self._tiles(q), len(self.widths), masks[0], parts.limits_of(masks)
        scale2 = parts.scale_base2(self.scale)
        norms = all_inverse_norms(q, self.widths), all_inverse_norms(k, self.widths)
        # tensors live as long as the kernels that read them are queued: nothing here is made anew a panel
        fixed = (self._edges(), torch.stack(norms[0]), torch.stack(norms[1]), first.labels, first.labels.shape[1])
        masked = (first.row_ids, first.col_ids, *((None, None) if limits is None else limits))
        by_side = slopes.row_shift, slopes.row_coef, slopes.col_shift, slopes.col_coef
        weights = slopes.factor, *by_side, slopes.positive_slope
        narrow = q.element_size() < 4  # with fp32 scratch beside it
        width, height = parts.panel_shape(q, k, tiles, count * (q.element_size() + 4 * narrow))
        panel = q.new_empty(count, height, width)
        scratch = panel if q.dtype == torch.float32 else q.new_empty(count, height, width, dtype=torch.float32)
        by_row = q.new_zeros(count, q.shape[0], dtype=torch.float64)
        by_col = k.new_zeros(count, k.shape[0], dtype=torch.float64)
        for row in range(0, q.shape[0], height):
            for col in range(0, k.shape[0], width):
                rows, cols = slice(row, min(row + height, q.shape[0])), slice(col, min(col + width, k.shape[0]))
                high, wide = rows.stop - row, cols.stop - col
                grid = (-(-high // tiles.BM), -(-wide // tiles.BN))
                row_part = q.new_empty(count, grid[1], high, dtype=torch.float32)
                col_part = q.new_empty(count, grid[0], wide, dtype=torch.float32)
                nested_gradient_kernel[grid](
                    q,
                    k,
                    *fixed,
                    *masked,
                    scale2,
                    self.flag,
                    *weights,
                    panel,
                    scratch,
                    row_part,
                    col_part,
                    row,
                    col,
                    rows.stop,
                    cols.stop,
                    count,
                    q.shape[0],
                    k.shape[0],
                    q.stride(0),
                    k.stride(0),
                    width,
                    height * width,
                    **self._nested_options(q, tiles, limits is not None),
                )
                by_row[:, rows] += row_part.double().sum(1)
                by_col[:, cols] += col_part.double().sum(1)
                for at, (start, stop) in enumerate(pairwise((0, *self.widths))):
                    g = panel[at or first_part(self.widths), :high, :wide]
                    add_product(None if dq is None else dq[:, start:stop], rows, g, k[cols, start:stop])
                    add_product(None if dk is None else dk[:, start:stop], cols, g.T, q[rows, start:stop])
        for at, inner in enumerate(self.widths[:-1]):
            subtract_own(dq, by_row[at], norms[0][at], q, inner)
            subtract_own(dk, by_col[at], norms[1][at], k, inner)
        self.row_products.append(by_row[:-1])

    def _edges(self) -> Tensor:
        """[widths + 1] int32, made on the device: a copy from the host would wait."""
        return torch.cat([self.flag.new_full((1,), width) for width in (0, *self.widths)])

    def _tiles(self, q: Tensor) -> parts.Tiles:
        return nested_tiles(q.dtype) if q.is_cuda else parts.Tiles(32, 32, 16, 4, 1)

    def _nested_options(self, q: Tensor, tiles: parts.Tiles, margin: bool) -> dict[str, Any]:
        tf32 = q.dtype == torch.float32 and q.is_cuda and dispatch.tf32_allowed()
        return {
            "BM": tiles.BM,
            "BN": tiles.BN,
            "BK": tiles.BK,
            "IDS": self.masks[0].row_ids is not None,
            "MARGIN": margin,
            "WIDEN": not q.is_cuda,
            "PRECISION": "tf32" if tf32 else "ieee",
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "enable_fp_fusion": False,  # as triton.py
        }
