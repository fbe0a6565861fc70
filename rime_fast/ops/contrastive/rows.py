"""What happens to one tile of similarities, in two versions: the compiled CPU kernels, and plain torch.

A sweep (chunked.py) makes tiles by library GEMM; the functions here turn a tile into softmax statistics, or in place
into the gradient to its similarities. The torch version serves fp64, installations without a compiler, and CUDA.
Element rules are documented in csrc/include/rime/contrast.h; both versions follow them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

# Largest |logit| for which no softmax shift is needed in fp32 (kBounded in csrc/include/rime/contrast.h).
BOUNDED = 60.0
# Rows and columns of the patches whose parts the CUDA kernel writes (csrc/include/rime/contrast_patch.h).
PATCH = (64, 256)


@dataclass
class Masks:
    """Which candidates do not count: ids as int32 classes, limits as similarities; None where there is no such mask.

    labels [N, P] int64: the positives of each row; one outside the keys at hand (or -1) is not met here. row_ids [N],
    col_ids [K] int32. row_limit [N], col_limit [K]: a candidate more similar than this is
    left out of that row's / column's softmax.
    """

    labels: Tensor
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None

    def columns(self, start: int, stop: int) -> Masks:
        """The same rows against keys start .. stop - 1 only."""
        return replace(
            self,
            labels=self.labels - start,
            col_ids=None if self.col_ids is None else self.col_ids[start:stop],
            col_limit=None if self.col_limit is None else self.col_limit[start:stop],
        )


@dataclass
class Statistics:
    """Running statistics of one term over all candidates that count, the positives left out.

    Sums are of exponentials below the maximum beside them, which stays 0 when ``bounded``.
    """

    bounded: bool
    row_max: Tensor  # [N]
    row_sum: Tensor  # [N] fp64
    col_max: Tensor  # [K]
    col_sum: Tensor  # [K] fp64
    positive: Tensor  # [N, P] logits of the positives, -inf until they are met
    rival: Tensor  # [N] largest logit of a row

    @classmethod
    def empty(cls, labels: Tensor, n_keys: int, bounded: bool, dtype: torch.dtype) -> Statistics:
        """Before the first tile. labels [N, P]."""

        def full(size: int, value: float, of: torch.dtype = dtype) -> Tensor:
            return torch.full((size,), value, dtype=of, device=labels.device)

        n_queries = labels.shape[0]

        start = 0.0 if bounded else -torch.inf
        return cls(
            bounded=bounded,
            row_max=full(n_queries, start),
            row_sum=full(n_queries, 0.0, torch.float64),
            col_max=full(n_keys, start),
            col_sum=full(n_keys, 0.0, torch.float64),
            positive=torch.full(labels.shape, -torch.inf, dtype=dtype, device=labels.device),
            rival=full(n_queries, -torch.inf),
        )

    def columns(self, start: int, stop: int) -> Statistics:
        """A view on keys start .. stop - 1: adding to it adds to the whole."""
        return replace(self, col_max=self.col_max[start:stop], col_sum=self.col_sum[start:stop])


@dataclass
class Slopes:
    """What a tile's gradient needs of one term, in the tile's dtype.

    G = factor (row_coef exp(s - row_shift) + col_coef exp(s - col_shift)), and factor positive_slope at the positives.
    With ``bounded`` all shifts are 0, and one exponential serves both.
    """

    bounded: bool
    row_shift: Tensor  # [N]
    row_coef: Tensor  # [N]
    col_shift: Tensor  # [K]
    col_coef: Tensor  # [K]
    positive_slope: Tensor  # [N, P]
    factor: Tensor  # 0-d

    def columns(self, start: int, stop: int) -> Slopes:
        """The same rows against keys start .. stop - 1 only."""
        return replace(self, col_shift=self.col_shift[start:stop], col_coef=self.col_coef[start:stop])


class Rows(Protocol):
    """What handles the tile of keys ``col`` onwards and queries ``row`` onwards; either may write into the tile."""

    def statistics(self, tile: Tensor, row: int, col: int, masks: Masks, into: Statistics) -> None: ...

    def gradient(self, tile: Tensor, row: int, col: int, masks: Masks, slopes: Slopes, dtype: torch.dtype) -> Tensor:
        """The gradient to the tile's similarities, in ``dtype``, in the tile's memory where that can be."""
        ...


class NativeRows:
    """The compiled kernels (csrc/cpu/contrast.cpp, csrc/cuda/contrast.cu): fp32 tiles."""

    def __init__(self, scale: Tensor, flag: Tensor) -> None:
        self.scale, self.flag = scale, flag
        self._parts: Tensor | None = None

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
            self._workspace(tile),
        )

    def gradient(self, tile: Tensor, row: int, col: int, masks: Masks, slopes: Slopes, dtype: torch.dtype) -> Tensor:
        out = narrow_view(tile, dtype)
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

    def _workspace(self, tile: Tensor) -> Tensor | None:
        """Room for the parts of a tile's statistics on CUDA; the first tile of a sweep is its largest."""
        if tile.device.type == "cpu":
            return None
        if self._parts is None:
            (rows, cols), (high, wide) = tile.shape, PATCH
            self._parts = tile.new_empty(3 * rows * -(-cols // wide) + 2 * cols * -(-rows // high))
        return self._parts


def narrow_view(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of an fp32 tile as ``dtype``: rows keep their place, a narrow type fills the first half of each."""
    if tile.dtype == dtype:
        return tile
    whole = torch.as_strided(tile, (tile.shape[0], tile.stride(0)), tile.stride())
    return whole.view(dtype)[:, : tile.shape[1]]


class TorchRows:
    """The same in torch operations, for any dtype and device (nothing is read back)."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def statistics(self, tile: Tensor, row: int, col: int, masks: Masks, into: Statistics) -> None:
        rows, cols = slice(row, row + tile.shape[0]), slice(col, col + tile.shape[1])
        row_masked, col_masked = _masked(tile, rows, cols, masks)
        logits = tile * self.scale
        at, met = _positives(masks.labels[rows], cols)
        into.positive[rows] = torch.where(met, logits.gather(1, at), into.positive[rows])
        by_row = logits.masked_fill(row_masked, -torch.inf)
        into.rival[rows] = torch.maximum(into.rival[rows], by_row.amax(1))
        _merge(by_row, 1, into.row_max[rows], into.row_sum[rows], into.bounded)
        _merge(logits.masked_fill_(col_masked, -torch.inf), 0, into.col_max[cols], into.col_sum[cols], into.bounded)

    def gradient(self, tile: Tensor, row: int, col: int, masks: Masks, slopes: Slopes, dtype: torch.dtype) -> Tensor:
        rows, cols = slice(row, row + tile.shape[0]), slice(col, col + tile.shape[1])
        row_masked, col_masked = _masked(tile, rows, cols, masks)
        logits = tile * self.scale
        by_row = (logits - slopes.row_shift[rows, None]).exp_().mul_(slopes.row_coef[rows, None])
        by_col = (logits - slopes.col_shift[None, cols]).exp_().mul_(slopes.col_coef[None, cols])
        total = by_row.masked_fill_(row_masked, 0).add_(by_col.masked_fill_(col_masked, 0))
        for index in range(masks.labels.shape[1]):
            here = masks.labels[rows, index, None] == torch.arange(cols.start, cols.stop, device=tile.device)
            total = torch.where(here, slopes.positive_slope[rows, index, None], total)
        return torch.mul(total, slopes.factor, out=tile).to(dtype)


def _positives(labels: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """([n, P] column in the tile of each positive, whether it is there); where it is not, the column is any."""
    met = (labels >= cols.start) & (labels < cols.stop)
    return torch.where(met, labels - cols.start, 0), met


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


def _merge(logits: Tensor, dim: int, running_max: Tensor, running_sum: Tensor, bounded: bool) -> None:
    """Add a tile's exponentials to running (max, sum) views; masked logits are -inf."""
    if bounded:
        running_sum += logits.exp_().sum(dim)
        return
    new_max = torch.maximum(running_max, logits.amax(dim))
    shift = torch.where(new_max == -torch.inf, 0, new_max)
    part = (logits - shift.unsqueeze(dim)).exp_().sum(dim)
    running_sum.mul_((running_max - shift).double().exp()).add_(part)
    running_max.copy_(new_max)
