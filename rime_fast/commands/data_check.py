"""``rime-fast data check``: the validation pass over training files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rime_fast.commands.command import Command, required
from rime_fast.commands.options import Group, UsageError
from rime_fast.commands.values import build

if TYPE_CHECKING:
    from rime_fast.data.check import CheckReport

SHOWN = 50


@dataclass
class CheckOptions:
    """What is checked, and how strictly."""

    files: list[str] = field(
        metadata={"help": "Training files of any supported format (the word --files may be left out)."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder of relative image paths; default: each file's own."}
    )
    images: str = field(
        default="head", metadata={"help": "'decode' reads every image whole, 'head' its size only, 'skip' none."}
    )
    rewrites: bool | None = field(
        default=None, metadata={"help": "Whether both sides need a rewrite; default: unless the format is RIME-RL."}
    )
    format: str | None = field(
        default=None, metadata={"help": "rime-sft, ume-r1-sft, rime-rl or rime-jsonl; default: told by each row."}
    )
    write_good: str | None = field(
        default=None, metadata={"help": "Also write the good rows here (.jsonl, or .json for a list); one input file."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON: counts, and every problem."})


def run(values: dict[str, Any]) -> int:
    """Check each file; 0 when all rows are good, else 1."""
    required(values, "files")
    options = build(CheckOptions, values)
    if options.write_good and len(options.files) > 1:
        raise UsageError(f"--write_good takes the rows of one file, got {len(options.files)} files")
    from rime_fast.data.check import CheckRules, check_file

    try:
        rules = CheckRules(rewrites=options.rewrites, images=options.images)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(str(error)) from error
    reports = [
        check_file(
            path, rules, image_root=options.image_root, file_format=options.format, write_good=options.write_good
        )
        for path in options.files
    ]
    if options.json:
        print(json.dumps([report.to_json() for report in reports], indent=1, ensure_ascii=False))
    else:
        for report in reports:
            _show(report)
        if options.write_good:
            print(f"good rows: {Path(options.write_good)}")
    return 0 if all(report.ok for report in reports) else 1


def _show(report: CheckReport) -> None:
    for problem in report.problems[:SHOWN]:
        print(problem)
    if len(report.problems) > SHOWN:
        print(f"... and {len(report.problems) - SHOWN} more (--json lists all)")
    print(report.summary())


COMMAND = Command(
    name="data check",
    text="Reads training files row by row and names file, row and field of everything that training would trip over: "
    "missing or broken images, empty rewrites, missing or doubled <gen_emb>, unknown keys, absurd lengths. Exit code 0 "
    "when every row is good, else 1.",
    examples=(
        ("look", "rime-fast data check pairs.jsonl"),
        ("keep what is good", "rime-fast data check pairs.jsonl --images decode --write_good good.jsonl"),
        ("for a script", "rime-fast data check RIME-SFT/*.json --json"),
    ),
    run=run,
    groups=(Group("Options", "rime_fast.commands.data_check", "CheckOptions"),),
    positional="files",
)
