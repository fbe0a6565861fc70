"""The tiled sweep: a library GEMM fills a bounded tile of similarities, a row kernel consumes it at once.

Forward: one product a tile gives the statistics of its rows AND its columns (2 N K D FLOP a term). Backward: the same
product again, turned in place into the gradient G of the tile, then dq += G k and dk += G^T q (6 N K D FLOP). Memory:
one tile plus O(N D). Tiles, and with them all sums, depend on the shapes alone: the result is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.contrastive.inputs import accumulation_dtype
from rime_fast.ops.contrastive.rows import BOUNDED, Masks, NativeRows, Slopes, Statistics, TorchRows

# Tile sizes. CPU: 4 MiB of fp32, so that a tile is still in cache when it is read again; the best of 128 to 512 rows by
# 1024 to 4096 columns here (all within 4 %). CUDA: 128 MiB, enough to fill the card.
CPU_TILE = (512, 2048)
CUDA_TILE = (4096, 8192)


@dataclass
class Sweep:
    """The operands of a sweep, in the accumulation dtype and contiguous, and what handles a tile of them."""

    queries: list[Tensor]
    keys: list[Tensor]
    terms: list[tuple[int, int]]
    scale: Tensor  # 0-d, 1 / temperature
    masks: list[Masks]  # one a term: limits depend on it
    bounded: bool
    native_rows: bool

    def tiles(self, q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """(similarities of a tile, first row, first column), each tile valid until the next."""
        height, width = CPU_TILE if q.device.type == "cpu" else CUDA_TILE
        height, width = min(height, q.shape[0]), min(width, k.shape[0])
        buffer = q.new_empty(height * width)
        for row in range(0, q.shape[0], height):
            for col in range(0, k.shape[0], width):
                block, candidates = q[row : row + height], k[col : col + width]
                tile = buffer[: block.shape[0] * candidates.shape[0]].view(block.shape[0], candidates.shape[0])
                yield torch.mm(block, candidates.T, out=tile), row, col

    def kernel(self, name: str) -> Callable[..., None]:
        """statistics or gradient, with ``scale`` bound."""
        if not self.native_rows:
            function = getattr(TorchRows, name)
            return lambda tile, *rest: function(tile, self.scale, *rest)
        function, scale = getattr(NativeRows, name), float(self.scale)
        return lambda tile, *rest: function(tile, scale, *rest)

    def statistics(self, into: list[Statistics]) -> None:
        """Add every tile of every term to that term's statistics."""
        kernel = self.kernel("statistics")
        for (q, k), masks, state in zip(self.terms, self.masks, into, strict=True):
            for tile, row, col in self.tiles(self.queries[q], self.keys[k]):
                kernel(tile, row, col, masks, state)

    def gradients(self, slopes: list[Slopes], dq: list[Tensor | None], dk: list[Tensor | None]) -> None:
        """Add every tile's gradient to dq and dk (None: not wanted)."""
        kernel = self.kernel("gradient")
        for (q, k), masks, slope in zip(self.terms, self.masks, slopes, strict=True):
            for tile, row, col in self.tiles(self.queries[q], self.keys[k]):
                kernel(tile, row, col, masks, slope)
                rows, cols = slice(row, row + tile.shape[0]), slice(col, col + tile.shape[1])
                into_q, into_k = dq[q], dk[k]
                if into_q is not None:
                    into_q[rows].addmm_(tile, self.keys[k][cols])
                if into_k is not None:
                    into_k[cols].addmm_(tile.T, self.queries[q][rows])


def has_native_rows(tensor: Tensor) -> bool:
    """True where the C++ kernels handle tiles of this (accumulation-dtype) tensor."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and native.available()


def largest_norm(tensors: list[Tensor]) -> float:
    """The largest row norm; inf on an accelerator, where looking would make the host wait."""
    if tensors[0].device.type != "cpu":
        return math.inf
    norms = [torch.linalg.vector_norm(t.detach(), dim=1, dtype=accumulation_dtype(t.dtype)).amax() for t in tensors]
    return float(torch.stack(norms).amax())


def is_bounded(query_norm: float, key_norm: float, scale: Tensor) -> bool:
    """True when no logit can leave [-BOUNDED, BOUNDED]: then one exponential serves rows and columns.

    False for NaN, and for norms nobody looked at (inf).
    """
    bound = query_norm * key_norm
    return bound < math.inf and bound * abs(float(scale)) < BOUNDED


def id_classes(query_ids: Tensor | None, key_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """64-bit ids as int32 class numbers, equal exactly where the ids are: half the bytes to compare in a tile.

    On an accelerator they stay as they are, since counting classes would make the host wait.
    """
    if query_ids is None or key_ids is None:
        return None, None
    if query_ids.device.type != "cpu":
        return query_ids.contiguous(), key_ids.contiguous()
    _, classes = torch.unique(torch.cat([query_ids, key_ids]), return_inverse=True)
    row_ids, col_ids = classes.to(torch.int32).split([query_ids.shape[0], key_ids.shape[0]])
    return row_ids.contiguous(), col_ids.contiguous()


def pair_similarity(queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    """[N] similarity of each query with its positive, by row blocks (no second copy of the keys)."""
    dtype = accumulation_dtype(queries.dtype)
    pairs = zip(queries.split(4096), labels.split(4096), strict=True)
    return torch.cat([(q.to(dtype) * keys[index]).sum(1) for q, index in pairs])


def best_of_column(similarity: Tensor, labels: Tensor, n_keys: int) -> Tensor:
    """[K] the largest similarity among the queries labelled with each key; -inf for a key without one."""
    best = similarity.new_full((n_keys,), -torch.inf)
    return best.scatter_reduce(0, labels, similarity, "amax")
