"""The chunked backend on CUDA: tiles by cuBLAS from rows in their own dtype, consumed by csrc's row kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.contrastive import nested, tiles

TILE = (16_384, 16_384)  # 1 GiB of fp32; passes over tiles of a quarter of it take 4 to 10 % longer on an H100
PATCH = (256, 256)  # rows and columns of the patches whose parts the kernel writes (csrc/rime)
SHIFTLESS = False
BASE2 = False


def why_not(tensor: Tensor) -> str | None:
    """The reason library products cannot serve a call on ``tensor``, or None: on a GPU their tiles need csrc."""
    return native.why_not(cuda=True) if tensor.is_cuda and tensor.dtype != torch.float64 else None


def operands(tensors: list[Tensor]) -> list[Tensor]:
    """Give the rows in the dtype in which they are multiplied."""
    return [tensor.detach().contiguous() for tensor in tensors]


def sweep(
    queries: list[Tensor],
    keys: list[Tensor],
    terms: Sequence[tuple[int, int]],
    scale: Tensor,
    masks: list[tiles.Masks],
    flag: Tensor,
    widths: tuple[int, ...] = (),
) -> tiles.TileSweep:
    """Make the pass over the tiles, as cpu.sweep does; rows of the kernels' tiles start at 16 bytes."""
    rows = CudaRows(scale, flag) if tiles.has_compiled_rows(queries[0]) else tiles.TorchRows(scale)
    if len(widths) > 1:
        tile = TILE[0], TILE[1] // len(widths)  # all widths' together are as large as one
        return nested.NestedSweep(queries, keys, terms, masks, rows, tile, 4, widths)
    return tiles.TileSweep(queries, keys, terms, masks, rows, TILE, align=4)


class CudaRows(tiles.CompiledRows):
    """The row kernels on CUDA, with room for the parts of a tile's statistics, and narrow gradients in the tile's own
    memory."""

    def __init__(self, scale: Tensor, flag: Tensor) -> None:
        super().__init__(scale, flag)
        self._parts: Tensor | None = None

    def workspace(self, tile: Tensor) -> Tensor | None:
        if self._parts is None:  # the first tile of a sweep is its largest
            (rows, cols), (high, wide) = tile.shape, PATCH
            self._parts = tile.new_empty(2 * (rows * -(-cols // wide) + cols * -(-rows // high)))
        return self._parts

    def narrow(self, tile: Tensor, dtype: torch.dtype) -> Tensor:
        return narrow_view(tile, dtype)


def narrow_view(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """View the memory of an fp32 tile as ``dtype``: rows keep their place, a narrow type fills the
    first half of each."""
    if tile.dtype == dtype:
        return tile
    whole = torch.as_strided(tile, (tile.shape[0], tile.stride(0)), tile.stride())
    return whole.view(dtype)[:, : tile.shape[1]]
