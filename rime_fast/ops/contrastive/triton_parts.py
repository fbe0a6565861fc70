"""What both Triton sweeps of the contrastive loss share: sizes, and the O(N) work around a launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.contrastive.softmax import LOG2E, Statistics
from rime_fast.ops.contrastive.tiles import Masks

PANEL_BYTES = 128 << 20
MERGED = 128  # rows or keys that a program merges
STRIPE = 65_536  # queries a launch of the forward; bounds the partial statistics


class Tiles(NamedTuple):
    """The size of a tile, BM queries x BN keys with depth BK, and how a program runs."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def superblock(n: int, n_keys: int, terms: int, tile: int) -> int:
    """Choose the side of the square of similarities that one program walks: the largest that still gives 1,024
    programs."""
    side = 64 * tile
    while side > 2 * tile and terms * -(-n // side) * -(-n_keys // side) < 1024:
        side //= 2
    return side


def label_range(labels: Tensor, rows: int) -> Tensor:
    """Find [tiles of rows, 2]: the smallest label (of those there are) and the largest in each."""
    tiles = -(-labels.shape[0] // rows)
    lowest = highest = labels
    if labels.shape[1] > 1 or labels.shape[0] % rows:
        padded = torch.nn.functional.pad(labels, (0, 0, 0, tiles * rows - labels.shape[0]), value=-1)
        lowest, highest = torch.where(padded < 0, torch.iinfo(torch.int64).max, padded), padded
    found = labels.new_empty(2, tiles)
    torch.amin(lowest.view(tiles, -1), 1, out=found[0])
    torch.amax(highest.view(tiles, -1), 1, out=found[1])
    return found.T.contiguous()


def dense(tensor: Tensor) -> Tensor:
    """Give ``tensor``, or a copy, whose rows are without gaps."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def limits_of(masks: list[Masks]) -> tuple[Tensor, Tensor] | None:
    """Stack the limits: [losses, N] and [losses, K]; None without a margin."""
    rows = [m.row_limit for m in masks if m.row_limit is not None]
    cols = [m.col_limit for m in masks if m.col_limit is not None]
    return (torch.stack(rows), torch.stack(cols)) if rows else None


def add_parts(row_part: Tensor, col_part: Tensor, positive: Tensor, into: Statistics, rows: slice) -> None:
    """Add a launch's partial statistics, row_part [L, 3, parts, n] and col_part [L, 2, parts, K] and the positives'
    logits [L, n, P], of these rows to the losses'."""
    from rime_fast.ops.contrastive.triton_kernels import merge_kernel

    by_row = into.row_max[:, rows], into.row_sum[:, rows], into.rival[:, rows], into.positive[:, rows]
    by_col = into.col_max, into.col_sum, None, None
    for parts, (top, total, rival, known) in ((row_part, by_row), (col_part, by_col)):
        losses, planes, n_parts, size = parts.shape
        merge_kernel[(-(-size // MERGED), losses)](
            parts,
            positive,
            top,
            total,
            rival,
            known,
            n_parts,
            size,
            positive.shape[2],
            top.stride(0),
            0 if known is None else known.stride(0),
            PLANES=planes,
            BLOCK=MERGED,
        )


def scale_base2(scale: Tensor) -> Tensor:
    """Give the scale of logits in base 2, 0-d fp32."""
    return torch.mul(scale.double(), LOG2E, out=torch.empty_like(scale, dtype=torch.float32))


def panel_shape(q: Tensor, k: Tensor, tiles: Tiles, element_bytes: int) -> tuple[int, int]:
    """Choose (width, height) of a panel: whole tiles, a square where the sides allow (dq and dk are read and written
    once a panel)."""
    elements = PANEL_BYTES // element_bytes
    width = min(-(-k.shape[0] // tiles.BN) * tiles.BN, max(tiles.BN, math.isqrt(elements) // tiles.BN * tiles.BN))
    height = min(-(-q.shape[0] // tiles.BM) * tiles.BM, max(tiles.BM, elements // width // tiles.BM * tiles.BM))
    return width, height
