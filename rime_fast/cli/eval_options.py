"""Options that every form of ``rime-fast eval`` shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rime_fast.cli.options import UsageError


@dataclass
class EvalOptions:
    """What is evaluated on what."""

    model: list[str] = field(metadata={"help": "Directories or hub names; several are compared in one report."})
    data: str | None = field(
        default=None, metadata={"help": "A retrieval set (docs/data.md): shared candidates (JSON) or lists (JSONL)."}
    )
    mteb: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of mteb by name instead of --data (extra mteb; --download)."}
    )
    output_dir: str = field(default="runs/eval", metadata={"help": "Folder of report.json and report.html."})
    modes: list[str] = field(
        default_factory=list, metadata={"help": "'disc', 'gen', 'latent'; default: all of the model's."}
    )
    dims: list[str] = field(
        default_factory=list,
        metadata={"help": "Also score embeddings cut, or rounded to int8: 64,256,int8,full (full always is)."},
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first so many queries."})
    top_k: int = field(default=5, metadata={"help": "Candidates shown per example."})
    examples: int = field(default=24, metadata={"help": "Examples in the report, evenly spaced over the queries."})
    title: str | None = field(default=None, metadata={"help": "Title of the report."})

    def int8(self) -> bool:
        """Whether ``dims`` names int8."""
        return "int8" in split(self.dims)

    def widths(self) -> list[int]:
        """The widths of ``dims``, ascending, without the whole, which is always scored, and int8."""
        words = [one for one in split(self.dims) if one not in ("full", "int8")]
        if not all(word.isdigit() and int(word) > 0 for word in words):
            raise UsageError(f"--dims is {','.join(self.dims)!r}; expected widths from 1, 'int8' or 'full'")
        return sorted({int(word) for word in words})


def split(words: Sequence[str]) -> list[str]:
    """Words that may be joined by commas."""
    return [part for word in words for part in word.split(",") if part]
