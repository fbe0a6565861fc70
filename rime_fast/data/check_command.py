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

from rime_fast.data.check import CheckReport, CheckRules, check_file, check_pair
from rime_fast.data.records import DataError, Pair, Problem, Side
from rime_fast.data.retrieval import RetrievalSet, is_retrieval_set


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class CheckOptions:
    """What the command takes; ``run_check`` reads these attributes from any object that has them."""

    files: list[str] = field(
        default_factory=list,
        metadata=_help("Files to check: RIME-SFT, UME-R1 SFT, RIME-RL, rime-jsonl, or a retrieval set."),
    )
    image_root: str | None = field(
        default=None, metadata=_help("Folder that relative image paths start from (default: each file's own).")
    )
    file_format: str | None = field(
        default=None, metadata=_help("rime-sft, ume-r1-sft, rime-rl or rime-jsonl (default: by each row's keys).")
    )
    rewrites: str = field(
        default="auto",
        metadata=_help("Whether both sides need a rewrite: required, optional, or auto (required unless rime-rl)."),
    )
    images: str = field(
        default="decode",
        metadata=_help("decode: read every image whole; head: only its size (much faster); skip: not at all."),
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
        retrieval = args.file_format is None and is_retrieval_set(path)
    except DataError as error:
        return CheckReport(path, problems=error.problems)
    if retrieval:
        if args.write_good:
            raise ValueError(f"{path} is a retrieval set; write_good is for training files")
        return check_retrieval_set(path, rules, image_root=args.image_root)
    return check_file(
        path,
        rules,
        image_root=args.image_root,
        file_format=args.file_format,
        write_good=args.write_good,
        progress=progress,
    )


def check_retrieval_set(path: str | Path, rules: CheckRules, *, image_root: str | Path | None = None) -> CheckReport:
    """The report on an evaluation file; a row is a query. Problems of shared candidates have row 0."""
    report = CheckReport(str(path))
    try:
        found = RetrievalSet.from_file(path, image_root=image_root)
    except DataError as error:
        report.problems += error.problems
        return report
    report.rows = len(found.queries)
    report.formats["retrieval set"] = report.rows
    bare = CheckRules(False, rules.images, rules.max_characters, rules.max_images, rules.max_frames)
    sides = [(i + 1, "query", side) for i, side in enumerate(found.queries)]
    sides += [(0, f"candidates[{i}]", side) for i, side in enumerate(found.candidates)]
    for row, name, side in sides:
        for where, problem in check_pair(Pair(side, Side(text="-")), bare):
            report.problems.append(Problem(report.file, row, where.replace("query", name, 1), problem))
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
    """A bar over the file's bytes on stderr, where that is a terminal."""
    if not (sys.stderr.isatty() and os.path.isfile(path)):
        yield lambda rows, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    rows = TextColumn("{task.fields[rows]} rows")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), rows)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(os.path.basename(path), total=os.path.getsize(path), rows=0)

        def step(rows: int, done: int) -> None:
            if rows % 64 == 0:
                bar.update(task, completed=done, rows=rows)

        yield step
