"""The stable anchors of Refine-RL: discriminative embeddings of a whole set, computed once and kept with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.data.collate import Collator
from rime_fast.engine.anchor_bank import AnchorBank, data_fingerprint, model_fingerprint
from rime_fast.trainers.rollout_batch import side_ids
from rime_fast.trainers.setup import whole_parameters


def item_ids(pairs: Any, side: str) -> Tensor:
    """``side_ids`` of one side of every pair, [A, 2] int64."""
    return side_ids([getattr(pairs[i], side) for i in range(len(pairs))])


def anchor_bank(
    path: Path, model: Any, ids: Tensor, side: str, encode: Callable[[], Tensor], *, resuming: bool, save: bool,
    group: dist.ProcessGroup | None = None,
) -> AnchorBank:  # fmt: skip
    """The bank of one side: read from ``path`` where it fits, else made by ``encode`` and written there.

    ids: ``item_ids``, the data's fingerprint. encode: gives all rows [A, D] (every rank calls it, or none). resuming:
    take the file whatever model made it (the weights at hand may be a checkpoint's), but for this data only: another
    run's file is a ValueError. save: whether this rank writes.
    """
    data = data_fingerprint(ids)
    with whole_parameters(model):
        name = model_fingerprint(model)
    found = torch.tensor(float(path.is_file()), device=next(model.parameters()).device)
    if group is not None:
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
    there = bool(found)
    if there and resuming:
        return AnchorBank.open(path, model=None, data=data)
    if there:
        try:
            return AnchorBank.open(path, model=name, data=data)
        except ValueError:
            pass  # of an earlier run with another model or other data: made anew below
    rows = encode()
    if save:
        made: Any = rows  # a tensor is a sequence of its rows
        AnchorBank.make(path, made, torch.as_tensor, ids, model=name, data=data, side=side)
    return AnchorBank(rows, ids, 0, len(ids), name, data, side)


@torch.no_grad()
def discriminative_rows(
    model: Any, pairs: Any, side: str, collator: Collator, batch_size: int, device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """d of one side of every pair, [A, D] fp32 on ``device``; the work is shared by the ranks of ``group``.

    Every rank makes the same number of forwards (ZeRO-3 gathers parameters in step).
    """
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    share = -(-len(pairs) // world)
    mine = [min(i, len(pairs) - 1) for i in range(rank * share, (rank + 1) * share)]
    training, parts = model.training, []
    model.eval()
    for start in range(0, share, batch_size):
        sides = [getattr(pairs[i], side) for i in mine[start : start + batch_size]]
        batch = to_device(collator.collate_prompts(sides, mode="disc"), device)
        parts.append(model(**batch).embeddings["disc"])
    model.train(training)
    rows = torch.cat(parts)
    if group is not None:
        everyone = rows.new_empty(world * share, rows.shape[1])
        dist.all_gather_into_tensor(everyone, rows.contiguous(), group=group)
        rows = everyone
    return rows[: len(pairs)].float()


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of a packed batch to the device; host lists stay."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
