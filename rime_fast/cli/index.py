"""``rime-fast index``: a folder to search in, from what ``rime-fast embed`` wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_fast.cli.command import Command, required
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build


@dataclass
class IndexOptions:
    """Which embeddings, and how they are searched."""

    embeddings: str = field(metadata={"help": "Folder of `rime-fast embed`."})
    output_dir: str = field(default="runs/index", metadata={"help": "Folder that is written."})
    mode: str | None = field(
        default=None, metadata={"help": "'disc' or 'gen', where the folder has both; default: disc. Auto needs disc."}
    )
    dims: int | None = field(default=None, metadata={"help": "Keep the first so many dimensions (Matryoshka)."})
    faiss: str | None = field(
        default=None,
        metadata={"help": "FAISS factory, such as HNSW32 or IVF4096,Flat; default: exact search, nothing needed."},
    )
    data: str | None = field(
        default=None, metadata={"help": "The items' file, for texts and pictures; default: the one that was embedded."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder of relative image paths, as in embed."})
    allow_outside: bool = field(default=False, metadata={"help": "Images outside image_root may be read, as in embed."})


def run(values: dict[str, Any]) -> int:
    """Read, build, write."""
    required(values, "embeddings")
    options = build(IndexOptions, values)
    folder = Path(options.embeddings)
    file = folder / "embeddings.safetensors"
    if not file.is_file():
        raise UsageError(f"--embeddings {folder} holds no embeddings.safetensors; expected a folder of rime-fast embed")
    from safetensors import safe_open

    from rime_fast.eval.index import EmbeddingIndex, read_lines, reading, truncated

    with reading(file), safe_open(str(file), "pt") as stored:
        metadata, names = stored.metadata() or {}, list(stored.keys())
        mode = options.mode or ("disc" if "disc" in names else names[0])
        if mode not in names:
            raise UsageError(f"--mode is {mode!r}; {file} holds {', '.join(names)}")
        rows = stored.get_tensor(mode)
    rows = truncated(rows, options.dims)
    items = read_lines(folder / "items.jsonl")
    if len(items) != len(rows):
        raise UsageError(f"{folder}: items.jsonl has {len(items)} lines; embeddings.safetensors has {len(rows)} rows")
    data = options.data or metadata.get("data", "")
    if data and Path(data).exists():
        shown = _shown(data, options, len(items), metadata.get("items"))
        items = [item | one for item, one in zip(items, shown, strict=True)]
    elif options.data:
        raise UsageError(f"--data {data}: no such file")
    else:
        print(f"the embedded file {data!r} is not here: results will show ids only (--data names it)")
    facts = {"mode": mode, **{key: metadata.get(key) for key in ("model", "template", "data")}}
    index = EmbeddingIndex(rows, items=items, facts=facts, faiss=options.faiss)
    index.save(options.output_dir)
    kind = f"FAISS {options.faiss}" if options.faiss else "exact"
    print(f"{len(index)} {mode} rows of {rows.shape[1]} dimensions, {kind}: {options.output_dir}")
    return 0


def _shown(data: str, options: IndexOptions, count: int, digest: str | None) -> list[dict[str, Any]]:
    """Text and pictures (absolute paths) of each item. digest: of the items that were embedded (``items_digest``)."""
    from rime_fast.cli.embed import items_digest, read_items

    sides = read_items(data, options.image_root, options.allow_outside)
    if len(sides) != count:
        raise UsageError(f"--data {data} has {len(sides)} items; the embeddings have {count}")
    if options.data is None and digest not in (None, items_digest(sides)):
        raise UsageError(f"{data} has changed since it was embedded; embed it again, or name the items by --data")
    shown = []
    for side in sides:
        frames = side.video[:1] if side.video and not isinstance(side.video, (str, os.PathLike)) else []
        paths = [source for source in (*side.images, *frames) if isinstance(source, (str, os.PathLike))]
        shown.append({"text": side.text, "images": [os.path.abspath(path) for path in paths]})
    return shown


COMMAND = Command(
    name="index",
    text="Builds an index from the embeddings of `rime-fast embed`: exact search by default, or any FAISS index. "
    "`rime-fast search` queries it; `rime-fast serve --index` takes margins from it (mode auto).",
    examples=(
        (
            "exact, from what rime-fast embed wrote",
            "rime-fast index runs/embedded --output_dir runs/index",
        ),
        ("approximate, for many items, on fewer dimensions", "rime-fast index runs/embedded --faiss HNSW32 --dims 256"),
    ),
    run=run,
    groups=(Group("Options", "rime_fast.cli.index", "IndexOptions"),),
    positional="embeddings",
)
