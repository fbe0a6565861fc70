"""What ``rime-fast mine`` compares: the options, and the different queries and targets of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_fast.data.records import DataError, Pair, Side
from rime_fast.prepare.content import ImageDigests, Reading, digest, plain

Progress = Callable[..., None]  # (stage, done, in all, a note)
_PICTURE = 3000  # a picture's weight in characters, for ordering alone


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class MineOptions:
    """Says how negatives are chosen."""

    negatives: int = field(default=8, metadata=_help("Hard negatives of a row, at most."))
    top_k: int = field(default=100, metadata=_help("So many nearest targets are looked at, excluded ones not counted."))
    skip_top: int = field(default=0, metadata=_help("Leave out the first so many of them."))
    relative: float = field(
        default=0.95, metadata=_help("A negative's cosine is below this part of the positive's (NV-Retriever's bound).")
    )
    margin: float | None = field(default=None, metadata=_help("And below the positive's less this."))
    sampling: str = field(default="top", metadata=_help("'top': the nearest ones; 'random': any of those left."))
    seed: int = field(default=0, metadata=_help("Seed of 'random'."))
    mode: str = field(default="disc", metadata=_help("'disc' or 'gen' embeddings on both sides."))
    reranker: str | None = field(
        default=None, metadata=_help("A reranker in the form of Qwen3-VL-Reranker, as a second filter.")
    )
    reranker_min: float = field(
        default=0.0, metadata=_help("Mine only for rows whose positive the reranker scores above this (0 to 1).")
    )
    reranker_margin: float = field(
        default=0.0, metadata=_help("A negative's reranker score is below the positive's plus this.")
    )
    cache: str | None = field(default=None, metadata=_help("Folder of embeddings (default: OUTPUT.cache)."))
    on_bad_row: str = field(default="stop", metadata=_help("'stop', or 'skip': leave out rows that cannot be read."))
    image_root: str | None = field(
        default=None, metadata=_help("Folder of relative image paths (default: the data file's own).")
    )
    file_format: str | None = field(default=None, metadata=_help("The rows' format (default: by their keys)."))
    allow_outside: bool = field(default=False, metadata=_help("Open image paths that lead out of the image root."))
    allow_urls: bool = field(default=False, metadata=_help("Open image paths like https:// and s3:// (by fsspec)."))
    overwrite: bool = field(default=False, metadata=_help("Replace an output that was made otherwise."))

    def __post_init__(self) -> None:
        for name, value, known in (
            ("sampling", self.sampling, ("top", "random")),
            ("mode", self.mode, ("disc", "gen")),
            ("on_bad_row", self.on_bad_row, ("stop", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected {', '.join(known)}")
        if self.negatives < 1 or self.top_k < self.negatives or self.skip_top < 0:
            raise ValueError(
                f"negatives is {self.negatives}, top_k {self.top_k}, skip_top {self.skip_top}; expected 1 or more, at "
                "least as many, and 0 or more"
            )
        if not 0 < self.relative <= 1 or (self.margin is not None and self.margin < 0):
            raise ValueError(f"relative is {self.relative} and margin {self.margin}; expected (0, 1] and 0 or more")

    def bound(self, positive: float) -> float:
        """Compute what a negative's cosine stays below. Of a positive below 0, too, the bound lies under it."""
        bound = positive - (1 - self.relative) * abs(positive)
        return bound if self.margin is None else min(bound, positive - self.margin)


class Items:
    """Holds the different queries and targets of a source, and the rows that they come from."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.places: dict[str, list[tuple[int, int]]] = {"query": [], "target": []}  # row, number of the side in it
        self.weights: dict[str, list[int]] = {"query": [], "target": []}
        self.features: dict[str, list[set[str]]] = {"query": [], "target": []}  # what makes two items equal
        self.known: dict[str, dict[str, int]] = {"query": {}, "target": {}}
        self.keys: dict[str, list[str]] = {"query": [], "target": []}
        self.rows: list[tuple[int, int, list[int], list[int]]] = []  # row, query, its targets, its own negatives
        self.sets: list[str] = []  # data set of each of them
        self.bad: dict[int, DataError] = {}

    def read(self, output: Path, digests: ImageDigests, on_bad_row: str, told: Progress) -> None:
        """Read every row once. Raises DataError with all bad rows."""
        total = len(self.reading.rows)
        for index, pair in self.reading.pairs():
            try:
                if isinstance(pair, DataError):
                    raise pair
                self.reading.writable(index, pair, output)
                self._add(index, pair, digests)
            except DataError as error:
                self.bad[index] = error
            if (index + 1) % 1000 == 0 or index + 1 == total:
                told("reading", index + 1, total)
        digests.keep()
        if self.bad and (on_bad_row == "stop" or not self.rows):
            raise DataError([problem for error in self.bad.values() for problem in error.problems])

    def _add(self, index: int, pair: Pair, digests: ImageDigests) -> None:
        try:
            own = own_negatives(pair)
            targets = [pair.target, *pair.positives, *own]
            parts = [digests.parts(side) for side in (pair.query, *targets)]
        except ValueError as error:
            raise self.reading.error(index, ("", str(error))) from None
        query = self._item("query", index, 0, pair.query, parts[0])
        found = [self._item("target", index, i, side, parts[1 + i]) for i, side in enumerate(targets)]
        right = 1 + len(pair.positives)
        self.rows.append((index, query, found[:right], found[right:]))
        self.sets.append(pair.dataset or "")

    def _item(self, name: str, index: int, number: int, side: Side, parts: list[list[Any]]) -> int:
        key = digest(parts)
        known = self.known[name]
        if key not in known:
            known[key] = len(known)
            self.keys[name].append(key)
            self.places[name].append((index, number))
            self.weights[name].append(len(side.text) + _PICTURE * (len(side.images) + len(side.videos)))
            self.features[name].append({f"content {key}"} | _features(side, parts))
        if side.id is not None:
            self.features[name][known[key]].add(f"id {side.id}")
        return known[key]

    def side(self, name: str, item: int) -> Side:
        """Read the item itself."""
        index, number = self.places[name][item]
        pair, _ = self.reading.pair(index)
        return pair.query if name == "query" else [pair.target, *pair.positives, *own_negatives(pair)][number]

    def digest(self) -> str:
        """Name everything that was read."""
        whole = hashlib.sha256(repr((self.rows, self.sets, sorted(self.bad))).encode())
        for name in ("query", "target"):
            whole.update("".join(self.keys[name]).encode())
        return whole.hexdigest()[:32]


def own_negatives(pair: Pair) -> list[Side]:
    """Give the hard negatives that the row came with; mined ones are not."""
    return [] if pair.mined_scores is not None else pair.negatives


def _features(side: Side, parts: list[list[Any]]) -> set[str]:
    """Its text, where there is nothing else, and each of its pictures."""
    pictures = {f"{kind} {value}" for kind, value in parts if kind != "text"}
    return pictures or {f"text {plain(side.text)}"}
