"""A bank sharded over a group: every rank scores everybody's rollouts against its own part.

    all-gather rollouts and positives  ->  own similarities from whoever holds the anchor (one small all-reduce)
    ->  each rank scans its shard for all rows  ->  all-to-all of the row states (32 + 8 P bytes a row and rank)
    ->  merged in rank order, so the result is the same on every run  ->  rewards and advantages of the local rows

What travels is rollouts and states, never anchors: R D floats a rank against A D for gathering the bank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.checks import require_range
from rime_fast.ops.reward import chunked
from rime_fast.ops.reward.weights import RewardWeights


@dataclass
class Layout:
    """How the bank lies over the group: rows per rank, where this rank's part starts, and the bank's size."""

    sizes: list[int]
    offset: int
    total: int


def layout(
    gen: Tensor, anchors: Tensor, negatives_mask: Tensor | None, weights: RewardWeights, group: dist.ProcessGroup
) -> Layout:
    """Exchange the shard sizes and compare what has to be equal on all ranks (ValueError on every rank if it is not).

    A few integers through host memory where the group has a CPU backend, so that no device waits for them.
    """
    mine = torch.tensor(
        [*gen.shape, negatives_mask is not None, anchors.shape[0], *weights.encode()], dtype=torch.float64
    )
    types = {device.type for device in group._device_types}
    mine = mine.to(torch.device("cpu") if "cpu" in types else gen.device)
    table = _gather(mine[None], group).cpu()
    names = ("B", "G", "D", "negatives_mask given", "anchors", *(["weights"] * (mine.numel() - 5)))
    for column, name in enumerate(names):
        values = table[:, column]
        if name != "anchors" and bool((values != values[0]).any()):
            raise ValueError(f"group: {name} must be the same on every rank, got {values.tolist()} by rank")
    sizes = [int(size) for size in table[:, 4]]
    found = Layout(sizes, sum(sizes[: group.rank()]), sum(sizes))
    if negatives_mask is not None and negatives_mask.shape[1] != found.total:
        raise ValueError(
            f"negatives_mask: expected a column for each of the whole bank's {found.total} anchors, "
            f"got {negatives_mask.shape[1]}"
        )
    return found


def score(
    engine: chunked.Engine,
    gen: Tensor,
    anchors: Tensor,
    positive: Tensor,
    format_ok: Tensor,
    lengths: Tensor | None,
    disc_similarity: Tensor | None,
    negatives_mask: Tensor | None,
    weights: RewardWeights,
    group: dist.ProcessGroup,
) -> Tensor:
    """[12, B, G] like ``chunked.score``, for this rank's rollouts against the whole bank."""
    bank = layout(gen, anchors, negatives_mask, weights, group)
    rows = _gather(gen.flatten(0, 1).float(), group)
    everyones = _gather(positive, group)
    if positive.device.type == "cpu":
        require_range("positive", everyones, 0, bank.total - weights.positives + 1)
    local = everyones - bank.offset

    own, norms = chunked.own_similarities(engine, rows, anchors, local, weights)
    own = _own_from_holders(own, local, anchors.shape[0], weights, group)
    mask = None if negatives_mask is None else _mask_columns(negatives_mask, bank, group)
    exact = bank.total <= chunked.EXACT_ANCHORS
    states = chunked.scan(engine, rows, norms, own, anchors, local, mask, weights, exact=exact)

    parts = torch.empty_like(states)
    dist.all_to_all_single(parts, states, group=group)
    n_local = format_ok.numel()
    state = chunked.initial_state(rows[:n_local], weights)
    engine.merge(parts.view(group.size(), n_local, -1), state, weights)
    mine = own[group.rank() * n_local : (group.rank() + 1) * n_local].contiguous()
    return engine.finish(state, mine, format_ok, lengths, disc_similarity, weights)


def gather_bank(anchors: Tensor, bank: Layout, group: dist.ProcessGroup) -> Tensor:
    """The whole bank on every rank, for the reference."""
    padded = anchors.new_zeros(max(bank.sizes), anchors.shape[1])
    padded[: anchors.shape[0]] = anchors
    parts = _gather(padded, group).view(group.size(), *padded.shape)
    return torch.cat([part[:size] for part, size in zip(parts, bank.sizes, strict=True)])


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = values.new_empty(group.size() * values.shape[0], *values.shape[1:])
    dist.all_gather(list(out.split(values.shape[0])), values.contiguous(), group=group)
    return out


def _own_from_holders(
    own: Tensor, local: Tensor, n_local: int, weights: RewardWeights, group: dist.ProcessGroup
) -> Tensor:
    """Own similarities [W R, P] from the rank that holds each anchor; NaN where no rank does."""
    columns = local[:, None] + torch.arange(weights.positives, device=own.device)
    held = ((columns >= 0) & (columns < n_local)).repeat_interleave(own.shape[0] // local.shape[0], dim=0)
    sent = torch.stack([own.masked_fill(~held, 0.0), held.double()])
    dist.all_reduce(sent, group=group)
    return sent[0].masked_fill(sent[1] == 0, torch.nan)


def _mask_columns(mask: Tensor, bank: Layout, group: dist.ProcessGroup) -> Tensor:
    """[W B, A local]: everybody's mask of this rank's anchors, from [B, A] of the whole bank."""
    n_items, n_local = mask.shape[0], bank.sizes[group.rank()]
    sent = torch.cat([part.reshape(-1) for part in mask.byte().split(bank.sizes, dim=1)])
    received = sent.new_empty(group.size() * n_items * n_local)
    dist.all_to_all_single(
        received, sent, [n_items * n_local] * group.size(), [n_items * size for size in bank.sizes], group=group
    )
    return received.view(group.size() * n_items, n_local).bool()
