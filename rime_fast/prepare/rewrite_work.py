"""What ``rime-fast rewrite`` has to ask, and how: the options, and the unique sides in the order of their batches."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_fast.data.records import DataError, Pair, Side
from rime_fast.prepare.accept import RULES
from rime_fast.prepare.content import ImageDigests, Reading, digest
from rime_fast.prepare.ledger import Ledger
from rime_fast.prepare.prompts import SIDES, Prompts, Request
from rime_fast.prepare.teachers import Decoding

BACKENDS = ("transformers", "vllm", "openai")
Progress = Callable[..., None]  # (stage, done, in all, a note)
_PICTURE = 3000  # a picture's weight in characters, for ordering alone


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class RewriteOptions:
    """Says how rewrites are made."""

    backend: str = field(
        default="transformers",
        metadata=_help(
            "'transformers' (in this process: Qwen2-VL, 2.5-VL, 3-VL, or a model trained here), 'vllm', or "
            "'openai' (any server with /v1/chat/completions)."
        ),
    )
    base_url: str | None = field(
        default=None, metadata=_help("The server's address, with /v1 (default: OPENAI_BASE_URL; key: OPENAI_API_KEY).")
    )
    prompts: str | None = field(default=None, metadata=_help("YAML with wording of your own, by task."))
    task: str | None = field(
        default=None, metadata=_help("The task of all rows, a name of the prompts (default: by each row's data set).")
    )
    template: str = field(
        default="rewrite", metadata=_help("'rewrite' keeps the answer alone, 'cot' the chain of thought with it.")
    )
    sides: list[str] = field(
        default_factory=lambda: list(SIDES), metadata=_help("Which sides: query, target (default: both).")
    )
    with_truth: bool = field(
        default=False, metadata=_help("Show the teacher the right answer of a query. Read docs/prepare.md first.")
    )
    leak_rows: int = field(
        default=256, metadata=_help("With the truth: so many queries are asked without it too, for the leak check.")
    )
    shard: str = field(default="0/1", metadata=_help("k/n: this process does part k (from 0) of n."))
    batch_size: int = field(default=32, metadata=_help("Requests at a time; a batch is kept whole or not at all."))
    max_tokens: int = field(default=512, metadata=_help("Most tokens of an answer; one that is cut is rejected."))
    temperature: float = field(default=0.0, metadata=_help("Of the first try; 0 is greedy."))
    seed: int = field(default=0, metadata=_help("Seed; a rejected answer is tried once more at the next one."))
    max_pixels: int = field(default=1_003_520, metadata=_help("Shrink pictures to at most this many pixels."))
    frames: int = field(default=8, metadata=_help("Frames shown of a video."))
    cache: str | None = field(default=None, metadata=_help("Folder of finished answers (default: OUTPUT.cache)."))
    on_bad_row: str = field(default="stop", metadata=_help("'stop', or 'skip': leave out rows that cannot be read."))
    image_root: str | None = field(
        default=None, metadata=_help("Folder of relative image paths (default: the data file's own).")
    )
    file_format: str | None = field(default=None, metadata=_help("The rows' format (default: by their keys)."))
    allow_outside: bool = field(default=False, metadata=_help("Open image paths that lead out of the image root."))
    allow_urls: bool = field(default=False, metadata=_help("Open image paths like https:// and s3:// (by fsspec)."))
    overwrite: bool = field(default=False, metadata=_help("Replace an output that was made otherwise."))
    timeout: float = field(default=300.0, metadata=_help("Server: seconds that an answer may take."))
    max_retries: int = field(default=8, metadata=_help("Server: how often a failing request is sent again."))
    tensor_parallel_size: int = field(default=1, metadata=_help("vLLM: GPUs of the engine."))
    device: str | None = field(default=None, metadata=_help("transformers: 'cuda', 'cpu' (default: CUDA if there)."))

    def __post_init__(self) -> None:
        self.sides = [name.strip() for one in self.sides for name in one.split(",") if name.strip()]
        for name, value, known in (
            ("backend", self.backend, BACKENDS),
            ("template", self.template, ("rewrite", "cot")),
            ("on_bad_row", self.on_bad_row, ("stop", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected {', '.join(known)}")
        if not self.sides or not set(self.sides) <= set(SIDES):
            raise ValueError(f"sides is {self.sides}; expected query, target or both")
        for name in ("batch_size", "max_tokens", "max_pixels", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.temperature < 0 or self.leak_rows < 0:
            raise ValueError(
                f"temperature is {self.temperature} and leak_rows {self.leak_rows}; expected 0 or more of both"
            )
        self.part()

    def part(self) -> tuple[int, int]:
        """Read ``shard`` as (this part, of how many)."""
        first, _, last = self.shard.partition("/")
        if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise ValueError(f"shard is {self.shard!r}; expected k/n with k from 0 to n - 1")
        return int(first), int(last)

    def decoding(self) -> Decoding:
        """Say how the teacher writes."""
        return Decoding(self.max_tokens, self.temperature, self.seed, self.max_pixels, self.frames)


@dataclass
class Work:
    """Holds what is to be asked: the unique sides in the order of the batches, and where their rewrites go."""

    reading: Reading
    prompts: Prompts
    teacher: dict[str, Any]
    prompted: bool
    options: RewriteOptions
    output: Path
    keys: list[str] = field(default_factory=list)
    places: list[tuple[int, int, bool]] = field(default_factory=list)  # of each key: row, slot in it, with the truth
    twins: list[tuple[str, str]] = field(default_factory=list)  # keys with and without the truth, for the leak check
    slots: array[int] = field(default_factory=lambda: array("q"))  # per side without a rewrite: its key; -1 a bad row
    bad: dict[int, DataError] = field(default_factory=dict)
    kept: int = 0
    job: str = ""

    def read(self, digests: ImageDigests, told: Progress) -> None:
        """Read every row once. Raises DataError with all bad rows."""
        known: dict[str, int] = {}
        weights: list[int] = []
        total = len(self.reading.rows)
        for index, pair in self.reading.pairs():
            try:
                if isinstance(pair, DataError):
                    raise pair
                found = self._row(index, pair, digests)
            except DataError as error:
                self.bad[index] = error
                continue
            sides = self.sides(pair)
            self.kept += sum(side.rewrite is not None for _, _, side in self._all(pair))
            for slot, (key, (_, _, side)) in enumerate(zip(found, sides, strict=True)):
                if key not in known:
                    known[key] = len(known)
                    self.places.append((index, slot, self._shown(sides[slot][0])))
                    weights.append(len(side.text) + _PICTURE * (len(side.images) + len(side.videos)))
                self.slots.append(known[key])
            if (index + 1) % 1000 == 0 or index + 1 == total:
                told("reading", index + 1, total)
        if self.bad and self.options.on_bad_row == "stop":
            raise DataError([problem for error in self.bad.values() for problem in error.problems])
        if len(self.bad) == total:
            raise next(iter(self.bad.values()))
        keys = list(known)
        self._twin(keys, weights, digests)
        digests.keep()
        order = sorted(range(len(keys)), key=lambda i: (-weights[i], keys[i]))
        rank = array("q", [0] * len(keys))
        for place, i in enumerate(order):
            rank[i] = place
        self.keys, self.places = [keys[i] for i in order], [self.places[i] for i in order]
        self.slots = array("q", (rank[i] for i in self.slots))
        whole = hashlib.sha256("".join(self.keys).encode())
        whole.update(self.slots.tobytes() + repr((sorted(self.bad), self.options.sides)).encode())
        self.job = whole.hexdigest()[:32]

    def _twin(self, keys: list[str], weights: list[int], digests: ImageDigests) -> None:
        """Some of the queries that are asked with the truth are asked without it too."""
        if not self.options.with_truth:
            return
        chosen = sorted((key, i) for i, key in enumerate(keys) if self.places[i][2])[: self.options.leak_rows]
        known = {key: key for key in keys}
        for key, i in chosen:
            index, slot, _ = self.places[i]
            pair, _ = self.reading.pair(index)
            name, _, side = self.sides(pair)[slot]
            twin = self._key(index, pair, name, side, digests, truth=False)
            self.twins.append((key, twin))
            if twin not in known:
                known[twin] = twin
                keys.append(twin)
                weights.append(weights[i])
                self.places.append((index, slot, False))

    def _row(self, index: int, pair: Pair, digests: ImageDigests) -> list[str]:
        self.reading.writable(index, pair, self.output)
        return [
            self._key(index, pair, name, side, digests, truth=self._shown(name)) for name, _, side in self.sides(pair)
        ]

    def _key(self, index: int, pair: Pair, name: str, side: Side, digests: ImageDigests, *, truth: bool) -> str:
        options = self.options
        try:
            shown = digests.parts(pair.target) if truth else None
            asked = self.prompts.wording(self.task(pair), name, truth) if self.prompted else None
            decoding = vars(options.decoding()) | {"template": options.template}
            return digest([digests.parts(side), shown, asked, self.teacher, decoding, RULES])
        except ValueError as error:
            raise self.reading.error(index, (name, str(error))) from None

    def _shown(self, name: str) -> bool:
        return self.options.with_truth and name == "query"

    def task(self, pair: Pair) -> str:
        """Name the pair's task."""
        return self.options.task or self.prompts.task(pair.dataset)

    def sides(self, pair: Pair) -> list[tuple[str, int, Side]]:
        """List those that want a rewrite: (query or target, number among the targets, side)."""
        return [one for one in self._all(pair) if not (one[2].rewrite or "").strip()]

    def _all(self, pair: Pair) -> list[tuple[str, int, Side]]:
        targets = [("target", i, side) for i, side in enumerate([pair.target, *pair.positives])]
        return [one for one in [("query", 0, pair.query), *targets] if one[0] in self.options.sides]

    def request(self, number: int) -> Request:
        """Make the request of the unique side of that number."""
        index, slot, with_truth = self.places[number]
        pair, _ = self.reading.pair(index)
        name, _, side = self.sides(pair)[slot]
        truth = pair.target if with_truth else None
        content = self.prompts.content(side, self.task(pair), name, truth)
        return Request(self.keys[number], side, self.prompts.system, content, None if truth is None else truth.text)

    def rows(self, ledger: Ledger, *, parquet: bool, told: Progress) -> Iterator[dict[str, Any]]:
        """Give the rows with their rewrites."""
        slots, total = iter(self.slots), len(self.reading.rows)
        for index in range(total):
            if index in self.bad:
                continue
            pair, raw = self.reading.pair(index)
            row = self.reading.row(pair, raw, parquet=parquet)
            for name, i, _ in self.sides(pair):
                rewrite = ledger[self.keys[next(slots)]]["rewrite"]
                side = row[name] if name in row else row["targets"][i]
                side.pop("rewrite", None)
                if rewrite:
                    side["rewrite"] = rewrite
            yield row
            if (index + 1) % 1000 == 0 or index + 1 == total:
                told("writing", index + 1, total)
