"""``rime-fast data check``: the validation pass over training files and retrieval sets (data/check_command.py)."""

from __future__ import annotations

from typing import Any

from rime_fast.cli.command import Command, required
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build


def run(values: dict[str, Any]) -> int:
    """Check each file; 0 when all rows are good, else 1."""
    required(values, "files")
    from rime_fast.data.check_command import CheckOptions, run_check

    options = build(CheckOptions, values)
    try:
        return run_check(options)
    except ValueError as error:
        raise UsageError(str(error)) from error


COMMAND = Command(
    name="data check",
    text="Reads files row by row and names file, row and field of everything that training or evaluation would trip "
    "over: missing or broken images, empty rewrites, missing or doubled <gen_emb>, unknown keys, absurd lengths. Exit "
    "code 0 when every row is good, else 1.",
    examples=(
        ("look", "rime-fast data check pairs.jsonl"),
        ("keep what is good", "rime-fast data check pairs.jsonl --write_good good.jsonl"),
        ("fast, for a script", "rime-fast data check RIME-SFT/*.json --images head --report check.json"),
        (
            "lengths as the trainer will see them",
            "rime-fast data check pairs.jsonl --model Qwen/Qwen2-VL-2B-Instruct --max_length 12288",
        ),
    ),
    run=run,
    groups=(Group("Options", "rime_fast.data.check_command", "CheckOptions"),),
    positional="files",
)
