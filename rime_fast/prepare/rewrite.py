"""Filling ``rewrite`` of pairs by a teacher: every unique side is asked about once, whatever happens in between.

The work is listed first: a key for each side (its content, the wording, the teacher, how it decodes, the truth where it
is shown), the unique ones ordered by length and cut into batches. A batch's composition depends on the data and the
options alone, not on shards or on what is done already; a shard takes every n-th batch. Finished batches go into a
ledger (ledger.py); one that was interrupted is done again, whole. When all are there, the rows are written in their own
order: the same bytes as without interruption.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rime_fast.data.images import load_image
from rime_fast.data.sources import write_rows
from rime_fast.prepare.accept import read_rewrite
from rime_fast.prepare.content import ImageDigests, digest, open_reading, output_path, refuse_other
from rime_fast.prepare.ledger import Ledger
from rime_fast.prepare.prompts import Request, load_prompts
from rime_fast.prepare.rewrite_report import write_report
from rime_fast.prepare.rewrite_work import Progress, RewriteOptions, Work
from rime_fast.prepare.teachers import Completion, Decoding, OpenAITeacher, Teacher, VllmTeacher, flat_parts


def load_teacher(name: str, options: RewriteOptions) -> Teacher:
    """Load the teacher of that name (a folder, a hub's or a server's name) behind ``options.backend``."""
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
    entries: list[dict[str, Any]] = [{"key": request.key, "rewrite": None, "tries": []} for request in requests]
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
