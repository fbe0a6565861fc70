"""The JSON of a benchmark run: read, checked, merged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rime_fast.bench.harness import SCHEMA, Row, Skipped


@dataclass
class Stored:
    """What one file holds."""

    path: Path
    environment: dict[str, Any]
    rows: list[Row]
    skipped: list[Skipped]

    def case(self, bench: str, case: str) -> dict[str, Row]:
        """impl -> row of one case."""
        return {row.impl: row for row in self.rows if (row.bench, row.case) == (bench, case)}


def load(path: Path) -> Stored:
    """Raises ValueError naming the file and what is wrong in it; OSError where it cannot be read."""
    try:
        body = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        found = body.get("schema") if isinstance(body, dict) else type(body).__name__
        raise ValueError(f"{path}: expected benchmark results of schema {SCHEMA}, got {found}")
    try:
        rows = [_as(Row, row) for row in body["rows"]]
        skipped = [_as(Skipped, row) for row in body["skipped"]]
        return Stored(path, dict(body["environment"]), rows, skipped)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a row or part is missing or malformed ({error})") from error


def _as(cls: type, values: dict[str, Any]) -> Any:
    known = {field.name for field in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in known})


def merge(paths: Sequence[Path], into: Path) -> None:
    """One file of several runs on one machine: the first one's environment, everybody's rows."""
    bodies = [json.loads(path.read_text()) for path in paths]
    merged = bodies[0] | {key: [row for body in bodies for row in body[key]] for key in ("rows", "skipped")}
    into.write_text(json.dumps(merged, indent=1) + "\n")
