"""Cutting a packed batch into micro-batches by tokens: which sequences go together, and what belongs to each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
Runs = list[tuple[int, int]]

# Entries with a row per token, per sequence, and those that index rows.
_PER_TOKEN = ("input_ids", "mm_token_type_ids", "targets", "token_weight")
_PER_SEQUENCE = ("side", "prompt_lengths")
_ROW_INDEX = ("disc_index", "gen_index")
_VISUAL = (("image", "pixel_values", 1), ("video", "pixel_values_videos", 2))


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Sequences grouped so that a group's tokens add up to at most ``max_tokens``; similar lengths come together.

    A longer sequence gets a group of its own. Longest first, so that running out of memory shows at once; the groups
    are as few as this order allows, and their indices ascend, so that neighbours in the batch stay one slice.
    """
    if not (isinstance(max_tokens, int) and max_tokens >= 1):
        raise ValueError(f"max_tokens is {max_tokens!r}; expected a whole number >= 1")
    groups: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or lengths[i] > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(i)
        room -= lengths[i]
    return [sorted(group) for group in groups]


class PackedBatch:
    """A packed batch that hands out parts of itself (rime_fast/data/collate.py describes its entries).

    Which images and videos a sequence has is taken from ``image_counts`` / ``video_counts`` (lists the collator makes),
    else read from ``mm_token_type_ids``, which waits for the device if it lies there.
    """

    def __init__(self, batch: Batch, merge_size: int = 2) -> None:
        self.batch, self.lengths = batch, [int(n) for n in batch["lengths"]]
        self.starts = [0, *accumulate(self.lengths)]
        rows = batch["input_ids"].shape[0]
        if self.starts[-1] != rows:
            raise ValueError(f"lengths sum to {self.starts[-1]}; expected the {rows} rows of input_ids")
        self.visual = {}
        for kind, pixels, code in _VISUAL:
            if batch.get(pixels) is not None:
                self.visual[kind] = _Visual.of(batch, kind, pixels, code, self.starts, merge_size)

    def take(self, sequences: Sequence[int]) -> Batch:
        """The packed batch of these sequences, in this order: views of this one where they lie side by side.

        Entries it does not know about are left out; those that index rows are shifted, -1 stays -1.
        """
        runs = _runs(sequences)
        lengths = [self.lengths[i] for i in sequences]
        rows = [(self.starts[a], self.starts[b]) for a, b in runs]
        batch = self.batch
        out: dict[str, Any] = {"lengths": lengths}
        for key in _PER_TOKEN:
            if batch.get(key) is not None:
                out[key] = _cut(batch[key], rows)
        out["position_ids"] = _cut(batch["position_ids"], rows, dim=1)
        for key in _PER_SEQUENCE:
            if batch.get(key) is not None:
                value = batch[key]
                out[key] = _cut(value, runs) if isinstance(value, Tensor) else [value[i] for i in sequences]
        for key in _ROW_INDEX:
            if batch.get(key) is not None:
                out[key] = self._shifted(batch[key], runs)
        for kind, visual in self.visual.items():
            out |= visual.take(sequences, kind)
        return out

    def _shifted(self, index: Tensor, runs: Runs) -> Tensor:
        """Rows of the part in place of rows of the batch; a run's shift is one number, known on the host."""
        parts, first = [], 0
        for a, b in runs:
            own = index[a:b]
            parts.append(torch.where(own >= 0, own + (first - self.starts[a]), -1))
            first += self.starts[b] - self.starts[a]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Visual:
    """The images (or the videos) of a packed batch: grids on the host, and how many each sequence has."""

    def __init__(self, name: str, pixels: Tensor, grids: list[list[int]], counts: list[int]) -> None:
        self.name, self.pixels, self.grids = name, pixels, grids
        self.first = [0, *accumulate(counts)]
        patches = [t * h * w for t, h, w in grids]
        self.patch = [0, *accumulate(patches)]
        if self.first[-1] != len(grids) or self.patch[-1] != pixels.shape[0]:
            raise ValueError(
                f"the sequences have {self.first[-1]} images or videos, {name} {pixels.shape[0]} patches; "
                f"the grids are {len(grids)} with {self.patch[-1]} patches"
            )

    @classmethod
    def of(cls, batch: Batch, kind: str, pixels: str, code: int, starts: list[int], merge_size: int) -> _Visual:
        grids = batch.get(f"{kind}_grids")
        if grids is None:
            grids = batch[f"{kind}_grid_thw"].tolist()
        counts = batch.get(f"{kind}_counts")
        if counts is None:
            tokens = batch["mm_token_type_ids"].cpu() == code
            per_sequence = [int(tokens[a:b].sum()) for a, b in pairwise(starts)]
            counts = _counts(per_sequence, [t * h * w // merge_size**2 for t, h, w in grids], kind)
        return cls(pixels, batch[pixels], grids, counts)

    def take(self, sequences: Sequence[int], kind: str) -> Batch:
        """pixels, grids (host lists and tensor) of these sequences; nothing where they have none."""
        items = [(self.first[a], self.first[b]) for a, b in _runs(sequences)]
        grids = [grid for a, b in items for grid in self.grids[a:b]]
        if not grids:
            return {}
        pixels = _cut(self.pixels, [(self.patch[a], self.patch[b]) for a, b in items])
        return {self.name: pixels, f"{kind}_grids": grids, f"{kind}_grid_thw": torch.tensor(grids)}


def _counts(tokens: list[int], sizes: list[int], kind: str) -> list[int]:
    """Images of each sequence: its placeholder tokens, filled with images in order."""
    counts, at = [], 0
    for i, wanted in enumerate(tokens):
        first = at
        while wanted > 0 and at < len(sizes):
            wanted -= sizes[at]
            at += 1
        if wanted:
            raise ValueError(f"sequence {i} has {tokens[i]} {kind} tokens; the grids make {sizes[first:at]}")
        counts.append(at - first)
    return counts


def _runs(sequences: Sequence[int]) -> Runs:
    """Neighbours joined: [3, 4, 5, 9] to [(3, 6), (9, 10)]."""
    runs: Runs = []
    for i in sequences:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def _cut(tensor: Tensor, runs: Runs, dim: int = 0) -> Tensor:
    parts = [tensor.narrow(dim, a, b - a) for a, b in runs if b > a]
    if not parts:
        return tensor.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
