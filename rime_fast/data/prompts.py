"""From rows to a trainer's batches: the DataLoader's collate functions, ids of sides, and the order of the data.

Row order, everywhere: the trained sides one after the other (queries first), in each the pairs in order, in each pair
its G rollouts. So a side's rows are a block, and [rows] views as [sides, B, G].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from rime_fast.data.collate import Collator
from rime_fast.data.records import DataError, Pair, Side, stable_hash
from rime_fast.recipe.group_rewards import OPPOSITE


class PairBatches:
    """The DataLoader's collate function: at most ``hard_negatives`` of each pair (None: all), then the collator, and
    "rows": what the pairs are called (host).

    answers: False for prompts up to ``<disc_emb>`` alone, where no rewrite is trained or read. latents: with latent
    branches.
    """

    def __init__(
        self, collator: Collator, hard_negatives: int | None, answers: bool = True, latents: bool = False
    ) -> None:
        self.collator, self.hard_negatives, self.answers, self.latents = collator, hard_negatives, answers, latents

    def __call__(self, pairs: list[Any]) -> dict[str, Any]:
        if self.hard_negatives is not None:
            pairs = [pair.with_negatives(self.hard_negatives) for pair in pairs]
        batch = self.collator.collate_pairs(pairs, answers=self.answers, latents=self.latents)
        return batch | {"rows": [pair.id or pair.query.name for pair in pairs]}


class IndexedPairs(Dataset):
    """A dataset of (name, index, pair): a rollout has to find its pair's anchor in the bank.

    ``anchorless``: pairs whose anchor could not be made, and why; to ask for one raises DataError.
    """

    def __init__(self, pairs: Any, name: str) -> None:
        self.pairs, self.name = pairs, name
        self.anchorless: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, int, Pair]:
        if index in self.anchorless:
            raise DataError(self.anchorless[index])
        return self.name, index, self.pairs[index]


class PromptBatches:
    """The DataLoader's collate function: prompts of the trained sides in one packed batch.

    Gives {"split", "index" [B] and "rows" (the same on the host), "sides" (trained, in row order), "prompts", "ids"
    [N, 2] (of each prompt's other side)}, and "opposite": disc-only prompts of the other side, where the anchors are
    the current policy's and that side is not trained itself.
    """

    def __init__(self, collator: Collator, trained: Sequence[str], opposite: bool) -> None:
        self.collator, self.trained, self.opposite = collator, tuple(trained), opposite

    def __call__(self, items: list[tuple[str, int, Pair]]) -> dict[str, Any]:
        pairs = [pair for _, _, pair in items]
        sides = [getattr(pair, name) for name in self.trained for pair in pairs]
        batch = {
            "split": items[0][0],
            "index": torch.tensor([index for _, index, _ in items]),
            "rows": [index for _, index, _ in items],
            "sides": sides,
            "prompts": self.collator.collate_prompts(sides),
        }
        others = [getattr(pair, OPPOSITE[name]) for name in self.trained for pair in pairs]
        batch["ids"] = side_ids(others)
        if self.opposite:
            batch["opposite"] = self.collator.collate_prompts(others, mode="disc")
        return batch


def side_ids(sides: Sequence[Side]) -> Tensor:
    """Hashes that tell sides apart, two of each, [N, 2] int64: of its id (or content), and of its text (or content with
    images)."""
    return torch.tensor([[stable_hash(side), stable_hash(replace(side, id=None))] for side in sides])


def without_negatives(pairs: Iterable[Pair], together: int, masked: bool) -> bool:
    """Whether no query of these pairs would have a negative in contrasts of ``together`` pairs. masked: whether a key
    of the positive's id or content is none."""
    first: list[int] | None = None
    for pair in pairs:
        keys = side_ids([pair.target, *pair.negatives]).tolist()
        known = first is not None and together > 1
        first = first if known else keys[0]
        for key in keys if known else keys[1:]:
            if not masked or not any(a == b for a, b in zip(key, first, strict=True)):  # type: ignore[arg-type]
                return False
    return True


class RepeatedBatches(Sampler[int]):
    """Indices in random order, each step's worth ``repeats`` times in a row (several updates per rollout batch).

    step_rows: rows of one optimizer step over all ranks; a last part smaller than that is left out.
    """

    def __init__(self, count: int, step_rows: int, repeats: int, seed: int) -> None:
        if count < step_rows:
            raise ValueError(f"train_dataset has {count} rows; num_iterations > 1 needs a whole step's ({step_rows})")
        self.count, self.step_rows, self.repeats, self.seed, self.epoch = count, step_rows, repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.step_rows * self.step_rows * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        for start in range(0, self.count - self.step_rows + 1, self.step_rows):
            for _ in range(self.repeats):
                yield from order[start : start + self.step_rows]
