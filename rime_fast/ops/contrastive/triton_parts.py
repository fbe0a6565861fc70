"""What both Triton sweeps of the contrastive loss share: sizes, and the O(N) work around a launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.contrastive.softmax import Statistics
from rime_fast.ops.contrastive.tiles import Masks

PANEL_BYTES = 128 << 20
STRIPE = 65_536  # queries a launch of the forward; bounds the partial statistics
LOG2E = math.log2(math.e)


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
    padded = torch.nn.functional.pad(labels, (0, 0, 0, tiles * rows - labels.shape[0]), value=-1).view(tiles, -1)
    none = torch.iinfo(torch.int64).max
    return torch.stack([torch.where(padded < 0, none, padded).amin(1), padded.amax(1)], dim=1)


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
    _merge(row_part[:, 0], row_part[:, 1], into.row_max[:, rows], into.row_sum[:, rows])
    _merge(col_part[:, 0], col_part[:, 1], into.col_max, into.col_sum)
    rival, known = into.rival[:, rows], into.positive[:, rows]
    rival.copy_(torch.maximum(rival, row_part[:, 2].amax(1) / LOG2E))
    known.copy_(torch.where(positive != -torch.inf, positive / LOG2E, known))


def _merge(top2: Tensor, total: Tensor, running_max: Tensor, running_sum: Tensor) -> None:
    """Partial statistics [L, parts, size] in base 2 into running ones in base e, in fp64 and in a fixed order."""
    top = top2.double() / LOG2E
    best = torch.maximum(top.amax(1), running_max.double())
    shift = torch.where(best == -torch.inf, 0, best).to(running_max.dtype)  # what later steps will subtract
    added = (total.double() * (top - shift.double()[:, None]).exp()).sum(1)
    running_sum.mul_((running_max.double() - shift.double()).exp()).add_(added)
    running_max.copy_(torch.where(best == -torch.inf, best.to(shift.dtype), shift))


def base2(shift: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """Turn exp(s - shift) coefficient into 2^(s2 - shift2) coefficient2, shift2 exact in fp32."""
    shift2 = (shift.double() * LOG2E).float()
    change = torch.where(shift2.isfinite(), shift2.double() / LOG2E - shift.double(), 0).exp()
    return shift2, (coefficient.double() * change).float()


def panel_shape(q: Tensor, k: Tensor, tiles: Tiles, element_bytes: int) -> tuple[int, int]:
    """Choose (width, height) of a panel: whole tiles, a square where the sides allow (dq and dk are read and written
    once a panel)."""
    elements = PANEL_BYTES // element_bytes
    width = min(-(-k.shape[0] // tiles.BN) * tiles.BN, max(tiles.BN, math.isqrt(elements) // tiles.BN * tiles.BN))
    height = min(-(-q.shape[0] // tiles.BM) * tiles.BM, max(tiles.BM, elements // width // tiles.BM * tiles.BM))
    return width, height
