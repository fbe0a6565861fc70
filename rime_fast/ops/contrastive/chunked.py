"""The tiled sweep: a library GEMM fills a bounded tile of similarities, a row kernel consumes it at once.

Forward: one product a tile gives the statistics of its rows AND its columns (2 N K D FLOP a term). Backward: the same
product again, turned in place into the gradient G of the tile, then dq += G k and dk += G^T q (6 N K D FLOP). Memory:
one tile plus O(N D). Tiles, and with them all sums, depend on the shapes alone: the result is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.contrastive.inputs import accumulation_dtype
from rime_fast.ops.contrastive.positives import Positives
from rime_fast.ops.contrastive.products import add_product, similarities
from rime_fast.ops.contrastive.rows import BOUNDED, Masks, NativeRows, Rows, Slopes, Statistics, TorchRows
from rime_fast.ops.cpu_products import fast_product, fast_products

# Tile sizes. CPU: 4 MiB of fp32, so that a tile is still in cache when it is read again; the best of 128 to 512 rows by
# 1024 to 4096 columns here (all within 4 %). CUDA: 128 MiB, enough to fill the card.
CPU_TILE = (512, 2048)
CUDA_TILE = (4096, 8192)


@dataclass
class Sweep:
    """The operands of a sweep, contiguous, and what handles a tile of them.

    queries, keys: fp32 or fp64, on CUDA also bf16 and fp16. bounded: the statistics' shifts are known to be 0 (CPU).
    """

    queries: list[Tensor]
    keys: list[Tensor]
    terms: list[tuple[int, int]]
    masks: list[Masks]
    bounded: bool
    rows: Rows

    def tiles(self, q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """(similarities of a tile, first row, first column), each tile valid until the next."""
        on_cpu = q.device.type == "cpu"
        height, width = CPU_TILE if on_cpu else CUDA_TILE
        height, width = min(height, q.shape[0]), min(width, k.shape[0])
        buffer: Tensor | None = None
        for row in range(0, q.shape[0], height):
            for col in range(0, k.shape[0], width):
                block, candidates = q[row : row + height], k[col : col + width]
                if fast_products(block, candidates.T):
                    yield fast_product(block, candidates.T), row, col
                    continue
                if buffer is None:
                    buffer = q.new_empty(height * (width + 3), dtype=accumulation_dtype(q.dtype))
                rows, cols = block.shape[0], candidates.shape[0]
                stride = cols if on_cpu else -(-cols // 4) * 4  # rows of the CUDA kernels start at 16 bytes
                tile = buffer[: rows * stride].view(rows, stride)[:, :cols]
                yield similarities(block, candidates, tile), row, col

    def statistics(self, into: list[Statistics]) -> None:
        """Add every tile of every term to that term's statistics."""
        for (q, k), masks, state in zip(self.terms, self.masks, into, strict=True):
            for tile, row, col in self.tiles(self.queries[q], self.keys[k]):
                self.rows.statistics(tile, row, col, masks, state)
                del tile  # before the next one is made

    def gradients(self, slopes: list[Slopes], dq: list[Tensor | None], dk: list[Tensor | None]) -> None:
        """Add every tile's gradient to dq and dk (None: not wanted)."""
        for (qm, km), masks, slope in zip(self.terms, self.masks, slopes, strict=True):
            q, k = self.queries[qm], self.keys[km]
            for tile, row, col in self.tiles(q, k):
                g = self.rows.gradient(tile, row, col, masks, slope, q.dtype)
                rows, cols = slice(row, row + g.shape[0]), slice(col, col + g.shape[1])
                add_product(dq[qm], rows, g, k[cols])
                add_product(dk[km], cols, g.T, q[rows])
                del tile, g


def has_native_rows(tensor: Tensor) -> bool:
    """True where the compiled kernels handle the tiles of these operands."""
    return tensor.dtype != torch.float64 and native.available(cuda=tensor.is_cuda)


def row_kernels(operand: Tensor, scale: Tensor, flag: Tensor) -> Rows:
    """What handles the tiles of such operands. flag: 0-d int32, 1 when every |logit| <= BOUNDED."""
    return NativeRows(scale, flag) if has_native_rows(operand) else TorchRows(scale)


def largest_norm(tensors: list[Tensor]) -> Tensor:
    """0-d: the largest row norm; NaN when a row holds one."""
    norms = [torch.linalg.vector_norm(t.detach(), dim=1, dtype=accumulation_dtype(t.dtype)).amax() for t in tensors]
    return torch.stack(norms).amax()


def is_bounded(query_norm: float, key_norm: float, scale: Tensor) -> bool:
    """True when no logit can leave [-BOUNDED, BOUNDED]: then one exponential serves rows and columns."""
    bound = query_norm * key_norm
    return bound < math.inf and bound * abs(float(scale)) < BOUNDED


def id_classes(query_ids: Tensor | None, key_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """64-bit ids as int32 class numbers, equal exactly where the ids are: half the bytes to compare in a tile.

    By a sort, as counting classes (torch.unique) would make the host wait for an accelerator.
    """
    if query_ids is None or key_ids is None:
        return None, None
    ordered, place = torch.cat([query_ids, key_ids]).sort()
    rank = torch.zeros_like(place)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    classes = torch.empty_like(rank, dtype=torch.int32).scatter_(0, place, rank.to(torch.int32))
    row_ids, col_ids = classes.split([query_ids.shape[0], key_ids.shape[0]])
    return row_ids.contiguous(), col_ids.contiguous()


def pair_similarity(queries: Tensor, keys: Tensor, positives: Positives) -> Tensor:
    """[N, P] similarity of each query with its positives, -inf for a missing one; by blocks (no copy of the keys)."""
    dtype = accumulation_dtype(queries.dtype)
    columns = []
    for at in positives.at.unbind(1):
        pairs = zip(queries.split(4096), at.split(4096), strict=True)
        columns.append(torch.cat([(q.to(dtype) * keys[index]).sum(1) for q, index in pairs]))
    found = torch.stack(columns, dim=1)
    return found if len(columns) == 1 else torch.where(positives.weight > 0, found, -torch.inf)
