"""The anchor bank: discriminative embeddings of a whole side of a training set, computed once and mapped into memory.

A bank is one safetensors file: "anchors" [A, D], "ids" [A, K] int64 (what an item is called, for masks of equal ones)
and, in its metadata, fingerprints of the model that made it and of the data it was made from, and a digest of the
tensors. Opening it for another model or other data, or a damaged one, is an error: anchors of a different model give
rewards that look right and mean nothing.

The file is written batch by batch and read through a memory map, whole or one rank's shard, so that a bank larger
than the memory of one process can be made and used.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rime_fast.data.cache import replacing
from rime_fast.ops.checks import describe
from rime_fast.ops.reward.stream import norm_bound

FORMAT = "rime-anchor-bank/1"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class AnchorBank:
    """Anchors of one side of a set, or one rank's part of them.

    anchors: [a, D], unit rows, usually memory-mapped. ids: [a, K] int64. offset: place of the first row in the whole
    bank; total: rows of the whole bank. model, data: fingerprints; side: which side of the pairs ("query", "target").
    digest: of the file's tensors ("" for a bank without a file).
    """

    anchors: Tensor
    ids: Tensor
    offset: int
    total: int
    model: str
    data: str
    side: str
    digest: str = ""

    @classmethod
    def open(
        cls, path: str | Path, *, model: str | None, data: str | None, rank: int = 0, world: int = 1
    ) -> AnchorBank:
        """Map a bank, or the ``rank``-th of ``world`` equal parts of it (sizes differ by at most one row).

        model, data: the fingerprints the bank must have (``model_fingerprint``, ``data_fingerprint``); None leaves
        that unchecked. The parts in rank order are what ``score_rewrites_(group=...)`` takes as a sharded bank. The
        file is read once for its digest.

        Raises FileNotFoundError; ValueError for a file that is no bank, a stale or a damaged bank, or more ranks than
        anchors.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such anchor bank")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 <= rank < world={world}, got {rank}")
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: not an anchor bank: {error}") from None
        with file:
            found = file.metadata() or {}
            if found.get("format") != FORMAT:
                raise ValueError(f"{path}: not an anchor bank of format {FORMAT}, got {found.get('format')!r}")
            for name, expected in (("model", model), ("data", data)):
                if expected is not None and found[name] != expected:
                    raise ValueError(
                        f"{path}: stale anchor bank: its {name} fingerprint is {found[name]}, this run's is "
                        f"{expected}; remove the file and make the bank again"
                    )
            anchors, ids = file.get_tensor("anchors"), file.get_tensor("ids")
        digest = _digest(path)
        if found.get("digest", digest) != digest:  # older banks have none
            raise ValueError(
                f"{path}: damaged anchor bank: its tensors have the digest {digest}, {found['digest']} were written; "
                "remove the file and make the bank again"
            )
        total = anchors.shape[0]
        if world > total:
            raise ValueError(f"{path}: {total} anchors cannot be shared by {world} ranks")
        return cls(anchors, ids, 0, total, found["model"], found["data"], found["side"], digest).shard(rank, world)

    @classmethod
    def make(
        cls,
        path: str | Path,
        items: Sequence[Any],
        encode: Callable[[Sequence[Any]], Tensor],
        ids: Tensor,
        *,
        model: str,
        data: str,
        side: str,
        batch_size: int = 256,
        dtype: torch.dtype = torch.float32,
    ) -> AnchorBank:
        """Encode ``items`` batch by batch into a new file and open it; the file appears when it is complete.

        encode: batch of items -> [n, D] unit rows on any device. ids: [A, K] int64. dtype: what is stored; bf16 halves
        the file, and its rounding shows in the advantages of tight groups (recipe section 4).

        Raises ValueError naming the item whose embedding is not finite or not of unit norm.
        """
        if len(items) == 0 or tuple(ids.shape[:1]) != (len(items),) or ids.dim() != 2 or ids.dtype != torch.int64:
            raise ValueError(f"ids: expected an int64 tensor of shape [{len(items)} > 0, K], got {describe(ids)}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        digest = hashlib.blake2b(_bytes(ids.cpu().contiguous()), digest_size=16)
        metadata = {"format": FORMAT, "model": model, "data": data, "side": side, "digest": "0" * 32}
        with replacing(path, "wb") as file:
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                rows = _checked(encode(batch), len(batch), start).to("cpu", dtype).contiguous()
                if start == 0:
                    head = (len(items), rows.shape[1]), dtype, ids
                    _write_head(file, *head, metadata)
                digest.update(_bytes(rows))
                file.write(_bytes(rows))
            file.seek(0)
            _write_head(file, *head, metadata | {"digest": digest.hexdigest()})  # as long as before
        return cls.open(path, model=model, data=data)

    def shard(self, rank: int, world: int) -> AnchorBank:
        """Give the ``rank``-th of ``world`` equal parts of a whole bank (sizes differ by at most one row); a view.

        Raises ValueError for more ranks than anchors, and for a bank that is a part already.
        """
        if len(self.anchors) != self.total:
            raise ValueError(f"the bank is a part of {len(self.anchors)} of {self.total} anchors; expected a whole one")
        if world > self.total:
            raise ValueError(f"{self.total} anchors cannot be shared by {world} ranks")
        first, last = (self.total * part // world for part in (rank, rank + 1))
        return replace(self, anchors=self.anchors[first:last], ids=self.ids[first:last], offset=first)

    def largest_norm(self) -> Tensor:
        """Measure the longest anchor, [1] fp32, for ``score_rewrites_``: one pass over the rows where they lie."""
        return torch.stack([norm_bound(part) for part in self.anchors.split(1 << 16)]).amax(0)

    def to(self, device: torch.device | str) -> AnchorBank:
        """Read the bank into the memory of ``device``."""
        return replace(self, anchors=self.anchors.to(device), ids=self.ids.to(device))

    def pinned(self) -> AnchorBank:
        """Copy the anchors into page-locked host memory, from which score_rewrites_ streams to a GPU; ids follow by
        ``to``."""
        return replace(self, anchors=self.anchors.pin_memory())


def model_fingerprint(model: torch.nn.Module, frozen: bool = False) -> str:
    """A fingerprint that is equal for models that compute the same: 32 hex digits over every parameter's value and
    name.

    Floating values count as fp32, so a checkpoint has one fingerprint in whatever dtype it is loaded. An adapter
    (peft) that changes nothing yet, its second factor being zero, does not count, and the names are those of the model
    inside. One pass over the parameters where they lie; one read by the host. Parameters must be whole (gathered).

    frozen: count only parameters that are not trained, also those that an adapter keeps of a module it trains whole.
    """
    names, sums = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad if frozen else ".original_module." not in name:
            names.append((name, f"{list(parameter.shape)}"))
            sums.append(_checksum(parameter.detach()))
    if not sums:
        return hashlib.blake2b(digest_size=16).hexdigest()
    numbers = torch.stack([x.to(sums[0].device) for x in sums]).tolist()
    idle = {
        _lora_layer(name)
        for (name, _), number in zip(names, numbers, strict=True)
        if ".lora_B." in name and number == 0
    }
    digest = hashlib.blake2b(digest_size=16)
    for (name, shape), number in zip(names, numbers, strict=True):
        if ".lora_" in name and _lora_layer(name) in idle:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        plain = plain.replace(".modules_to_save.default.", ".").replace("_checkpoint_wrapped_module.", "")
        digest.update(f"{plain} {shape} {number};".encode())
    return digest.hexdigest()


def _lora_layer(name: str) -> str:
    """Of "a.b.lora_A.default.weight": what both factors share."""
    layer, _, rest = name.partition(".lora_")
    return layer + rest.partition(".")[2]


def data_fingerprint(items: Tensor | Iterable[str]) -> str:
    """A fingerprint that is equal for equal items in equal order: a tensor of ids, or any strings that say what an item
    is."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(items, Tensor):
        digest.update(f"{items.dtype} {list(items.shape)};".encode())
        digest.update(_bytes(items.cpu().contiguous()))
    else:
        for item in items:
            text = item.encode()
            digest.update(struct.pack("<Q", len(text)) + text)
    return digest.hexdigest()


def _checksum(values: Tensor, chunk: int = 1 << 24) -> Tensor:
    """Sum of every element's bits times its odd place, modulo 2^64: any changed, moved or swapped element shows.

    Floating values as fp32 (fp64 as it is); zeros of either sign count as 0."""
    flat = values.contiguous().view(-1)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        if part.is_floating_point() and part.element_size() < 8:
            part = part.float()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]
        part = (part + 0 if part.is_floating_point() else part).view(bits).long()  # -0 + 0 is 0
        place = torch.arange(start, start + part.numel(), device=values.device) * 2 + 1
        total += (part * place * 0x9E3779B97F4A7C1).sum()
    return total


def _checked(rows: Tensor, expected: int, start: int) -> Tensor:
    if rows.dim() != 2 or rows.shape[0] != expected:
        raise ValueError(f"encode: expected rows of shape [{expected}, D], got {describe(rows)}")
    norms = torch.linalg.vector_norm(rows.float(), dim=1).cpu()
    bad = ~((norms - 1).abs() < 0.02)  # also true for NaN
    if bool(bad.any()):
        at = int(bad.byte().argmax())
        raise ValueError(f"item {start + at}: expected an embedding of unit norm, got norm {float(norms[at])}")
    return rows


def _write_head(file: BinaryIO, shape: tuple[int, int], dtype: torch.dtype, ids: Tensor, metadata: dict) -> None:
    """The safetensors header, then the ids: the anchors come last, so that they can be appended."""
    n_ids = ids.numel() * 8
    n_anchors = shape[0] * shape[1] * dtype.itemsize
    header = {
        "__metadata__": metadata,
        "ids": {"dtype": "I64", "shape": list(ids.shape), "data_offsets": [0, n_ids]},
        "anchors": {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [n_ids, n_ids + n_anchors]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # the data starts at an aligned place
    file.write(struct.pack("<Q", len(text)) + text)
    file.write(_bytes(ids.cpu().contiguous()))


def _digest(path: Path) -> str:
    """A digest of everything behind the header."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        (head,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + head)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _bytes(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data.cast("B")
