"""A head split by vocabulary over the ranks of a process group (Megatron's layout): rank r holds columns
[r V/p, (r + 1) V/p). Hidden states, targets and upstream gradients are the same on every rank.

Each rank computes its columns' log-sum-exp, target score and entropy; two small all-reduces ([R] and [2 or 3, R] for R
rows) make them those of the whole vocabulary. Where the gradient is made in the forward, that is done for every block
of rows while its logits wait in their buffer. Every rank makes its own dW; dX is summed over the group, once a call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.checks import require
from rime_fast.ops.collectives import all_gather
from rime_fast.ops.logprob_pool.problem import Gradients, Statistics, share_of_part, whole_of_parts


def shard(lm_head: Tensor, group: dist.ProcessGroup) -> tuple[int, int, str]:
    """Say which part of the head this rank has: (whole V, this rank's first column, the group's name). Every rank must
    hold the same number of columns."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"vocab_group: expected a torch.distributed ProcessGroup, got {type(group).__name__}")
    columns = lm_head.shape[0]
    if torch.compiler.is_compiling():
        raise RuntimeError("vocab_group: not inside of torch.compile, where the ranks cannot compare their parts")
    # The first thing the ranks do together, and the same whatever they hold: unequal parts are an error on all of them,
    # not targets out of range on one while the others wait.
    parts = all_gather(torch.tensor([columns], device=lm_head.device), group)
    held = f", got {parts.tolist()}" if parts.device.type == "cpu" else ""
    require((parts == columns) & (parts > 0), f"vocab_group: expected equal parts of lm_head on all ranks{held}")
    return columns * dist.get_world_size(group), columns * dist.get_rank(group), group.group_name


def _group(name: str) -> dist.ProcessGroup:
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)


def merge(stats: Statistics, name: str) -> Statistics:
    """Merge every rank's own statistics into the whole vocabulary's; as they are where the head is whole (no name)."""
    if not name:
        return stats
    group = _group(name)
    top = stats.lse[0].clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    total = share_of_part(stats, top)
    dist.all_reduce(total, group=group)
    return whole_of_parts(total, top)


def reduce_gradients(found: Gradients, name: str) -> Gradients:
    """Sum over the group what every rank holds only its columns' share of: the gradients of hidden and temperature."""
    if not name:
        return found
    group = _group(name)
    hidden, d_temperature = found.hidden, found.temperature
    if hidden is not None:
        total = hidden.float()
        dist.all_reduce(total, group=group)
        hidden = total.to(hidden.dtype)
    if d_temperature is not None:
        dist.all_reduce(d_temperature, group=group)
    return found._replace(hidden=hidden, temperature=d_temperature)
