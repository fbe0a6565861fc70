"""Rows that turn out bad when a batch is made of them: pixels that break off behind a sound head, a file that has gone.

Checks before step 1 read only the heads of images. ``GuardedRows`` finds which row of a batch is at fault, and either
says so or takes the next good row of the same set in its place: every rank keeps as many rows as the others, and which
one it takes depends on the data alone. [ours]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from rime_fast.data.mixture import MixtureDataset, Place
from rime_fast.data.records import DataError

# keys of a batch (host, list[str]): rows in whose place others stand, and the only one of a batch that cannot be made
LEFT_OUT, BAD = "left_out_rows", "bad_rows"
TRIES = 100  # rows tried in the place of one; more that are bad in a row are no accident


class GuardedRows(Dataset):
    """Wraps a dataset for a DataLoader whose collate function is ``collate``: its items are (place, item or DataError).

    dataset: map-style, of whatever ``collate_fn`` takes. skip: take other rows in the place of bad ones, and name those
    under ``batch[LEFT_OUT]``; else, or where no good row is found, the batch is ``{BAD: [what is wrong]}``, so that a
    trainer can stop in order.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], skip: bool) -> None:
        self.dataset, self.collate_fn, self.skip = dataset, collate_fn, skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Any) -> tuple[Any, Any]:
        try:
            return place, self.dataset[place]
        except DataError as error:
            return place, error

    def collate(self, rows: Sequence[tuple[Any, Any]]) -> Any:
        """Make a batch by ``collate_fn`` of the items, or of those that are good. Raises what ``collate_fn`` does where
        no single row is at fault."""
        items = [item for _, item in rows]
        failed: ValueError | None = next((item for item in items if isinstance(item, DataError)), None)
        if failed is None:
            try:
                return self.collate_fn(items)
            except ValueError as error:
                failed = error
        faults = [self._fault(place, item) for place, item in rows]
        named = [fault for fault in faults if fault is not None]
        if not named:
            raise failed
        if not self.skip:
            return {BAD: named}
        for i, (place, _) in enumerate(rows):
            if faults[i] is not None:
                items[i] = self._instead(place)
        if any(item is None for item in items):
            return {BAD: [*named, f"and none of up to {TRIES} rows after it is good"]}
        batch = self.collate_fn(items)
        batch[LEFT_OUT] = named
        return batch

    def _fault(self, place: Any, item: Any) -> str | None:
        """What is wrong with one row, with its file and number; None where a batch can be made of it."""
        if isinstance(item, DataError):
            return str(item)
        try:
            self.collate_fn([item])
        except ValueError as error:
            name, number = row_of(self.dataset, place)
            return f"{name}, row {number}: {error}"
        return None

    def _instead(self, place: Any) -> Any:
        """The next good row of the same set; None where there is none nearby."""
        size = len(self.dataset.sets[place.set]) if isinstance(place, Place) else len(self.dataset)
        for step in range(1, min(size, TRIES + 1)):
            if isinstance(place, Place):
                other: Any = place._replace(row=(place.row + step) % size)
            else:
                other = (place + step) % size
            item = self[other][1]
            if self._fault(other, item) is None:
                return item
        return None


def row_of(dataset: Any, place: Any) -> tuple[str, int]:
    """Say where an item of any of this package's datasets came from: (file or other source, number
    of the row in it)."""
    if hasattr(dataset, "pairs"):  # a view of pairs
        return row_of(dataset.pairs, place)
    if isinstance(dataset, MixtureDataset):
        at = dataset.place(place)
        return row_of(dataset.sets[at.set], at.row)
    if isinstance(dataset, ConcatDataset):
        for part, stop in zip(dataset.datasets, dataset.cumulative_sizes, strict=True):
            if place < stop:
                return row_of(part, place - stop + len(part))  # type: ignore[arg-type]
    if hasattr(dataset, "row_number"):
        return dataset.name, dataset.row_number(place)
    return type(dataset).__name__, int(place) + 1
