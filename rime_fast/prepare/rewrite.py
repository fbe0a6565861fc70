"""Filling ``rewrite`` of pairs by a teacher: every unique side is asked about once, whatever happens in between.

The work is listed first: a key for each side (its content, the wording, the teacher, how it decodes, the truth where it
is shown), the unique ones ordered by length and cut into batches. A batch's composition depends on the data and the
options alone, not on shards or on what is done already; a shard takes every n-th batch. Finished batches go into a
ledger (ledger.py); one that was interrupted is done again, whole. When all are there, the rows are written in their own
order: the same bytes as without interruption.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_fast.data.images import load_image
from rime_fast.data.records import DataError, Pair, Side
from rime_fast.data.sources import write_rows
from rime_fast.prepare.accept import RULES, read_rewrite
from rime_fast.prepare.content import ImageDigests, Reading, digest, open_reading, output_path, refuse_other
from rime_fast.prepare.ledger import Ledger
from rime_fast.prepare.prompts import SIDES, Prompts, Request, load_prompts
from rime_fast.prepare.rewrite_report import write_report
from rime_fast.prepare.teachers import Completion, Decoding, OpenAITeacher, Teacher, VllmTeacher, flat_parts

BACKENDS = ("transformers", "vllm", "openai")
Progress = Callable[..., None]  # (stage, done, in all, a note)
_PICTURE = 3000  # a picture's weight in characters, for ordering alone


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class RewriteOptions:
    """How rewrites are made."""

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
    max_pixels: int = field(default=1280 * 28 * 28, metadata=_help("Shrink pictures to at most this many pixels."))
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
        """(this part, of how many)."""
        first, _, last = self.shard.partition("/")
        if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise ValueError(f"shard is {self.shard!r}; expected k/n with k from 0 to n - 1")
        return int(first), int(last)

    def decoding(self) -> Decoding:
        """How the teacher writes."""
        return Decoding(self.max_tokens, self.temperature, self.seed, self.max_pixels, self.frames)


def load_teacher(name: str, options: RewriteOptions) -> Teacher:
    """The teacher of that name (a folder, a hub's or a server's name) behind ``options.backend``."""
    if options.backend == "openai":
        return OpenAITeacher(
            name,
            options.base_url,
            timeout=options.timeout,
            max_retries=options.max_retries,
            concurrency=options.batch_size,
        )
    if options.backend == "vllm":
        return VllmTeacher(name, tensor_parallel_size=options.tensor_parallel_size)
    from rime_fast.prepare.local_teacher import load_local

    return load_local(name, template=options.template, device=options.device, max_pixels=options.max_pixels)


def rewrite_rows(
    data: Any,
    model: str | Path | Teacher,
    output: str | Path,
    options: RewriteOptions | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``data`` with rewrites by a teacher to ``output`` (.jsonl, .json or .parquet); returns the report.

    data: whatever ``open_rows`` opens, in any format. model: the teacher's name, or a Teacher. Sides that have a
    rewrite keep it; one whose text was rejected stays without. Beside the output come ``OUTPUT.report.json`` and
    ``OUTPUT.rejects.jsonl`` (each rejected text with its reason). Interrupted, it goes on where it was when called
    again. In a shard that ends before the others the report has "missing", the number of sides still to do, and no
    output is written; the last one writes it. progress: called with stage, sides done, sides in all and a note.

    Raises DataError for bad rows (unless ``on_bad_row="skip"``), ValueError for options that make no sense and for an
    output that is there and was made otherwise, RuntimeError where a server keeps failing (what is finished is kept).
    """
    options = options or RewriteOptions()
    told = progress or (lambda *_: None)
    reading = open_reading(
        data,
        image_root=options.image_root,
        file_format=options.file_format,
        allow_outside=options.allow_outside,
        allow_urls=options.allow_urls,
    )
    path = output_path(data, output)
    prompts = load_prompts(options.prompts)
    if options.task is not None and options.task not in prompts.tasks:
        raise ValueError(f"task is {options.task!r}; expected one of {', '.join(map(repr, prompts.tasks))}")
    teacher = load_teacher(os.fspath(model), options) if isinstance(model, (str, os.PathLike)) else model
    if options.with_truth and not teacher.prompted:
        raise ValueError(
            "with_truth needs a teacher that is asked by prompts; a model trained here reads the side alone"
        )
    work = Work(reading, prompts, teacher.identity(), teacher.prompted, options, path)
    folder = Path(options.cache or f"{output}.cache")
    rank, world = options.part()
    with Ledger(folder / "pictures", f"{rank}-of-{world}") as kept:
        work.read(ImageDigests(kept), told)
    refuse_other(path, work.job, options.overwrite)
    with Ledger(folder, f"{rank}-of-{world}") as ledger:
        _ask(work, teacher, ledger, rank, world, told)
    with Ledger(folder, None) as ledger:
        if missing := sum(key not in ledger for key in work.keys):
            return {"missing": missing, "unique_sides": len(work.keys)}
        report = write_report(work, ledger, path)
        written = write_rows(path, work.rows(ledger, parquet=path.suffix == ".parquet", told=told))
        assert written == report["rows"]
    return report


@dataclass
class Work:
    """What is to be asked: the unique sides in the order of the batches, and where their rewrites go."""

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
        """The name of the pair's task."""
        return self.options.task or self.prompts.task(pair.dataset)

    def sides(self, pair: Pair) -> list[tuple[str, int, Side]]:
        """(query or target, number among the targets, side) of those that want a rewrite."""
        return [one for one in self._all(pair) if not (one[2].rewrite or "").strip()]

    def _all(self, pair: Pair) -> list[tuple[str, int, Side]]:
        targets = [("target", i, side) for i, side in enumerate([pair.target, *pair.positives])]
        return [one for one in [("query", 0, pair.query), *targets] if one[0] in self.options.sides]

    def request(self, number: int) -> Request:
        """The request of the unique side of that number."""
        index, slot, with_truth = self.places[number]
        pair, _ = self.reading.pair(index)
        name, _, side = self.sides(pair)[slot]
        truth = pair.target if with_truth else None
        content = self.prompts.content(side, self.task(pair), name, truth)
        return Request(self.keys[number], side, self.prompts.system, content, None if truth is None else truth.text)

    def rows(self, ledger: Ledger, *, parquet: bool, told: Progress) -> Iterator[dict[str, Any]]:
        """The rows with their rewrites."""
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


def _ask(work: Work, teacher: Teacher, ledger: Ledger, rank: int, world: int, told: Progress) -> None:
    """Every batch of this shard that is not finished."""
    size = work.options.batch_size
    starts = range(rank * size, len(work.keys), world * size)
    batches = [range(start, min(start + size, len(work.keys))) for start in starts]
    total, done = sum(map(len, batches)), 0
    began, asked, tokens = time.monotonic(), 0, 0
    told("rewriting", 0, total, "")
    for numbers in batches:
        todo = [i for i in numbers if work.keys[i] not in ledger]
        if todo:
            entries = _batch(work, teacher, todo)
            ledger.append(digest([entry["key"] for entry in entries]), entries)
            asked += len(todo)
            tokens += sum(one["tokens"] for entry in entries for one in entry["tries"])
        done += len(numbers)
        if todo or done == total:
            seconds = max(time.monotonic() - began, 1e-9)
            told("rewriting", done, total, f"{asked / seconds:.1f} rows/s, {tokens:,} tokens")


def _batch(work: Work, teacher: Teacher, numbers: list[int]) -> list[dict[str, Any]]:
    """One batch: what was rejected is tried once more, at another seed."""
    requests = [work.request(i) for i in numbers]
    decoding = work.options.decoding()
    entries = [{"key": request.key, "rewrite": None, "tries": []} for request in requests]
    waiting: list[Any] = list(zip(requests, entries, strict=True))
    for attempt in (decoding, decoding.again()) if teacher.retries else (decoding,):
        if not waiting:
            break
        completions = _write(teacher, [request for request, _ in waiting], attempt)
        for (request, entry), made in zip(waiting, completions, strict=True):
            form = work.prompts.form if work.prompted else "plain"
            template = work.options.template if work.prompted else "rewrite"
            rewrite, reason = read_rewrite(made.text, made.finish, request.side, request.truth, form, template)
            entry["tries"].append(vars(made) | {"reason": reason})
            entry["rewrite"] = rewrite or None
        waiting = [one for one in waiting if one[1]["rewrite"] is None]
    return entries


def _write(teacher: Teacher, requests: list[Request], decoding: Decoding) -> list[Completion]:
    """The teacher's answers; a request whose pictures do not open is a reject, and the others are made without it."""
    try:
        return teacher.write(requests, decoding)
    except ValueError:
        found = [_broken(request, decoding.frames) for request in requests]
        sound = [request for request, fault in zip(requests, found, strict=True) if not fault]
        if len(sound) == len(requests):
            raise
    made = iter(teacher.write(sound, decoding) if sound else ())
    return [Completion("", f"broken picture: {fault}", 0) if fault else next(made) for fault in found]


def _broken(request: Request, frames: int) -> str:
    try:
        for kind, value in flat_parts(request.content, frames):
            if kind == "image":
                load_image(value)
    except ValueError as error:
        return str(error)
    return ""
