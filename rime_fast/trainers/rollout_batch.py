"""Between a batch of pairs and the Refine-RL step: prompts, sampled rewrites as packed sequences, data order.

Row order, everywhere: the trained sides one after the other (queries first), in each the pairs in order, in each pair
its G rollouts. So a side's rows are a block, and [rows] views as [sides, B, G].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from rime_fast.data.collate import Collator
from rime_fast.data.records import Pair, Side, stable_hash
from rime_fast.engine.rollout_backend import Samples
from rime_fast.recipe.group_rewards import OPPOSITE


class IndexedPairs(Dataset):
    """Items (name, index, pair): a rollout has to find its pair's anchor in the bank."""

    def __init__(self, pairs: Any, name: str) -> None:
        self.pairs, self.name = pairs, name

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, int, Pair]:
        return self.name, index, self.pairs[index]


class PromptBatches:
    """The DataLoader's collate function: prompts of the trained sides in one packed batch.

    Gives {"split", "index" [B], "sides" (trained, in row order), "prompts"}, and "opposite": disc-only prompts of the
    other side, where the anchors are the current policy's and that side is not trained itself.
    """

    def __init__(self, collator: Collator, trained: Sequence[str], opposite: bool) -> None:
        self.collator, self.trained, self.opposite = collator, tuple(trained), opposite

    def __call__(self, items: list[tuple[str, int, Pair]]) -> dict[str, Any]:
        pairs = [pair for _, _, pair in items]
        sides = [getattr(pair, name) for name in self.trained for pair in pairs]
        batch = {
            "split": items[0][0],
            "index": torch.tensor([index for _, index, _ in items]),
            "sides": sides,
            "prompts": self.collator.collate_prompts(sides),
        }
        others = [getattr(pair, OPPOSITE[name]) for name in self.trained for pair in pairs]
        batch["ids"] = side_ids(others)
        if self.opposite:
            batch["opposite"] = self.collator.collate_prompts(others, mode="disc")
        return batch


def side_ids(sides: Sequence[Side]) -> Tensor:
    """Two hashes of each side, [N, 2] int64: of its id (or content), and of its text (or content with images)."""
    return torch.tensor([[stable_hash(side), stable_hash(replace(side, id=None))] for side in sides])


@dataclass
class Replay:
    """What later updates on the same rollouts need. Tensors stay on the device; responses are host lists.

    old_logp, ref_logp [T] fp32; advantages [rows] fp32.
    """

    responses: list[list[int]]
    old_logp: Tensor
    ref_logp: Tensor | None
    advantages: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; ``from_tensors`` reads them back."""
        flat = [token for response in self.responses for token in response]
        found = {
            "tokens": torch.tensor(flat),
            "lengths": torch.tensor([len(response) for response in self.responses]),
            "old_logp": self.old_logp,
            "advantages": self.advantages,
        }
        if self.ref_logp is not None:
            found["ref_logp"] = self.ref_logp
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> Replay:
        parts = tensors["tokens"].split(tensors["lengths"].tolist())
        ref = tensors.get("ref_logp")
        return cls(
            responses=[part.tolist() for part in parts],
            old_logp=tensors["old_logp"].to(device),
            ref_logp=None if ref is None else ref.to(device),
            advantages=tensors["advantages"].to(device),
        )


def sampled_responses(rollout: Samples) -> list[list[int]]:
    """The tokens of each rollout without padding, on the host (decoding waits for the host anyway)."""
    lengths = rollout.lengths.tolist()
    return [row[:length] for row, length in zip(rollout.tokens.tolist(), lengths, strict=True)]


def token_rows(batch: dict[str, Any]) -> Tensor:
    """The rollout each packed token belongs to, [T] int64 on the batch's device."""
    ids = batch["input_ids"]
    rows = torch.repeat_interleave(torch.arange(len(batch["lengths"])), torch.tensor(batch["lengths"]))
    return rows.to(ids.device, non_blocking=True)


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
