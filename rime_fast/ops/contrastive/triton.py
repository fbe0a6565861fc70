"""The contrastive loss on Triton: the host side of triton_kernels.py, with the same two sweeps as tiles.TileSweep.

Operands stay in their dtype (bf16, fp16, fp32). The forward runs over stripes of rows so that partial statistics stay
bounded; the backward over panels of G in the operands' dtype (PANEL_BYTES), each consumed by two library GEMMs with
fp32 accumulation (tiles.add_product).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rime_fast.ops import dispatch
from rime_fast.ops.contrastive import triton_parts
from rime_fast.ops.contrastive.softmax import Slopes, Statistics
from rime_fast.ops.contrastive.tiles import Masks, add_product
from rime_fast.ops.contrastive.triton_nested import NestedTritonSweep
from rime_fast.ops.contrastive.triton_parts import (
    Tiles,
    add_parts,
    dense,
    label_range,
    limits_of,
    panel_shape,
    scale_base2,
    superblock,
)

INTERPRETER_TMA = True  # descriptors where a GPU would take them; tests compare both
SHIFTLESS = False  # softmax.py always gets the shifts, also where they are 0
BASE2 = True  # the exponentials of the gradient


def why_not(tensor: Tensor) -> str | None:
    """The reason Triton cannot serve a call on ``tensor``, or None."""
    if tensor.dtype == torch.float64:
        return "it computes in fp32; fp64 runs on chunked or reference"
    return dispatch.triton_why_not(tensor)


def operands(tensors: list[Tensor]) -> list[Tensor]:
    """Give the rows as they are multiplied: in their own dtype, of any stride."""
    return [tensor.detach() for tensor in tensors]


def sweep(
    queries: list[Tensor],
    keys: list[Tensor],
    terms: Sequence[tuple[int, int]],
    scale: Tensor,
    masks: list[Masks],
    flag: Tensor,
    widths: tuple[int, ...] = (),
) -> TritonSweep | NestedTritonSweep:
    """Make the pass over the tiles, as cpu.sweep does."""
    if len(widths) > 1:
        return NestedTritonSweep(queries, keys, terms, scale, masks, flag, widths)
    return TritonSweep(queries, keys, terms, scale, masks, flag)


def tiles_for(kernel: str, dtype: torch.dtype, capability: tuple[int, int], tma: bool, heavy: bool) -> Tiles:
    """Choose the tiles, fixed per kernel, dtype and generation: the largest that no supported Triton spills on Hopper.

    heavy: the variants that hold more in registers, with a margin or with a maximum in every softmax.
    """
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2)
    if not tma:
        return Tiles(128, 64, 64 if capability[0] in (9, 10) else 32, 8, 3)
    if not heavy and (kernel == "gradient_kernel" or capability[0] == 9):
        return Tiles(128, 128, 64, 8, 3)
    return Tiles(128, 64, 64, 8, 2 if capability[0] == 10 and heavy else 3)  # a third stage spilled 8 bytes there


@dataclass
class TritonSweep:
    """The pass over the tiles by Triton, as tiles.TileSweep, on operands in their own dtype. ``flag``: 0-d int32, 1
    when every |logit| <= BOUNDED."""

    queries: list[Tensor]
    keys: list[Tensor]
    terms: Sequence[tuple[int, int]]
    scale: Tensor
    masks: list[Masks]
    flag: Tensor
    row_products: list[Tensor] = field(init=False, default_factory=list)  # as tiles.TileSweep's

    def statistics(self, into: Statistics) -> None:
        """Add every term's tiles to its statistics; terms whose modes have one D run in one launch."""
        widths = [self.queries[q].shape[1] for q, _ in self.terms]
        for width in dict.fromkeys(widths):
            chosen = [i for i, w in enumerate(widths) if w == width]
            for first in range(0, len(chosen), 15):  # four bits a term and mode in the launch's mode words
                part = chosen[first : first + 15]
                with dispatch.on_device_of(self.scale):  # Triton launches on the current device
                    terms, masks = [self.terms[i] for i in part], [self.masks[i] for i in part]
                    self._statistics(terms, masks, into, part)

    def _statistics(
        self, terms: list[tuple[int, int]], masks: list[Masks], into: Statistics, places: list[int]
    ) -> None:
        from rime_fast.ops.contrastive.triton_kernels import statistics_kernel

        q_modes, k_modes = list(dict.fromkeys(q for q, _ in terms)), list(dict.fromkeys(k for _, k in terms))
        q, k = _stacked([self.queries[m] for m in q_modes]), _stacked([self.keys[m] for m in k_modes])  # [modes x N, D]
        plane, n_keys, width = self.queries[q_modes[0]].shape[0], self.keys[k_modes[0]].shape[0], q.shape[1]
        scale2, first, limits = scale_base2(self.scale), masks[0], limits_of(masks)
        tma = uses_descriptors(q, k)
        light = _tiles("statistics_kernel", q, tma, heavy=limits is not None)
        words = _word(q_modes.index(m) for m, _ in terms), _word(k_modes.index(m) for _, m in terms)
        for row in range(0, plane, triton_parts.STRIPE):
            rows = slice(row, min(row + triton_parts.STRIPE, plane))
            n, labels = rows.stop - rows.start, first.labels[rows]
            side = superblock(n, n_keys, len(terms), max(light.BM, light.BN))
            a_blocks, b_blocks = -(-n // side), -(-n_keys // side)
            row_part = q.new_empty(len(terms), 3, b_blocks, n, dtype=torch.float32)
            col_part = q.new_empty(len(terms), 2, a_blocks, n_keys, dtype=torch.float32)
            positive = q.new_full((len(terms), *labels.shape), -torch.inf, dtype=torch.float32)
            heavy = _tiles("statistics_kernel", q, tma, heavy=True)
            ranges = {height: label_range(labels, height) for height in {light.BM, heavy.BM}}
            # Two kernels, of which the flag on the device lets one run: each holds fewer registers than both in one.
            for bounded in (True, False):
                tiles = light if bounded else heavy
                statistics_kernel[(len(terms) * a_blocks * b_blocks,)](
                    _operand(q, tma, tiles.BM, tiles.BK),
                    _operand(k, tma, tiles.BN, tiles.BK),
                    labels,
                    ranges[tiles.BM],
                    _part(first.row_ids, rows),
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
                    width,
                    q.stride(0),
                    k.stride(0),
                    row,
                    plane,
                    len(terms),
                    *words,
                    side,
                    side,
                    BOUNDED=bounded,
                    **self._options(q, tiles, tma, limits is not None),
                )
            if len(places) == len(into):
                add_parts(row_part, col_part, positive, into, rows)
            else:  # views: an index list would make copies
                for term, place in enumerate(places):
                    one, found = slice(place, place + 1), slice(term, term + 1)
                    add_parts(row_part[found], col_part[found], positive[found], into[one], rows)

    def gradients(self, slopes: Slopes, dq: list[Tensor | None], dk: list[Tensor | None]) -> None:
        """Add every term's gradient to dq and dk in fp32."""
        with dispatch.on_device_of(self.scale):
            self._gradients(slopes, dq, dk)

    def _gradients(self, slopes: Slopes, dq: list[Tensor | None], dk: list[Tensor | None]) -> None:
        from rime_fast.ops.contrastive.triton_kernels import gradient_kernel

        scale2 = scale_base2(self.scale)
        for term, ((qm, km), masks) in enumerate(zip(self.terms, self.masks, strict=True)):
            q, k = dense(self.queries[qm]), dense(self.keys[km])
            tma = uses_descriptors(q, k)
            tiles = _tiles("gradient_kernel", q, tma, heavy=masks.row_limit is not None)
            q_operand, k_operand = _operand(q, tma, tiles.BM, tiles.BK), _operand(k, tma, tiles.BN, tiles.BK)
            width, height = panel_shape(q, k, tiles, q.element_size())
            panel = q.new_empty(height, width)
            options = self._options(q, tiles, tma, masks.row_limit is not None)
            for row in range(0, q.shape[0], height):
                for col in range(0, k.shape[0], width):
                    rows, cols = slice(row, min(row + height, q.shape[0])), slice(col, min(col + width, k.shape[0]))
                    grid = (-(-(rows.stop - row) // tiles.BM), -(-(cols.stop - col) // tiles.BN))
                    gradient_kernel[grid](
                        q_operand,
                        k_operand,
                        masks.labels,
                        masks.labels.shape[1],
                        masks.row_ids,
                        masks.col_ids,
                        masks.row_limit,
                        masks.col_limit,
                        scale2,
                        self.flag,
                        slopes.factor[term],
                        slopes.row_shift[term],
                        slopes.row_coef[term],
                        slopes.col_shift[term],
                        slopes.col_coef[term],
                        slopes.positive_slope[term],
                        panel,
                        row,
                        col,
                        rows.stop,
                        cols.stop,
                        q.shape[1],
                        q.stride(0),
                        k.stride(0),
                        width,
                        **options,
                    )
                    g = panel[: rows.stop - row, : cols.stop - col]
                    add_product(dq[qm], rows, g, k[cols])
                    add_product(dk[km], cols, g.T, q[rows])

    def _options(self, q: Tensor, tiles: Tiles, tma: bool, margin: bool) -> dict[str, object]:
        tf32 = q.dtype == torch.float32 and q.is_cuda and dispatch.tf32_allowed()
        return {
            "BM": tiles.BM,
            "BN": tiles.BN,
            "BK": tiles.BK,
            "IDS": self.masks[0].row_ids is not None,
            "MARGIN": margin,
            "WIDEN": not q.is_cuda,
            "EVEN": q.shape[-1] % tiles.BK == 0,
            "PRECISION": "tf32" if tf32 else "ieee",
            "TMA": tma,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "enable_fp_fusion": False,  # an fma of q . k scale - maximum would see digits that the maximum has not
        }


def uses_descriptors(q: Tensor, k: Tensor) -> bool:
    """Whether tensor descriptors (TMA) load the operands: 16-bit, on sm_90 or later, rows that start on 16 bytes."""
    aligned = all(t.stride(0) % 8 == 0 and t.stride(1) == 1 and t.data_ptr() % 16 == 0 for t in (q, k))
    if q.element_size() != 2 or not aligned:
        return False
    return torch.cuda.get_device_capability(q.device) >= (9, 0) if q.is_cuda else INTERPRETER_TMA


def _operand(tensor: Tensor, tma: bool, rows: int, columns: int) -> object:
    """``tensor`` as a kernel takes it: a descriptor of blocks [rows, columns], or the pointer."""
    if not tma:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def _tiles(kernel: str, tensor: Tensor, tma: bool, heavy: bool) -> Tiles:
    if tensor.is_cuda:
        return tiles_for(kernel, tensor.dtype, torch.cuda.get_device_capability(tensor.device), tma, heavy)
    return Tiles(32, 32 if heavy else 64, 16, 4, 1)  # the interpreter


def _stacked(modes: list[Tensor]) -> Tensor:
    return dense(modes[0]) if len(modes) == 1 else torch.cat(modes)


def _word(modes: Iterable[int]) -> int:
    """Modes of the terms, four bits each."""
    return sum(mode << (4 * term) for term, mode in enumerate(modes))


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
