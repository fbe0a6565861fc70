"""Mixtures of data sets, and the order their rows come in: a pure function of (seed, step).

The GLOBAL batch, all pairs of one optimizer step over all ranks, is made of blocks of ``block`` rows of one set each.
Block k of step s draws its set by the number (seed, s, k) of a counter-based generator, in proportion to the sets'
weights. The n-th block of a set takes positions n * block onwards of that set's endless list of permutations: number p
of them is keyed (seed, set, p), so every row comes once a pass. Nothing of this depends on ranks, workers or
accumulation; a run goes on at step s by counting how often each set was drawn before (no state is saved).

Ranks share every block: each takes a slice of it, dealt out by the rows' tokens. (Method of the published multi-set
runs, VLM2Vec-V2 and Think-Then-Embed, whose blocks depend on their loaders' shards; the construction is [ours].)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from rime_fast.data.datasets import PairDataset
from rime_fast.data.records import Pair
from rime_fast.data.sampling import permuted, spread, stream_key, uniforms
from rime_fast.data.texts import is_number

_COUNTED = 1 << 20  # draws looked at together when a run is taken up


@dataclass(frozen=True)
class MixtureSet:
    """One set of a mixture, as a list in YAML or Python names it.

    path: whatever ``open_rows`` opens. format: a name of FORMATS (None: by each row's keys). name: in messages and
    logs (default: the path's own); "*": the rows name their data sets, and each of these is a set. weight: its share
    of all rows, relative to the other sets' (None for all sets: in proportion to their rows). max_rows: use only so
    many of its rows, the same random ones all the time. image_root: folder of its relative image paths (default: the
    run's, else the file's own).
    """

    path: Any
    format: str | None = None
    name: str = ""
    weight: float | None = None
    max_rows: int | None = None
    image_root: str | None = None

    def __post_init__(self) -> None:
        for field in ("weight", "max_rows"):
            value = getattr(self, field)
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"{self.label}: {field} is {value!r}; expected a number > 0")
        if self.max_rows is not None and not isinstance(self.max_rows, int):
            raise ValueError(f"{self.label}: max_rows is {self.max_rows!r}; expected a whole number")

    @property
    def label(self) -> str:
        """What messages and logs call the set."""
        if self.name:
            return self.name
        return Path(self.path).stem if isinstance(self.path, (str, Path)) else "dataset"


def mixture_sets(source: Any, name: str = "train_dataset") -> list[MixtureSet] | None:
    """The sets of a list of MixtureSet or of dicts with its fields; None for anything else.

    Raises ValueError naming the entry for unknown or missing fields, sets with equal names, and weights of some sets
    only.
    """
    if not isinstance(source, (list, tuple)) or not source:
        return None
    marks = [isinstance(entry, MixtureSet) or (isinstance(entry, dict) and "path" in entry) for entry in source]
    if not any(marks):
        return None
    known = [field.name for field in fields(MixtureSet)]
    sets = []
    for i, entry in enumerate(source):
        at = f"{name}[{i}]"
        if isinstance(entry, dict):
            if unknown := [key for key in entry if key not in known]:
                raise ValueError(f"{at} has {unknown[0]!r}; expected {', '.join(known)}")
            if "path" not in entry:
                raise ValueError(f"{at} has no path; every set of a mixture needs one")
            entry = MixtureSet(**entry)
        elif not isinstance(entry, MixtureSet):
            raise ValueError(f"{at} is {type(entry).__name__}; expected a set with a path, as the others are")
        sets.append(entry)
    labels = [entry.label for entry in sets]
    if twice := [label for i, label in enumerate(labels) if label != "*" and label in labels[:i]]:
        raise ValueError(f"{name} has two sets called {twice[0]!r}; give them a name each")
    given = [entry.weight is not None for entry in sets]
    if any(given) and not all(given):
        raise ValueError(f"{name}: {labels[given.index(False)]!r} has no weight, others have; give all of them or none")
    return sets


def open_mixture(sets: Sequence[MixtureSet], opened: Callable[[MixtureSet], PairDataset]) -> MixtureDataset:
    """Open the sets as one dataset. opened: one set to its good pairs (``open_pairs`` with the run's settings)."""
    parts: list[PairDataset] = []
    labels: list[str] = []
    weights: list[float] = []
    for entry in sets:
        whole = opened(entry)
        named = whole.by_name() if entry.name == "*" else {entry.label: whole}
        rows = sum(len(part) for part in named.values())
        for label, part in named.items():
            if label in labels:
                raise ValueError(f"two sets are called {label!r}; give them a name each")
            # the parts of one file share its weight by their rows
            weights.append((entry.weight or 0.0) * len(part) / rows)
            if entry.max_rows is not None and entry.max_rows < len(part):
                part.keep(spread(len(part), entry.max_rows, stream_key("max_rows", label)))
            parts.append(part)
            labels.append(label)
    return MixtureDataset(parts, labels, None if sets[0].weight is None else weights)


class Place(NamedTuple):
    """The place of an item in a mixture: its set, its index there, which pass over the set this is, and the block of
    the global batch that it stands in."""

    set: int
    row: int
    visit: int
    block: int


class MixtureDataset(Dataset[Pair]):
    """The pairs of several sets, by Place; ``Pair.dataset`` is the set's label. Also by a plain index, set after set.

    sets: one dataset of Pair each (PairDataset, or any with ``len`` and ``[]``). labels, weights: of each set.
    """

    def __init__(self, sets: Sequence[Any], labels: Sequence[str], weights: Sequence[float] | None = None) -> None:
        self.sets, self.labels = list(sets), list(labels)
        self.sizes = np.array([len(part) for part in self.sets], dtype=np.int64)
        if empty := [label for label, size in zip(self.labels, self.sizes, strict=True) if not size]:
            raise ValueError(f"set {empty[0]!r} has no rows")
        self.weights = self.sizes.astype(float) if weights is None else np.array(weights, dtype=float)
        self._stops = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, place: Place | int) -> Pair:
        at, row, visit, block = self.place(place)
        return replace(self.sets[at][row].visit(visit), dataset=self.labels[at], drawn=(at, block))

    def place(self, place: Place | int) -> Place:
        """The place that a plain index stands for."""
        if isinstance(place, tuple):
            return place
        index = range(len(self))[place]
        at = int(np.searchsorted(self._stops, index, side="right"))
        return Place(at, index - int(self._stops[at] - self.sizes[at]), 0, 0)

    def tokens(self, places: np.ndarray) -> np.ndarray:
        """The tokens of each of places [n, 2] (set, row) as the check counted or estimated them, else its set's mean or
        1."""
        out = np.ones(len(places))
        for at in np.unique(places[:, 0]).tolist():
            here = places[:, 0] == at
            known = getattr(self.sets[at], "tokens", None)
            if known is not None:
                out[here] = known[places[here, 1]]
        return np.maximum(out, 1)


class GlobalBatches:
    """Says which rows make up a global batch: ``batch(step)`` is the same whoever asks.

    sizes: rows of each set. weights: their shares. batch_size: rows of the global batch. block: rows of one set that
    stand together; it divides ``batch_size``; 0 (or 1) draws every row on its own. labels: of the sets; the order of a
    set's rows depends on its label, not on its place among the sets.
    """

    def __init__(
        self,
        sizes: Sequence[int] | np.ndarray,
        weights: Sequence[float] | np.ndarray,
        batch_size: int,
        *,
        block: int = 0,
        seed: int = 0,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        shares = np.asarray(weights, dtype=float)
        if batch_size < 1 or block < 0 or (block and batch_size % block):
            raise ValueError(f"block is {block}; expected a divisor of the batch of {batch_size} rows, or 0")
        if not len(shares) or len(shares) != len(self.sizes) or not (shares > 0).all() or not np.isfinite(shares).all():
            raise ValueError(f"weights are {shares.tolist()}; expected a number > 0 for each of {len(self.sizes)} sets")
        self.batch_size, self.block, self.seed = batch_size, max(block, 1), seed
        self.blocks = batch_size // self.block
        self.labels = [str(i) for i in range(len(shares))] if labels is None else list(labels)
        self._limits = np.cumsum(shares / shares.sum())
        self._limits[-1] = 1.0
        self._key = stream_key("mixture", seed)
        self._step, self._drawn = 0, np.zeros(len(shares), dtype=np.int64)

    def draws(self, step: int) -> np.ndarray:
        """The set that each block of a step is drawn from: [blocks]."""
        return self._sets(step * self.blocks, self.blocks)

    def before(self, step: int) -> np.ndarray:
        """Count the blocks of each set that came before a step: [sets]."""
        if step < self._step:
            self._step, self._drawn = 0, np.zeros_like(self._drawn)
        at, stop = self._step * self.blocks, step * self.blocks
        while at < stop:
            count = min(_COUNTED, stop - at)
            self._drawn = self._drawn + np.bincount(self._sets(at, count), minlength=len(self.sizes))
            at += count
        self._step = step
        return self._drawn.copy()

    def batch(self, step: int) -> np.ndarray:
        """The rows of a step's global batch in order: [batch_size, 3] int64 (set, row, pass)."""
        drawn, sets = self.before(step), self.draws(step)
        out = np.empty((self.batch_size, 3), dtype=np.int64)
        for at in np.unique(sets).tolist():
            mine = np.flatnonzero(sets == at)
            first = (drawn[at] + np.arange(len(mine))) * self.block
            positions = (first[:, None] + np.arange(self.block)).reshape(-1)
            rows = (mine[:, None] * self.block + np.arange(self.block)).reshape(-1)
            passes, places = np.divmod(positions, self.sizes[at])
            out[rows, 0], out[rows, 2] = at, passes
            for number in np.unique(passes).tolist():
                here = passes == number
                key = stream_key("pass", self.seed, self.labels[at], number)
                out[rows[here], 1] = permuted(key, int(self.sizes[at]), places[here])
        return out

    def _sets(self, start: int, count: int) -> np.ndarray:
        return np.searchsorted(self._limits, uniforms(self._key, start, count), side="right")


def deal(tokens: np.ndarray, ranks: int, block: int) -> list[np.ndarray]:
    """Deal the rows of one contrast out to ranks: of each rank its rows, ascending, all equally many.

    Every rank takes a share of every block (as equal as whole rows allow; blocks of fewer rows than ranks are dealt out
    all together). The longest rows of a block go first, each to the rank that has the fewest tokens so far among those
    that still need a row of this block.

    tokens: [n] of each row; n is a multiple of ``ranks`` and of ``block``.
    """
    n = len(tokens)
    if n % ranks or n % block:
        raise ValueError(f"{n} rows cannot be dealt out to {ranks} ranks in blocks of {block}")
    block = block if block >= ranks else n
    load, count = np.zeros(ranks), np.zeros(ranks, dtype=np.int64)
    owner = np.empty(n, dtype=np.int64)
    for start in range(0, n, block):
        stop = start + block
        # after this block every rank may have at most this many rows, so that none falls behind for good
        most = -(-stop // ranks)
        order = start + np.argsort(-tokens[start:stop], kind="stable")
        least = stop // ranks
        for left, row in zip(range(block, 0, -1), order.tolist(), strict=True):
            owed = least - count
            open_ranks = owed > 0 if owed.clip(0).sum() >= left else count < most
            rank = int(np.argmin(np.where(open_ranks, load, np.inf)))
            owner[row] = rank
            load[rank] += tokens[row]
            count[rank] += 1
    return [np.flatnonzero(owner == rank) for rank in range(ranks)]


class MixtureSampler(Sampler[list[Place]]):
    """A DataLoader's ``batch_sampler``: this rank's rows of every micro-step of the global batches.

        sampler = MixtureSampler(dataset, batch_size=1024, block=64, seed=0, rank=rank, ranks=8, accumulation=2)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, num_workers=8)

    dataset: MixtureDataset. batch_size: rows of the GLOBAL batch: all ranks, all micro-steps of one optimizer step.
    accumulation: micro-steps; ``batch_size // accumulation`` rows are one contrast, which ``block`` divides.
    steps: length of the sampler in optimizer steps (default: as many as hold the rows of all sets once). start: the
    first step, for a run that goes on.
    """

    def __init__(
        self,
        dataset: MixtureDataset,
        batch_size: int,
        *,
        block: int = 0,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        steps: int | None = None,
        start: int = 0,
    ) -> None:
        contrast, rest = divmod(batch_size, accumulation)
        if rest or contrast % ranks:
            raise ValueError(
                f"batch_size is {batch_size}; expected a multiple of {accumulation} x {ranks} (micro-steps, ranks)"
            )
        if block and contrast % block:
            raise ValueError(f"block is {block}; expected a divisor of the {contrast} rows of one contrast")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}; expected 0 to {ranks - 1}")
        self.dataset, self.rank, self.ranks, self.accumulation = dataset, rank, ranks, accumulation
        self.batches = GlobalBatches(
            dataset.sizes, dataset.weights, batch_size, block=block, seed=seed, labels=dataset.labels
        )
        self.steps = -(-len(dataset) // batch_size) if steps is None else steps
        self.contrast, self.start, self._first, self._skipped = contrast, start, 0, 0

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which of a loop's epochs of ``steps`` steps begins: the next iteration starts at step epoch
        * steps (and ``start``)."""
        self._first = epoch * self.steps

    def resume(self, step: int) -> None:
        """Prepare the iteration of the epoch that ``step`` is in for a loop that leaves out what came before it itself,
        as transformers' Trainer does: those micro-steps are empty lists and cost nothing."""
        self.set_epoch(step // self.steps)
        self._skipped = step

    def __iter__(self) -> Iterator[list[Place]]:
        for step in range(max(self._first, self.start), self._first + self.steps):
            yield from [[]] * self.accumulation if step < self._skipped else self.step(step)

    def step(self, step: int) -> list[list[Place]]:
        """This rank's rows of each micro-step of one optimizer step."""
        rows = self.batches.batch(step)
        parts = []
        for start in range(0, len(rows), self.contrast):
            part = rows[start : start + self.contrast]
            mine = deal(self.dataset.tokens(part[:, :2]), self.ranks, self.batches.block)[self.rank]
            blocks = (start + mine) // self.batches.block
            places = np.column_stack([part[mine], blocks]).tolist()
            parts.append([Place._make(place) for place in places])
        return parts
