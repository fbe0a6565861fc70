"""Embeddings of a task on disk, in chunks: the unit of work, of batching, of sharing between processes, of resuming.

A side's items have one fixed order, the longest first, and are cut into chunks of 256. A chunk's batches are made of
its own items alone, so its bits are the same whichever process makes it, and whenever. Chunks take their name once they
are complete; a process takes one by making its lock file, and another's once the owner is gone.

    OUT/<suite>/<task>/meta.json                              what the embeddings depend on
    OUT/<suite>/<task>/<qry|tgt>-<disc|gen>.<chunk>.safetensors   embedding [n, D] fp32, index [n]; gen: disc [n, D] too
    OUT/<suite>/<task>/....<chunk>.jsonl                      name, rewrite, tokens, reached, well_formed of each row
    OUT/<suite>/<task>/....<chunk>.cost.json                  seconds and peak memory, which no two runs share
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from rime_fast.data.cache import replacing
from rime_fast.data.records import Side

if TYPE_CHECKING:
    from rime_fast.eval.embedder import Encoded

CHUNK = 256
STALE = 900.0  # seconds without a sign of life after which a lock of another machine is taken over


@dataclass
class Stored:
    """A side's embeddings and counts as they were stored, in the items' order. disc: of mode gen, from the same
    prefill."""

    embedding: torch.Tensor
    disc: torch.Tensor | None
    rewrites: list[str]
    tokens: list[int]
    reached: list[bool]
    well_formed: list[bool]
    seconds: float
    disc_seconds: float


@dataclass(frozen=True)
class SideCache:
    """The chunks of one side of one task in one mode. mode: "disc", "gen" or "latent"; size: items in all."""

    folder: Path
    side: str
    mode: str
    size: int

    @property
    def chunks(self) -> range:
        return range(-(-self.size // CHUNK))

    def file(self, chunk: int, end: str = "safetensors") -> Path:
        return self.folder / f"{self.side}-{self.mode}.{chunk:05d}.{end}"

    def missing(self) -> list[int]:
        """The chunks that are not there yet."""
        return [chunk for chunk in self.chunks if not self.file(chunk).exists()]

    def write(self, chunk: int, index: Sequence[int], names: Sequence[str], made: Encoded, memory: int) -> None:
        """Store a chunk; the tensors come last, for their file says that the chunk is done."""
        rows = zip(names, made.rewrites or [""] * len(index), made.tokens, made.reached, made.well_formed, strict=True)
        keys = ("name", "rewrite", "tokens", "reached", "well_formed")
        lines = [json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) for row in rows]
        write_text(self.file(chunk, "jsonl"), "\n".join(lines) + "\n")
        cost = {"seconds": made.seconds, "disc_seconds": made.disc_seconds, "peak_memory_bytes": memory}
        write_text(self.file(chunk, "cost.json"), json.dumps(cost))
        tensors = {"embedding": made.embeddings.float().contiguous(), "index": torch.tensor(index)}
        if made.disc is not None:
            tensors["disc"] = made.disc.float().contiguous().clone()  # one file may not hold memory twice
        with replacing(self.file(chunk), "wb") as stream:
            stream.write(save(tensors))

    def read(self) -> Stored:
        """Read all chunks, put back into the items' order."""
        parts = [load_file(str(self.file(chunk))) for chunk in self.chunks]
        order = torch.cat([part["index"] for part in parts]).argsort()
        rows = [
            json.loads(line)
            for chunk in self.chunks
            for line in self.file(chunk, "jsonl").read_text(encoding="utf-8").split("\n")
            if line
        ]
        rows = [rows[i] for i in order.tolist()]
        costs = [json.loads(self.file(chunk, "cost.json").read_text()) for chunk in self.chunks]
        return Stored(
            embedding=torch.cat([part["embedding"] for part in parts])[order],
            disc=torch.cat([part["disc"] for part in parts])[order] if "disc" in parts[0] else None,
            rewrites=[row["rewrite"] for row in rows],
            tokens=[row["tokens"] for row in rows],
            reached=[row["reached"] for row in rows],
            well_formed=[row["well_formed"] for row in rows],
            seconds=sum(cost["seconds"] for cost in costs),
            disc_seconds=sum(cost["disc_seconds"] for cost in costs),
        )

    @contextmanager
    def taken(self, chunk: int) -> Iterator[Lock | None]:
        """Take the chunk's lock; None where another process has it or has done the chunk."""
        lock = Lock(self.file(chunk, "lock"))
        if not lock.take():
            yield None
            return
        try:
            yield None if self.file(chunk).exists() else lock
        finally:
            lock.file.unlink(missing_ok=True)


@dataclass
class Lock:
    """A file that says who is at work. One left by a process that ended, or that shows no life, is taken over: two
    processes that do so at once write the same chunk twice, with the same bits."""

    file: Path

    def take(self) -> bool:
        for _ in range(2):
            try:
                handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if not self.stale():
                    return False
                self.file.unlink(missing_ok=True)
                continue
            with os.fdopen(handle, "w") as stream:
                stream.write(f"{socket.gethostname()} {os.getpid()}")
            return True
        return False

    def stale(self) -> bool:
        """Whether the owner is gone."""
        try:
            host, _, pid = self.file.read_text().partition(" ")
            age = time.time() - self.file.stat().st_mtime
        except FileNotFoundError:
            return True
        if host == socket.gethostname() and pid.isdigit():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        return age > STALE

    def alive(self) -> None:
        """Show other processes that this one is at work."""
        os.utime(self.file)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as stream:
        stream.write(text)


# --- what embeddings depend on ---------------------------------------------------------------------------------------


def check_meta(folder: Path, meta: Mapping[str, Any], gen: Mapping[str, Any] | None) -> None:
    """Write meta.json, or compare it with the one that is there.

    gen: what generated embeddings depend on besides; recorded by the first run that generates. Raises ValueError
    naming the first field that differs.
    """
    file = folder / "meta.json"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps({**meta, "gen": gen}))
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        wanted["gen"] = wanted["gen"] or found["gen"]
        for key in sorted(wanted.keys() | found.keys(), key=lambda key: (key == "gen", key)):
            old, new = found.get(key), wanted.get(key)
            if old != new and not (key == "gen" and old is None):
                raise ValueError(
                    f"{folder} holds embeddings made with {key} {_short(old)}; this run has {_short(new)}. "
                    "Use another output_dir, or overwrite=True (--overwrite) to make them again"
                )
        if wanted == found:
            return
    write_text(file, json.dumps(wanted, indent=1))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def data_hash(sides: Sequence[Side]) -> str:
    """A digest of texts and of the pictures' places (or sizes, of pictures without a place)."""
    digest = hashlib.blake2b(digest_size=12)
    for side in sides:
        digest.update(f"\0{side.id}\0{side.text}".encode("utf-8", "surrogatepass"))
        for source in (*side.images, "|", *(side.video or ())):
            place = source["path"] if isinstance(source, dict) else source
            digest.update(repr(place if isinstance(place, str) else getattr(place, "size", place)).encode())
    return digest.hexdigest()
