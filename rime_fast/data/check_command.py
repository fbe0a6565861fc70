"""``rime-fast data check FILE ...``: every bad row by file, row and field; the good ones written out on request."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_fast.data.check import check_file
from rime_fast.data.records import DataError, Side
from rime_fast.data.retrieval import RetrievalSet, count_queries, is_retrieval_set
from rime_fast.data.row_check import CheckReport, CheckRules


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class CheckOptions:
    """What the command takes; ``run_check`` reads these attributes from any object that has them."""

    files: list[str] = field(
        default_factory=list,
        metadata=_help("Files or folders to check, of any format of docs/data.md, or retrieval sets."),
    )
    image_root: str | None = field(
        default=None, metadata=_help("Folder that relative image paths start from (default: each file's own).")
    )
    file_format: str | None = field(
        default=None, metadata=_help("The rows' format, a name of docs/data.md (default: by each row's keys).")
    )
    allow_outside: bool = field(
        default=False, metadata=_help("Open image paths that lead out of the image root (absolute ones, or by ..).")
    )
    allow_urls: bool = field(default=False, metadata=_help("Open image paths like https:// and s3:// (by fsspec)."))
    rewrites: str = field(
        default="auto",
        metadata=_help("Whether both sides need a rewrite: required, optional, or auto (as the format has them)."),
    )
    images: str = field(
        default="decode",
        metadata=_help("decode: read every image whole; head: only its size (much faster); skip: not at all."),
    )
    max_image_pixels: int = field(
        default=89_478_485, metadata=_help("Images of more pixels are bad; they are never decoded.")
    )
    sample: int | None = field(default=None, metadata=_help("Look at this many rows only, evenly spread."))
    workers: int | None = field(
        default=None, metadata=_help("Processes (default: as many as there are processors, from 20,000 rows on).")
    )
    fresh: bool = field(
        default=False, metadata=_help("Look again even where file, rules and image folders have not changed.")
    )
    write_good: str | None = field(
        default=None, metadata=_help("Write the good rows to this file (a JSON list if it ends in .json, else JSONL).")
    )
    report: str | None = field(default=None, metadata=_help("Write the report as JSON to this file."))
    model: str | None = field(
        default=None, metadata=_help("Model whose tokenizer and image limits measure lengths; needs --max-length.")
    )
    template: str = field(default="rewrite", metadata=_help("Template the lengths are measured with."))
    max_length: int | None = field(default=None, metadata=_help("Longest sequence in tokens; needs --model."))
    max_shown: int = field(default=50, metadata=_help("Bad fields printed per file; the report has all of them."))


def run_check(args: Any) -> int:
    """Check ``args.files``, print what is wrong, return 0 when every row is good and 1 when not.

    ``args``: CheckOptions or anything with its attributes. Raises ValueError for options that make no sense.
    """
    files = [os.fspath(path) for path in args.files]
    if not files:
        raise ValueError("files is empty; name at least one file to check")
    if args.write_good and len(files) > 1:
        raise ValueError(f"write_good takes one file at a time; got {len(files)} files")
    if (args.model is None) != (args.max_length is None):
        raise ValueError("model and max_length go together: one measures, the other limits")
    if args.rewrites not in ("auto", "required", "optional"):
        raise ValueError(f"rewrites is {args.rewrites!r}; expected 'auto', 'required' or 'optional'")
    rules = CheckRules(
        rewrites=None if args.rewrites == "auto" else args.rewrites == "required",
        images=args.images,
        max_length=args.max_length,
        measure=None if args.model is None else _measure(args.model, args.template),
        max_pixels=args.max_image_pixels,
    )
    reports = []
    for path in files:
        with _progress(path) as progress:
            report = _check_one(path, rules, args, progress)
        reports.append(report)
        for problem in report.problems[: args.max_shown]:
            print(problem)
        if len(report.problems) > args.max_shown:
            print(f"... and {len(report.problems) - args.max_shown} more")
        print(report.summary())
        if args.write_good:
            print(f"good rows: {args.write_good}")
            root = args.image_root or Path(path).parent
            if Path(args.write_good).resolve().parent != Path(root).resolve():
                print(f"relative image paths in it start from {root}: pass that as the image root")
    if args.report:
        whole = json.dumps([report.to_json() for report in reports], indent=1, ensure_ascii=False)
        Path(args.report).write_text(whole + "\n", encoding="utf-8", errors="backslashreplace")
    return 0 if all(report.ok for report in reports) else 1


def _check_one(path: str, rules: CheckRules, args: Any, progress: Callable[[int, int], None]) -> CheckReport:
    try:
        retrieval = args.file_format is None and os.path.isfile(path) and is_retrieval_set(path)
    except DataError as error:
        return CheckReport(path, problems=error.problems)
    if retrieval:
        if args.write_good:
            raise ValueError(f"{path} is a retrieval set; write_good is for training files")
        return check_retrieval_set(path, rules, image_root=args.image_root, allow_outside=args.allow_outside)
    return check_file(
        path,
        rules,
        image_root=args.image_root,
        file_format=args.file_format,
        allow_outside=args.allow_outside,
        allow_urls=args.allow_urls,
        write_good=args.write_good,
        sample=args.sample,
        workers=args.workers,
        fresh=args.fresh,
        progress=progress,
    )


def check_retrieval_set(
    path: str | Path, rules: CheckRules, *, image_root: str | Path | None = None, allow_outside: bool = False
) -> CheckReport:
    """Make the report on an evaluation file; a row is a query. Problems of shared candidates have row 0."""
    report = CheckReport(str(path))
    try:
        found = RetrievalSet.from_file(
            path,
            image_root=image_root,
            allow_outside=allow_outside,
            images=rules.images,
            max_pixels=rules.max_pixels,
        )
    except DataError as error:
        report.problems += error.problems
        report.rows = count_queries(path)
    else:
        report.rows = len(found.queries)
    report.formats["retrieval set"] = report.rows
    return report


def _measure(model: str, template: str) -> Callable[[list[Side]], list[int]]:
    from transformers import AutoConfig

    from rime_fast.data.collate import Collator
    from rime_fast.model.processor import RimeProcessor
    from rime_fast.model.tokens import DISC_TOKEN, GEN_TOKEN

    processor = RimeProcessor.from_pretrained(model)
    processor.tokenizer.add_tokens([DISC_TOKEN, GEN_TOKEN], special_tokens=True)
    return Collator(processor, template, AutoConfig.from_pretrained(model)).measure


@contextmanager
def _progress(path: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over the rows on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(os.path.basename(path), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
