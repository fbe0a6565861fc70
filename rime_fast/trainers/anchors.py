"""The stable anchors of Refine-RL: discriminative embeddings of a whole set, computed once and kept in a bank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.data.collate import Collator
from rime_fast.data.records import Side
from rime_fast.engine.anchor_bank import AnchorBank, data_fingerprint, model_fingerprint
from rime_fast.engine.gathered import whole_parameters
from rime_fast.trainers.rollout_batch import side_ids


def item_ids(pairs: Any, side: str) -> Tensor:
    """``side_ids`` of one side of every pair, [A, 2] int64."""
    return side_ids([getattr(pairs[i], side) for i in range(len(pairs))])


def set_fingerprint(ids: Tensor, side: str, collator: Collator) -> str:
    """Of the items, and of how they become prompts: another template or image size gives other embeddings."""
    vision = collator.vision
    sizes = f"{vision.min_pixels} {vision.max_pixels} {vision.patch_size} {vision.merge_size} {vision.do_resize}"
    return data_fingerprint([side, collator.template.render_disc(Side(text="text")), sizes, data_fingerprint(ids)])


def bank_file(folder: str | Path, side: str) -> Path:
    """Where ``rime-fast embed --anchors`` puts the bank of one side."""
    return Path(folder) / f"anchors-{side}.safetensors"


def given_bank(source: str, model: Any, ids: Tensor, side: str, collator: Collator, *, resuming: bool) -> AnchorBank:
    """The bank a user made by ``rime-fast embed``. source: its folder, or the file itself.

    resuming: the weights at hand may be a checkpoint's, so only the data is compared. Raises FileNotFoundError, and
    ValueError for a bank of another model, other data or other prompts.
    """
    path = Path(source) if Path(source).is_file() else bank_file(source, side)
    name = None
    if not resuming:
        with whole_parameters(model):
            name = model_fingerprint(model)
    return AnchorBank.open(path, model=name, data=set_fingerprint(ids, side, collator))


def anchor_bank(
    path: Path,
    model: Any,
    ids: Tensor,
    side: str,
    data: str,
    encode: Callable[[], Tensor],
    *,
    resuming: bool,
    save: bool,
    group: dist.ProcessGroup | None = None,
) -> AnchorBank:
    """The bank of one side: read from ``path`` where it fits, else made by ``encode`` and written there.

    ids: ``item_ids``; data: their ``set_fingerprint``. encode: gives all rows [A, D] (every rank calls it, or none).
    resuming: take the file whatever model made it (the weights at hand may be a checkpoint's), but for this data only:
    another run's file is a ValueError. save: whether this rank writes.
    """
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
    model: Any,
    pairs: Any,
    side: str,
    collator: Collator,
    batch_size: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    keep: torch.device | None = None,
) -> Tensor:
    """d of one side of every pair, [A, D] fp32 on ``keep`` (default: ``device``).

    The ranks of ``group`` share the work, each with the same number of forwards (ZeRO-3 and FSDP gather parameters in
    step).
    """
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    share = -(-len(pairs) // world)
    mine = [min(i, len(pairs) - 1) for i in range(rank * share, (rank + 1) * share)]
    training, rows = model.training, torch.empty(0)
    model.eval()
    for start in range(0, share, batch_size):
        sides = [getattr(pairs[i], side) for i in mine[start : start + batch_size]]
        batch = to_device(collator.collate_prompts(sides, mode="disc"), device)
        part = everyones(model(**batch).embeddings["disc"].float(), group).unflatten(0, (world, -1))
        if start == 0:
            rows = part.new_empty(world, share, part.shape[2], device=keep or device)
        rows[:, start : start + len(sides)] = part
    model.train(training)
    return rows.flatten(0, 1)[: len(pairs)]


def everyones(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks of ``group``, rank after rank (all hold as many); without a group the same rows."""
    if group is None:
        return rows
    out = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather(list(out.split(rows.shape[0])), rows.contiguous(), group=group)
    return out


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of a packed batch to the device; host lists stay."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
