"""What each side's rollouts are scored against: a bank of discriminative embeddings, computed once for the whole set
and kept; the current policy's own; or (UME-R1) the other side's rewrites."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from rime_fast.data.collate import Collator
from rime_fast.data.prompts import IndexedPairs, side_ids
from rime_fast.data.records import DataError, Side
from rime_fast.data.row_guard import BAD, LEFT_OUT, GuardedRows, row_of
from rime_fast.engine.anchor_bank import AnchorBank, data_fingerprint, model_fingerprint
from rime_fast.engine.packed_batch import to_device
from rime_fast.engine.wrappers import whole_parameters
from rime_fast.ops.collectives import of_all_ranks
from rime_fast.recipe.group_rewards import OPPOSITE, SideAnchors, cut, negatives_mask
from rime_fast.trainers.callbacks import tell
from rime_fast.trainers.config import RefineConfig


class AnchorSource:
    """Makes and keeps the banks, and gives a batch's ``SideAnchors``.

    trained: the sides that are trained, in row order. group: the ranks that share a step.
    """

    def __init__(
        self, args: RefineConfig, trained: tuple[str, ...], collator: Collator, group: dist.ProcessGroup | None
    ) -> None:
        self.args, self.trained, self.collator, self.group = args, trained, collator, group
        self.banks: dict[tuple[str, str], AnchorBank] = {}
        self._ids: dict[tuple[str, str], Tensor] = {}  # of the whole bank, on the device
        self._norms: dict[tuple[str, str], Tensor] = {}  # of the longest anchor, there too
        self.from_bank = args.reward_mode == "anchor" and args.anchors == "sft"
        self.sharded = self.from_bank and args.bank_storage == "sharded" and group is not None
        own = args.reward_mode == "anchor" and args.anchors == "policy" and len(trained) == 2
        # Whether a side's anchors need the embeddings of the whole batch, or all ranks to score it together.
        self.together = args.reward_mode == "ume_r1" or own or (self.sharded and args.anchor_pool == "bank")

    # --- banks -------------------------------------------------------------------------------------------------------

    def make(self, model: Any, policy: Any, pairs: IndexedPairs, *, resuming: bool, sharded_model: bool) -> None:
        """Make the banks of ``pairs`` that are not there yet. model: gives the embeddings; policy:
        the same, unwrapped."""
        if not self.from_bank:
            return
        for side in sorted({OPPOSITE[name] for name in self.trained}):
            key = (pairs.name, side)
            if key in self.banks:
                continue
            ids = item_ids(pairs.pairs, side)
            if self.args.anchor_bank is not None and pairs.name == "train":
                bank = given_bank(self.args.anchor_bank, policy, ids, side, self.collator, resuming=resuming)
            else:
                bank = self._own_bank(model, policy, pairs, ids, side, resuming, sharded_model)
            for i in (bank.ids != ids).any(1).nonzero().flatten().tolist():  # another's anchor stands there
                name, number = row_of(pairs, i)
                pairs.anchorless[i] = f"{name}, row {number}: its {side} could not be opened when anchors were made"
            self.banks[key] = self._placed(bank)
            self._ids[key] = bank.ids.to(self.args.device)
            self._norms[key] = self.banks[key].largest_norm().to(self.args.device)

    def _own_bank(
        self, model: Any, policy: Any, pairs: IndexedPairs, ids: Tensor, side: str, resuming: bool, sharded_model: bool
    ) -> AnchorBank:
        """Read from output_dir where it fits, else made and written there.

        resuming: the file is taken whatever model made it (the weights at hand may be a checkpoint's, whose facts it is
        compared with), but for this data only: another run's is a ValueError.
        """
        args = self.args
        path = Path(str(args.output_dir)) / "anchors" / f"{pairs.name}-{side}.safetensors"
        if resuming and sharded_model and not path.is_file():
            raise ValueError(f"{path} is missing: the anchors of the start cannot be made from a resumed policy")
        data = set_fingerprint(ids, side, self.collator)
        there = torch.tensor(float(path.is_file()), device=args.device)
        if self.group is not None:
            dist.all_reduce(there, op=dist.ReduceOp.MIN, group=self.group)
        if bool(there) and resuming:
            return AnchorBank.open(path, model=None, data=data)
        with whole_parameters(policy):
            name = model_fingerprint(policy)
        if bool(there):  # else of an earlier run with another model or other data, or damaged: made anew
            with suppress(ValueError):
                return AnchorBank.open(path, model=name, data=data)
        batch = max(args.per_device_eval_batch_size, args.per_device_train_batch_size)
        keep = args.device if args.bank_storage == "device" else torch.device("cpu")
        sides = GuardedRows(SideRows(pairs.pairs, side), self._disc_batch, args.on_bad_row == "skip")
        rows, used = discriminative_rows(model, sides, batch, args.device, self.group, keep)
        ids, digest = ids[used], ""
        if args.should_save:
            made: Any = rows  # a tensor is a sequence of its rows
            digest = AnchorBank.make(path, made, torch.as_tensor, ids, model=name, data=data, side=side).digest
        return AnchorBank(rows, ids, 0, len(ids), name, data, side, digest)

    def facts(self) -> dict[str, Any]:
        """What tells the training set's banks from others, by side: the model they are of, and their digests."""
        return {
            side: {"model": bank.model, "digest": bank.digest}
            for (name, side), bank in self.banks.items()
            if name == "train"
        }

    def _disc_batch(self, items: list[tuple[int, Side]]) -> dict[str, Any]:
        batch = self.collator.collate_prompts([side for _, side in items], mode="disc")
        return batch | {"rows": [index for index, _ in items]}

    def _placed(self, bank: AnchorBank) -> AnchorBank:
        """Where ``bank_storage`` wants it."""
        device = self.args.device
        if (width := self.args.anchor_dims) is not None:
            bank = replace(bank, anchors=cut(bank.anchors, width))
        if self.sharded:
            bank = bank.shard(dist.get_rank(self.group), dist.get_world_size(self.group))
        if self.args.bank_storage != "host":
            return bank.to(device)
        bank = bank.to("cpu")
        return bank.pinned() if device.type == "cuda" else bank

    # --- a batch -----------------------------------------------------------------------------------------------------

    def of(
        self,
        inputs: dict[str, Any],
        gen: Tensor | None = None,
        disc: Tensor | None = None,
        opposite: Tensor | None = None,
    ) -> dict[str, SideAnchors]:
        """Give the anchors of every trained side of this batch; every rank calls it, in step, once for a batch.

        gen [N G, D], disc [N, D]: the batch's own embeddings, needed where ``together`` (and not sharded); opposite
        [B, D]: discriminative embeddings of the other side, where that side is not trained and anchors are the
        policy's. Reads nothing from a device, except that a host bank's rows go there.
        """
        gen, disc, opposite = (None if x is None else cut(x, self.args.anchor_dims) for x in (gen, disc, opposite))
        found = {}
        items = len(inputs["rows"])
        for place, name in enumerate(self.trained):
            other = slice((1 - place) * items, (2 - place) * items)
            if self.args.reward_mode == "ume_r1":
                assert gen is not None
                found[name] = self._other_rewrites(gen.unflatten(0, (2 * items, -1))[other])
            elif self.from_bank and self.args.anchor_pool == "bank":
                found[name] = self._whole_bank(inputs, OPPOSITE[name])
            else:
                if self.from_bank:
                    own = self._own(inputs, OPPOSITE[name])
                else:
                    assert opposite is not None or disc is not None
                    own = opposite if disc is None or opposite is not None else disc[other]  # type: ignore[assignment]
                ids = inputs["ids"][place * items : (place + 1) * items]
                found[name] = self._in_batch(own, ids)
        return found

    def _whole_bank(self, inputs: dict[str, Any], side: str) -> SideAnchors:
        key = (inputs["split"], side)
        ids, index = self._ids[key], inputs["index"]
        mask = negatives_mask(ids.index_select(0, index), ids)
        group = self.group if self.sharded else None
        return SideAnchors(self.banks[key].anchors, index, self._own(inputs, side), mask, group, self._norms[key])

    def _in_batch(self, own: Tensor, ids: Tensor) -> SideAnchors:
        """All ranks' own anchors of this batch."""
        mask = negatives_mask(ids, all_gather_rows(ids, self.group))
        places = self._places(len(own), 1, own.device)
        return SideAnchors(all_gather_rows(own, self.group), places, own, mask)

    def _other_rewrites(self, gen: Tensor) -> SideAnchors:
        """gen [B, G, D] of the other side: all ranks' rewrites, and each item's first."""
        count, size = gen.shape[:2]
        return SideAnchors(all_gather_rows(gen.flatten(0, 1), self.group), self._places(count, size, gen.device))

    def _places(self, count: int, size: int, device: torch.device) -> Tensor:
        first = 0 if self.group is None else dist.get_rank(self.group) * count * size
        return first + size * torch.arange(count, device=device)

    def _own(self, inputs: dict[str, Any], side: str) -> Tensor:
        """The items' own anchors [B, D], on the device."""
        bank, index = self.banks[inputs["split"], side], inputs["index"]
        if max(inputs["rows"]) >= bank.total:
            raise ValueError(
                f"pair {max(inputs['rows'])} has no anchor: the bank of {inputs['split']!r}, side {side}, holds "
                f"{bank.total}; expected one for each pair"
            )
        if self.sharded:
            wanted = all_gather_rows(index, self.group) - bank.offset
            held = (wanted >= 0) & (wanted < len(bank.anchors))
            rows = bank.anchors.index_select(0, wanted.clamp(0, len(bank.anchors) - 1)).float()
            rows = rows.masked_fill(~held[:, None], 0.0)
            dist.all_reduce(rows, group=self.group)
            return rows.split(len(index))[dist.get_rank(self.group)]
        if bank.anchors.device == index.device:
            return bank.anchors.index_select(0, index)
        rows = bank.anchors[inputs["rows"]]  # a host bank, read by host numbers
        rows = rows.pin_memory() if index.device.type == "cuda" else rows
        return rows.to(index.device, non_blocking=True)


# --- banks -----------------------------------------------------------------------------------------------------------


def item_ids(pairs: Any, side: str) -> Tensor:
    """Compute ``side_ids`` of one side of every pair, [A, 2] int64."""
    return side_ids([getattr(pairs[i], side) for i in range(len(pairs))])


def set_fingerprint(ids: Tensor, side: str, collator: Collator) -> str:
    """A fingerprint of the items, and of how they become prompts: another template or image size gives other
    embeddings."""
    vision = collator.vision
    sizes = f"{vision.min_pixels} {vision.max_pixels} {vision.patch_size} {vision.merge_size} {vision.do_resize}"
    return data_fingerprint([side, collator.template.render_disc(Side(text="text")), sizes, data_fingerprint(ids)])


def bank_file(folder: str | Path, side: str) -> Path:
    """The file where ``rime-fast embed --anchors`` puts the bank of one side."""
    return Path(folder) / f"anchors-{side}.safetensors"


def given_bank(source: str, model: Any, ids: Tensor, side: str, collator: Collator, *, resuming: bool) -> AnchorBank:
    """Open the bank a user made by ``rime-fast embed``. source: its folder, or the file itself.

    resuming: the weights at hand may be a checkpoint's, so only the data is compared here. Raises FileNotFoundError,
    and ValueError for a bank of another model, other data or other prompts.
    """
    path = Path(source) if Path(source).is_file() else bank_file(source, side)
    name = None
    if not resuming:
        with whole_parameters(model):
            name = model_fingerprint(model)
    return AnchorBank.open(path, model=name, data=set_fingerprint(ids, side, collator))


class SideRows(Dataset):
    """One side of every pair, as (index, side)."""

    def __init__(self, pairs: Any, side: str) -> None:
        self.pairs, self.side = pairs, side

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, Side]:
        return index, getattr(self.pairs[index], self.side)


@torch.no_grad()
def discriminative_rows(
    model: Any,
    sides: GuardedRows,
    batch_size: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    keep: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute d of every row of ``sides``, [A, D] fp32 on ``keep`` (default: ``device``); and the row each is of, [A]
    int64 on the host: another one's where a row could not be opened and may be skipped.

    The ranks of ``group`` share the work, each with the same number of forwards (ZeRO-3 and FSDP gather parameters in
    step). Raises DataError on every rank for a row that cannot be opened.
    """
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    share = -(-len(sides) // world)
    mine = [min(i, len(sides) - 1) for i in range(rank * share, (rank + 1) * share)]
    training, rows, used = model.training, torch.empty(0), []
    model.eval()
    for start in range(0, share, batch_size):
        batch = sides.collate([sides[i] for i in mine[start : start + batch_size]])
        if bad := of_all_ranks(batch.get(BAD, []), group):
            raise DataError("\n".join(bad))
        for row in batch.pop(LEFT_OUT, ()):
            tell(f"without an anchor: {row}")
        used += batch.pop("rows")
        batch = to_device(batch, device)
        part = all_gather_rows(model(**batch).embeddings["disc"].float(), group).unflatten(0, (world, -1))
        if start == 0:
            rows = part.new_empty(world, share, part.shape[2], device=keep or device)
        rows[:, start : start + part.shape[1]] = part
    model.train(training)
    every = all_gather_rows(torch.tensor(used, device=device), group).cpu()
    return rows.flatten(0, 1)[: len(sides)], every[: len(sides)]


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather the rows of all ranks of ``group``, rank after rank (all hold as many); without a group the same rows."""
    if group is None:
        return rows
    out = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather(list(out.split(rows.shape[0])), rows.contiguous(), group=group)
    return out
