"""The chunked backend on a CPU: tiles by oneDNN or torch.mm in fp32 (fp64), consumed by csrc's row kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rime_fast.ops import cpu_products
from rime_fast.ops.contrastive import nested, tiles
from rime_fast.ops.contrastive.problem import accumulation_dtype
from rime_fast.ops.contrastive.softmax import Slopes, Statistics

# 4 MiB of fp32, so that a tile is still in cache when it is read again; the best of 128 to 512 rows by 1024 to 4096
# columns here (all within 4 %).
TILE = (512, 2048)
# Of each width: oneDNN's products of few columns want long rows, more than they want the cache; MKL's want the cache.
NESTED_TILE = (512, 4096) if cpu_products.prefers_onednn() else (1024, 1024)
MOST_WIDTHS = 16  # that the kernels of several take (csrc/cpu)
SHIFTLESS = True  # statistics are kept without shifts when no logit leaves the bound (softmax.Statistics)
BASE2 = False


def operands(tensors: list[Tensor]) -> list[Tensor]:
    """Give the rows in the dtype in which they are multiplied."""
    return [tensor.detach().to(accumulation_dtype(tensor.dtype)).contiguous() for tensor in tensors]


def sweep(
    queries: list[Tensor],
    keys: list[Tensor],
    terms: Sequence[tuple[int, int]],
    scale: Tensor,
    masks: list[tiles.Masks],
    flag: Tensor,
    widths: tuple[int, ...] = (),
) -> tiles.TileSweep:
    """Make the pass over the tiles of a call. queries, keys: from ``operands``. flag: 0-d int32, 1 when every |logit|
    <= BOUNDED."""
    compiled = tiles.has_compiled_rows(queries[0])
    kernels = CpuRows if len(widths) <= MOST_WIDTHS else tiles.CompiledRows
    rows = kernels(scale, flag) if compiled else tiles.TorchRows(scale)
    if len(widths) > 1:
        return nested.NestedSweep(queries, keys, terms, masks, rows, NESTED_TILE, 1, widths)
    return tiles.TileSweep(queries, keys, terms, masks, rows, TILE, align=1)


class CpuRows(tiles.CompiledRows):
    """Runs csrc's kernels, all widths of a row in one pass."""

    def nested_statistics(
        self,
        parts: list[Tensor],
        row: int,
        col: int,
        norms: tiles.Norms,
        masks: list[tiles.Masks],
        into: Statistics,
    ) -> None:
        torch.ops.rime_fast_C.nested_statistics(
            *self._shared(parts, row, col, norms, masks),
            [state.row_max for state in into],
            [state.row_sum for state in into],
            [state.col_max for state in into],
            [state.col_sum for state in into],
            [state.positive for state in into],
            [state.rival for state in into],
        )

    def nested_gradient(
        self,
        parts: list[Tensor],
        row: int,
        col: int,
        norms: tiles.Norms,
        masks: list[tiles.Masks],
        slopes: Slopes,
        by_row: Tensor,
        by_col: Tensor,
    ) -> None:
        torch.ops.rime_fast_C.nested_gradient(
            *self._shared(parts, row, col, norms, masks),
            [slope.row_shift for slope in slopes],
            [slope.row_coef for slope in slopes],
            [slope.col_shift for slope in slopes],
            [slope.col_coef for slope in slopes],
            [slope.positive_slope for slope in slopes],
            [slope.factor for slope in slopes],
            by_row,
            by_col,
        )

    def _shared(
        self, parts: list[Tensor], row: int, col: int, norms: tiles.Norms, masks: list[tiles.Masks]
    ) -> tuple[Any, ...]:
        row_limits = [mask.row_limit for mask in masks if mask.row_limit is not None]
        col_limits = [mask.col_limit for mask in masks if mask.col_limit is not None]
        first = masks[0]
        shared = parts, self.scale, row, col, first.labels, first.row_ids, first.col_ids
        return *shared, *norms, row_limits, col_limits, self.flag
