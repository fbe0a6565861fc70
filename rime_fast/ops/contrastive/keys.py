"""Where a rank gets the keys from that its queries meet, block by block, and where their gradients go.

One rank alone has one block: its own keys. In a group all keys come by one all-gather, again one block, or around a
ring once gathered keys would not fit: in step s a rank holds the keys of rank r - s and passes them to its right
neighbour while it works on them, so at most two blocks are in memory; the gradient of a block travels the same way, one
step behind, and is complete when it is home. All modes of a rank travel in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.collectives import gather_rows, scatter_sum_rows
from rime_fast.ops.contrastive.problem import accumulation_dtype

# start, stop, keys of each mode, dk of each mode (None: not wanted) to add to
Add = Callable[[int, int, list[Tensor], list[Tensor | None]], None]


class OwnKeys:
    """The source of keys where this rank's are all there are.

    n_queries, n_keys: over all ranks. first_key: the first of this rank's keys among all. alone: there is no other.
    """

    alone = True

    def __init__(self, keys: Sequence[Tensor], n_queries: int) -> None:
        self.keys, self.n_queries, self.n_keys, self.first_key = list(keys), n_queries, keys[0].shape[0], 0

    def blocks(self) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Give every block as (first key, one past the last, keys of each mode); each rank sees all keys once."""
        yield 0, self.n_keys, self.keys

    def gradients(self, add: Add, wanted: list[bool]) -> list[Tensor | None]:
        """Run ``add`` on every block; returns the complete gradient of this rank's keys, None for
        modes not ``wanted``."""
        dtype = accumulation_dtype(self.keys[0].dtype)
        dk = [torch.zeros_like(k, dtype=dtype) if want else None for k, want in zip(self.keys, wanted, strict=True)]
        add(0, self.n_keys, self.keys, dk)
        return dk

    def gather(self, values: Tensor) -> Tensor:
        """Gather one value for each of this rank's keys -> one for each of all keys."""
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return values

    def max_(self, values: Tensor) -> Tensor:
        """Take the maximum over ranks, in place."""
        return values


class GroupKeys(OwnKeys):
    """The keys of all ranks of a group; ``ring`` says how they come.

    key_counts, query_counts: rows of every rank. gather_limit: bytes of gathered keys beyond which they are ringed.
    """

    alone = False

    def __init__(
        self, keys: Sequence[Tensor], key_counts: list[int], query_counts: list[int], group: Any, gather_limit: int
    ) -> None:
        self.counts, self.rank, self.group = key_counts, dist.get_rank(group), group
        self.offsets = [sum(key_counts[:rank]) for rank in range(len(key_counts))]
        self.n_queries, self.n_keys, self.first_key = sum(query_counts), sum(key_counts), self.offsets[self.rank]
        self.dims = [key.shape[1] for key in keys]
        self.own = torch.cat([key.detach() for key in keys], dim=1)
        self.ring = self.n_keys * self.own.shape[1] * self.own.element_size() > gather_limit
        self.gathered = None if self.ring else gather_rows(self.own, key_counts, group)

    def blocks(self) -> Iterator[tuple[int, int, list[Tensor]]]:
        if self.gathered is not None:
            yield 0, self.n_keys, self._modes(self.gathered)
            return
        for rank, held in self._travel():
            start = self.offsets[rank]
            yield start, start + self.counts[rank], self._modes(held[: self.counts[rank]])

    def gradients(self, add: Add, wanted: list[bool]) -> list[Tensor | None]:
        """Run ``add`` on every block as the base class does; ``wanted`` is all True or all False, the same on every
        rank."""
        none: list[Tensor | None] = [None] * len(self.dims)
        if not any(wanted):
            for start, stop, keys in self.blocks():
                add(start, stop, keys, list(none))
            return none
        dtype = accumulation_dtype(self.own.dtype)
        if self.gathered is not None:
            dk = self._zeros(self.n_keys, dtype)
            add(0, self.n_keys, self._modes(self.gathered), list(dk))
            return list(self._modes(scatter_sum_rows(torch.cat(dk, dim=1), self.counts, self.group)))
        done = self.own.new_empty(0)
        for step, (rank, held) in enumerate(self._travel()):
            count, start = self.counts[rank], self.offsets[rank]
            arriving, coming = held.new_empty(count, held.shape[1], dtype=dtype), []
            if step > 0:  # every rank posts the same pair in the same order, so no two can wait in a circle
                coming = self._post(send=done, receive=arriving)
            dk = self._zeros(count, dtype)
            add(start, start + count, self._modes(held[:count]), list(dk))
            _wait(coming)
            done = torch.cat(dk, dim=1)
            if step > 0:
                done += arriving
        home = self.own.new_empty(self.own.shape, dtype=dtype)
        _wait(self._post(send=done, receive=home))
        return list(self._modes(home))

    def gather(self, values: Tensor) -> Tensor:
        return gather_rows(values, self.counts, self.group)

    def sum_(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def max_(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

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
