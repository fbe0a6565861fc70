"""Operator B on Triton: the host side of triton_kernels.py, with the same two sweeps as chunked.Sweep.

Operands stay in their dtype (bf16, fp16, fp32). The forward runs over stripes of rows so that partial statistics stay
bounded; the backward over panels of G in the operands' dtype (PANEL_BYTES), each consumed by two library GEMMs with
fp32 accumulation (products.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.contrastive.products import add_product
from rime_fast.ops.contrastive.rows import BOUNDED, Masks, Slopes, Statistics

PANEL_BYTES = 128 << 20
STRIPE = 65_536  # queries a launch of the forward; bounds the partial statistics
LOG2E = math.log2(math.e)


class Tiles(NamedTuple):
    """BM queries x BN keys with depth BK, and how a program runs."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def interpreted() -> bool:
    """True when Triton's CPU interpreter runs the kernels (the variable is read when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(tensor: Tensor) -> str | None:
    """The reason Triton cannot serve a call on ``tensor``, or None."""
    if tensor.dtype == torch.float64:
        return "it computes in fp32; fp64 runs on chunked or reference"
    if not tensor.is_cuda and not (interpreted() and tensor.device.type == "cpu"):
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1 for the CPU), got {tensor.device.type}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def tiles_for(dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Fixed per dtype and generation: the largest that compile without spills, with the masks (128 x 128 spills)."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2)
    if capability[0] in (9, 10):
        return Tiles(128, 64, 64, 8, 3)
    return Tiles(128, 64, 32, 8, 3)


def superblock(n: int, n_keys: int, terms: int, tile: int) -> int:
    """Side of the square of similarities that one program walks: the largest that still gives 1,024 programs."""
    side = 64 * tile
    while side > 2 * tile and terms * -(-n // side) * -(-n_keys // side) < 1024:
        side //= 2
    return side


@dataclass
class TritonSweep:
    """As chunked.Sweep, on operands in their own dtype. ``flag``: 0-d int32, 1 when every |logit| <= BOUNDED."""

    queries: list[Tensor]
    keys: list[Tensor]
    terms: list[tuple[int, int]]
    scale: Tensor
    masks: list[Masks]
    flag: Tensor
    bounded = False  # softmax.py always gets the shifts, also where they are 0

    def statistics(self, into: list[Statistics]) -> None:
        """Add every term's tiles to its statistics; terms whose modes have one D run in one launch."""
        widths = [self.queries[q].shape[1] for q, _ in self.terms]
        for width in dict.fromkeys(widths):
            chosen = [i for i, w in enumerate(widths) if w == width]
            for first in range(0, len(chosen), 15):  # four bits a term and mode in the launch's mode words
                part = chosen[first : first + 15]
                self._statistics([self.terms[i] for i in part], [self.masks[i] for i in part], [into[i] for i in part])

    def _statistics(self, terms: list[tuple[int, int]], masks: list[Masks], into: list[Statistics]) -> None:
        from rime_fast.ops.contrastive.triton_kernels import statistics_kernel

        q_modes, k_modes = list(dict.fromkeys(q for q, _ in terms)), list(dict.fromkeys(k for _, k in terms))
        q, k = _stacked([self.queries[m] for m in q_modes]), _stacked([self.keys[m] for m in k_modes])
        tiles, scale2, first = _tiles(q), self._scale2(), masks[0]
        _, n_keys, width = k.shape
        limits = _limits(masks)
        for row in range(0, q.shape[1], STRIPE):
            rows = slice(row, min(row + STRIPE, q.shape[1]))
            n = rows.stop - rows.start
            side = superblock(n, n_keys, len(terms), max(tiles.BM, tiles.BN))
            a_blocks, b_blocks = -(-n // side), -(-n_keys // side)
            row_part = q.new_empty(len(terms), 3, b_blocks, n, dtype=torch.float32)
            col_part = q.new_empty(len(terms), 2, a_blocks, n_keys, dtype=torch.float32)
            positive = q.new_full((len(terms), n, first.labels.shape[1]), -torch.inf, dtype=torch.float32)
            statistics_kernel[(len(terms) * a_blocks * b_blocks,)](
                q[:, rows], k, first.labels[rows], _part(first.row_ids, rows), first.col_ids,
                None if limits is None else limits[0][:, rows].contiguous(), None if limits is None else limits[1],
                first.labels.shape[1], scale2, self.flag, positive, row_part, col_part, n, n_keys, width,
                q.stride(1), k.stride(1), q.stride(0), k.stride(0), len(terms),
                _word(q_modes.index(m) for m, _ in terms), _word(k_modes.index(m) for _, m in terms), side, side,
                **self._options(q, tiles, limits is not None),
            )  # fmt: skip
            for term, state in enumerate(into):
                _merge(row_part[term, 0], row_part[term, 1], state.row_max[rows], state.row_sum[rows])
                _merge(col_part[term, 0], col_part[term, 1], state.col_max, state.col_sum)
                rival = row_part[term, 2].amax(0) / LOG2E
                state.rival[rows] = torch.maximum(state.rival[rows], rival)
                found = positive[term] != -torch.inf
                state.positive[rows] = torch.where(found, positive[term] / LOG2E, state.positive[rows])

    def gradients(self, slopes: list[Slopes], dq: list[Tensor | None], dk: list[Tensor | None]) -> None:
        """Add every term's gradient to dq and dk in fp32."""
        from rime_fast.ops.contrastive.triton_kernels import gradient_kernel

        scale2 = self._scale2()
        for (qm, km), masks, slope in zip(self.terms, self.masks, slopes, strict=True):
            q, k, tiles = _dense(self.queries[qm]), _dense(self.keys[km]), _tiles(self.queries[qm])
            row_shift, row_coef = _base2(slope.row_shift, slope.row_coef)
            col_shift, col_coef = _base2(slope.col_shift, slope.col_coef)
            factor = slope.factor.float()
            width, height = _panel_shape(q, k, tiles)
            panel = q.new_empty(height, width)
            options = self._options(q, tiles, masks.row_limit is not None)
            for row in range(0, q.shape[0], height):
                for col in range(0, k.shape[0], width):
                    rows, cols = slice(row, min(row + height, q.shape[0])), slice(col, min(col + width, k.shape[0]))
                    grid = (-(-(rows.stop - row) // tiles.BM), -(-(cols.stop - col) // tiles.BN))
                    gradient_kernel[grid](
                        q, k, masks.labels, masks.labels.shape[1], masks.row_ids, masks.col_ids, masks.row_limit,
                        masks.col_limit, scale2, self.flag, factor, row_shift, row_coef, col_shift, col_coef,
                        slope.positive_slope.float(), panel, row, col, rows.stop, cols.stop, q.shape[1], q.stride(0),
                        k.stride(0), width, **options,
                    )  # fmt: skip
                    g = panel[: rows.stop - row, : cols.stop - col]
                    add_product(dq[qm], rows, g, k[cols])
                    add_product(dk[km], cols, g.T, q[rows])

    def _scale2(self) -> Tensor:
        return (self.scale.double() * LOG2E).float()

    def _options(self, q: Tensor, tiles: Tiles, margin: bool) -> dict[str, object]:
        tf32 = q.dtype == torch.float32 and q.is_cuda and torch.backends.cuda.matmul.allow_tf32
        return {
            "BM": tiles.BM, "BN": tiles.BN, "BK": tiles.BK, "IDS": self.masks[0].row_ids is not None, "MARGIN": margin,
            "WIDEN": not q.is_cuda, "EVEN": q.shape[-1] % tiles.BK == 0, "PRECISION": "tf32" if tf32 else "ieee",
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip


def bounded_flag(queries: list[Tensor], keys: list[Tensor], scale: Tensor) -> Tensor:
    """0-d int32 on the device: 1 when no logit can leave [-BOUNDED, BOUNDED] (NaN: 0); nothing is read back."""

    def norm(tensors: list[Tensor]) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(t, dim=1, dtype=torch.float32).amax() for t in tensors]).amax()

    return (norm(queries) * norm(keys) * scale.abs() < BOUNDED).to(torch.int32)


def _tiles(tensor: Tensor) -> Tiles:
    if tensor.is_cuda:
        return tiles_for(tensor.dtype, torch.cuda.get_device_capability(tensor.device))
    return Tiles(32, 32, 16, 4, 1)  # the interpreter


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _stacked(modes: list[Tensor]) -> Tensor:
    return _dense(modes[0])[None] if len(modes) == 1 else torch.stack(modes)


def _word(modes: Iterable[int]) -> int:
    """Modes of the terms, four bits each."""
    return sum(mode << (4 * term) for term, mode in enumerate(modes))


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _limits(masks: list[Masks]) -> tuple[Tensor, Tensor] | None:
    """[terms, N] and [terms, K]."""
    rows = [m.row_limit for m in masks if m.row_limit is not None]
    cols = [m.col_limit for m in masks if m.col_limit is not None]
    return (torch.stack(rows), torch.stack(cols)) if rows else None


def _merge(top2: Tensor, total: Tensor, running_max: Tensor, running_sum: Tensor) -> None:
    """Partial statistics [parts, size] in base 2 into running ones in base e, in fp64 and in a fixed order."""
    top = top2.double() / LOG2E
    best = torch.maximum(top.amax(0), running_max.double())
    shift = torch.where(best == -torch.inf, 0, best).to(running_max.dtype)  # what later steps will subtract
    added = (total.double() * (top - shift.double()).exp()).sum(0)
    running_sum.mul_((running_max.double() - shift.double()).exp()).add_(added)
    running_max.copy_(torch.where(best == -torch.inf, best.to(shift.dtype), shift))


def _base2(shift: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """exp(s - shift) coefficient as 2^(s2 - shift2) coefficient2, shift2 exact in fp32."""
    shift2 = (shift.double() * LOG2E).float()
    change = torch.where(shift2.isfinite(), shift2.double() / LOG2E - shift.double(), 0).exp()
    return shift2, (coefficient.double() * change).float()


def _panel_shape(q: Tensor, k: Tensor, tiles: Tiles) -> tuple[int, int]:
    """(width, height): whole tiles, as wide as the keys when that leaves at least 2,048 rows."""
    elements = PANEL_BYTES // q.element_size()
    width = min(-(-k.shape[0] // tiles.BN) * tiles.BN, max(tiles.BN, elements // 2048 // tiles.BN * tiles.BN))
    height = min(-(-q.shape[0] // tiles.BM) * tiles.BM, max(tiles.BM, elements // width // tiles.BM * tiles.BM))
    return width, height
