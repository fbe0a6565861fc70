"""Collectives of rows and numbers over a process group whose ranks may hold different numbers of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two; 2.11 and 2.12 know only the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(values: Tensor, group: Any) -> Tensor:
    """Gather all ranks' values [n, ...] one after the other, [W n, ...]; n is the same on every rank. No gradient."""
    values = values.detach().contiguous()
    out = values.new_empty(dist.get_world_size(group) * values.shape[0], *values.shape[1:])
    all_gather_single(out, values, group=group)
    return out


def gather_rows(rows: Tensor, counts: list[int], group: Any) -> Tensor:
    """Gather all ranks' rows in rank order: [counts[rank], ...] -> [sum(counts), ...]. No gradient.

    Unequal counts travel padded to the largest, because gloo gathers equal blocks only.
    """
    longest = max(counts)
    padded = rows.detach()
    if rows.shape[0] < longest:
        padded = torch.cat([padded, padded.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
    blocks = all_gather(padded, group)
    if min(counts) == longest:
        return blocks
    return torch.cat([block[:count] for block, count in zip(blocks.split(longest), counts, strict=True)])


def scatter_sum_rows(rows: Tensor, counts: list[int], group: Any) -> Tensor:
    """Sum rows over ranks, of which each rank keeps its own: [sum(counts), ...] -> [counts[rank], ...]."""
    longest = max(counts)
    blocks = rows.contiguous()
    if min(counts) < longest:
        blocks = rows.new_zeros(len(counts) * longest, *rows.shape[1:])
        for slot, part in zip(blocks.split(longest), rows.split(counts), strict=True):
            slot[: part.shape[0]] = part
    own = blocks.new_empty(longest, *rows.shape[1:])
    reduce_scatter_single(own, blocks, op=dist.ReduceOp.SUM, group=group)
    return own[: counts[dist.get_rank(group)]]


def of_all_ranks(mine: list[str], group: Any) -> list[str]:
    """Gather what any rank has to say, in rank order and the same on every one; [] costs one number on the wire."""
    if group is None:
        return mine
    flag = torch.tensor(float(bool(mine)), device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if not bool(flag):
        return []
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return [f"rank {rank}: {text}" for rank, texts in enumerate(found) for text in texts]
