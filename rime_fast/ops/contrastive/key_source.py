"""Where a rank gets every rank's keys from: one all-gather, or a ring once gathered keys would not fit.

Gathered: all keys at once, one block. Ring: in step s a rank holds the keys of rank r - s and passes them to its right
neighbour while it works on them, so at most two blocks are in memory; the gradient of a block travels the same way,
one step behind, and is complete when it is home. All modes of a rank travel in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.contrastive.agreement import Agreement
from rime_fast.ops.contrastive.collectives import gather_rows, scatter_sum_rows


class KeySource:
    """The keys of all ranks, block by block. ``ring`` says how they come."""

    def __init__(self, keys: list[Tensor], settled: Agreement, group: Any) -> None:
        self.counts, self.rank, self.group = settled.n_keys, settled.rank, group
        self.dims = [key.shape[1] for key in keys]
        self.own = torch.cat([key.detach() for key in keys], dim=1)
        self.offsets = [sum(self.counts[:rank]) for rank in range(len(self.counts))]
        self.ring = sum(self.counts) * self.own.shape[1] * self.own.element_size() > settled.gather_limit
        self.gathered = None if self.ring else gather_rows(self.own, self.counts, group)

    def blocks(self) -> Iterator[tuple[int, int, list[Tensor]]]:
        """(first key, one past the last, keys of each mode) of every block; each rank sees all keys once."""
        if self.gathered is not None:
            yield 0, self.gathered.shape[0], self._modes(self.gathered)
            return
        for rank, held in self._travel():
            start = self.offsets[rank]
            yield start, start + self.counts[rank], self._modes(held[: self.counts[rank]])

    def gradients(self, add: Callable[[int, int, list[Tensor], list[Tensor]], None], wanted: bool) -> list[Tensor]:
        """Run ``add(start, stop, keys, dk)`` on every block, where it adds to dk; the summed dk of this rank's keys.

        wanted: some rank's keys require grad (the same on all ranks); otherwise dk is scratch and [] comes back.
        """
        dtype = torch.float64 if self.own.dtype == torch.float64 else torch.float32
        if self.gathered is not None:
            dk = self._zeros(self.gathered.shape[0], dtype)
            add(0, self.gathered.shape[0], self._modes(self.gathered), dk)
            return self._modes(scatter_sum_rows(torch.cat(dk, dim=1), self.counts, self.group)) if wanted else []
        done = self.own.new_empty(0)
        for step, (rank, held) in enumerate(self._travel()):
            count, start = self.counts[rank], self.offsets[rank]
            arriving, coming = held.new_empty(count, held.shape[1], dtype=dtype), []
            if wanted and step > 0:  # every rank posts the same pair in the same order, so no two can wait in a circle
                coming = self._post(send=done, receive=arriving)
            dk = self._zeros(count, dtype)
            add(start, start + count, self._modes(held[:count]), dk)
            _wait(coming)
            done = torch.cat(dk, dim=1)
            if wanted and step > 0:
                done += arriving
        if not wanted:
            return []
        home = self.own.new_empty(self.own.shape, dtype=dtype)
        _wait(self._post(send=done, receive=home))
        return self._modes(home)

    def _travel(self) -> Iterator[tuple[int, Tensor]]:
        """(rank whose keys these are, its packed keys padded to the longest), the next ones arriving meanwhile."""
        world, longest = len(self.counts), max(self.counts)
        held = self.own.new_zeros(longest, self.own.shape[1])
        held[: self.own.shape[0]] = self.own
        for step in range(world):
            coming, pending = torch.empty_like(held), []
            if step + 1 < world:
                pending = self._post(send=held, receive=coming)
            yield (self.rank - step) % world, held
            _wait(pending)
            held = coming

    def _post(self, send: Tensor, receive: Tensor) -> list[dist.Work]:
        """Start sending to the right neighbour and receiving from the left one."""
        world = len(self.counts)
        right = dist.get_global_rank(self.group, (self.rank + 1) % world)
        left = dist.get_global_rank(self.group, (self.rank - 1) % world)
        to_right = dist.P2POp(dist.isend, send, right, self.group)
        from_left = dist.P2POp(dist.irecv, receive, left, self.group)
        return dist.batch_isend_irecv([to_right, from_left])

    def _modes(self, packed: Tensor) -> list[Tensor]:
        return list(packed.split(self.dims, dim=1))

    def _zeros(self, rows: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(rows, dim, dtype=dtype, device=self.own.device) for dim in self.dims]


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
