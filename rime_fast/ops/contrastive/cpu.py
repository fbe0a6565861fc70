"""The chunked backend on a CPU: tiles by oneDNN or torch.mm in fp32 (fp64), consumed by csrc's row kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rime_fast.ops.contrastive import tiles
from rime_fast.ops.contrastive.problem import accumulation_dtype

# 4 MiB of fp32, so that a tile is still in cache when it is read again; the best of 128 to 512 rows by 1024 to 4096
# columns here (all within 4 %).
TILE = (512, 2048)
SHIFTLESS = True  # statistics are kept without shifts when no logit leaves the bound (softmax.Statistics)


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
    rows = tiles.CompiledRows(scale, flag) if compiled else tiles.TorchRows(scale)
    if len(widths) > 1:
        return tiles.NestedSweep(queries, keys, terms, masks, rows, TILE, 1, widths)
    return tiles.TileSweep(queries, keys, terms, masks, rows, TILE, align=1)
