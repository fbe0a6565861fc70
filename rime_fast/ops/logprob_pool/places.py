"""The scored rows one after the other, as products take them, and the way of their results back to the rows.

On a GPU each step is one Triton kernel (triton_places.py), since small launches before and between the products cost
the host more than the device; elsewhere, for the tests of CUDA's schedule, torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.ops.logprob_pool.problem import (
    Problem,
    Scored,
    Statistics,
    Upstream,
    loss_slope,
    new_statistics,
    scored_rows,
)


def by_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels do it (tests have its interpreter do it)."""
    return tensor.is_cuda


def gather(source: Tensor, order: Tensor, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """Gather ``source`` [length, H] at the rows ``order`` [C], 0 at those from ``length`` on, each from 16 bytes on:
    [C, H] of whole vectors, and never of no rows, which a descriptor cannot be made of."""
    from rime_fast.ops.logprob_pool.triton_places import gather_kernel

    source = source if source.stride(1) == 1 else source.contiguous()
    rows, width = order.shape[0], source.shape[1]
    vector = 16 // source.element_size()
    out = source.new_empty(max(1, rows), -(-width // vector) * vector, dtype=dtype)
    if rows:
        gather_kernel[(-(-rows // 32), -(-width // 256))](
            source, order, out, rows, length, width, source.stride(0), out.stride(0), BR=32, BC=256
        )
    return out[:, :width]


class Places:
    """The scored rows in order, ``capacity`` of them, and more up to a multiple: places. A place past the scored rows
    gives a zero row, whatever is in the rows, no target and no gradient.

    order [P] int64: the row of every place, T past them. number 0-d int32: how many are scored. targets [P]: in this
    rank's columns. slope [P]: of the summed loss to logp, with ``loss``.
    """

    def __init__(self, problem: Problem, multiple: int, loss: bool = False, token_weight: Tensor | None = None) -> None:
        self.problem, self.rows, options = problem, problem.hidden.shape[0], problem.options
        self.capacity = self.rows if options.max_scored < 0 else min(options.max_scored, self.rows)
        count = -(-self.capacity // multiple) * multiple
        self.slope: Tensor | None = None
        self.triton = by_triton(problem.hidden)
        if not self.triton:
            order, self.number = scored_rows(problem.ignored, options.max_scored)
            self.order = F.pad(order, (0, count - self.capacity), value=self.rows)
            self.targets = self._picked(problem.local_targets, -1)
            if loss:
                self.slope = self._picked(loss_slope(problem, token_weight).float(), 0.0)
            return
        from rime_fast.ops.logprob_pool.triton_places import places_kernel

        self.order, self.targets = (problem.targets.new_empty(count) for _ in range(2))
        self.number = (torch.empty if count else torch.zeros)((), dtype=torch.int32, device=self.order.device)
        if loss:
            self.slope = problem.hidden.new_empty(count, dtype=torch.float32)
        if count:
            places_kernel[(1,)](
                *(problem.targets, token_weight, self.order, self.targets, self.slope, self.number),
                *(self.rows, self.capacity, count),
                *(options.ignore_index, options.vocab_start, 1 if token_weight is None else token_weight.stride(0)),
                BLOCK=2048,
                num_warps=8,
            )

    @property
    def scored(self) -> Scored:
        """The rows in their places."""
        return Scored(self.order, self.number)

    def _picked(self, values: Tensor, past: float) -> Tensor:
        """``values`` [..., T] at all places."""
        at = self.order.clamp(max=self.rows - 1)
        return values.index_select(-1, at).masked_fill_(self.order == self.rows, past)

    def take(self, source: Tensor, first: int, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """Take the rows of ``source`` [T, H] at places [first, first + count), 0 past the scored ones."""
        order = self.order[first : first + count]
        if not self.triton:
            x = source[: self.rows].index_select(0, order.clamp(max=self.rows - 1))
            return x.masked_fill_((order == self.rows).unsqueeze(1), 0.0).to(dtype or x.dtype)
        return gather(source, order, self.rows, dtype)

    def put(self, rows: Tensor, first: int, out: Tensor) -> None:
        """Put ``rows`` of the places from ``first`` on at their places in ``out`` [T + 1, H], the last being what the
        places past the scored ones may be put at."""
        order = self.order[first : first + rows.shape[0]]
        if not self.triton:
            out.index_copy_(0, order, rows.to(out.dtype))
        elif rows.shape[0]:
            from rime_fast.ops.logprob_pool.triton_places import scatter_kernel

            count, width = rows.shape
            scatter_kernel[(-(-count // 32), -(-width // 256))](
                rows, order, out, count, self.rows, width, rows.stride(0), out.stride(0), BR=32, BC=256
            )

    def pick(self, stats: Statistics, upstream: Upstream) -> tuple[Statistics, Upstream]:
        """Pick both at all places; past the scored ones p = exp(z - inf) = 0 and there is no upstream gradient, so that
        they add exact zeros."""
        if not self.triton:
            lse = self._picked(stats.lse, torch.inf)
            lse[1].masked_fill_(self.order == self.rows, 0.0)
            rest = (self._picked(s, 0.0) if s.numel() else s for s in stats[1:])
            given = (None if t is None else self._picked(t.float(), 0.0) for t in upstream)
            return Statistics(lse, *rest), Upstream(*given)  # type: ignore[arg-type]
        from rime_fast.ops.logprob_pool.triton_places import pick_kernel

        count, new = self.order.shape[0], stats.lse.new_empty
        with_entropy = upstream.entropy is not None
        known = Statistics(new(2, count), new(count), new(count if with_entropy else 0))
        above = Upstream(new(count), new(count) if with_entropy else None)
        if count:
            strides = (1 if t is None else t.stride(0) for t in upstream)  # 0 where autograd expanded a number
            pick_kernel[(-(-count // 256),)](
                *(self.order, *stats, *upstream, *known, *above, count, self.rows, *strides), BLOCK=256, num_warps=4
            )
        return known, above

    def spread(self, made: list[Statistics]) -> Statistics:
        """Put the places' statistics, block after block, at their rows, 0 elsewhere."""
        entropy = self.problem.options.entropy
        if not made:
            return new_statistics(self.problem.hidden, entropy)
        found = made[0]
        if len(made) > 1:
            found = Statistics(*(torch.cat(s, -1) if s[0].numel() else s[0] for s in zip(*made, strict=True)))
        count = found.target_logit.shape[0]
        if not self.triton:
            # one row more, which takes what the places past the scored ones give
            stats = new_statistics(self.problem.hidden, entropy, self.rows + 1)
            for whole, part in zip(stats, found, strict=True):
                if whole.numel():
                    whole.index_copy_(-1, self.order[:count], part)
            return Statistics(*(s[..., : self.rows].contiguous() for s in stats))
        from rime_fast.ops.logprob_pool.triton_places import spread_kernel

        stats = new_statistics(self.problem.hidden, entropy)
        spread_kernel[(-(-count // 256),)](
            *(self.order, *found, *stats, count, self.rows), ENTROPY=entropy, BLOCK=256, num_warps=4
        )
        return stats
