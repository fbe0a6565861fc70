"""``rime-fast embed``: embeddings of a file of items, as safetensors, with a JSONL of ids and rewrites."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rime_fast.cli.command import Command, model_exists, required
from rime_fast.cli.loading import EmbedderOptions, load_embedder
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build
from rime_fast.model.token_names import MODES

if TYPE_CHECKING:
    from rime_fast.data.records import Side
    from rime_fast.eval.embedder import Encoded


@dataclass
class EmbedOptions:
    """What is embedded, and where it goes."""

    model: str = field(metadata={"help": "Directory or hub name."})
    data: str = field(metadata={"help": "JSON or JSONL of items {text, image(s), video, id}, or .txt: a text a line."})
    output_dir: str = field(
        default="runs/embeddings", metadata={"help": "Folder of embeddings.safetensors and items.jsonl."}
    )
    mode: str = field(
        default="disc",
        metadata={"help": "'disc' (one prefill), 'gen' (decodes a rewrite), 'both', or 'latent' (one prefill)."},
    )
    reasoner: str | None = field(
        default=None,
        metadata={
            "help": "Mode gen by two models (Think-Then-Embed): this one writes the rewrites, --model embeds them. "
            "'data': the items' own field `rewrite`."
        },
    )
    dims: int | None = field(
        default=None, metadata={"help": "Keep the first so many numbers, normalised again (Matryoshka)."}
    )
    precision: str = field(
        default="float32",
        metadata={"help": "'float32', or 'int8' of a model trained with int8_weight: compare by cosine. [ours]"},
    )
    anchors: str | None = field(
        default=None,
        metadata={
            "help": "'query', 'target' or 'both': --data is a file of training pairs; write the anchor bank of these "
            "sides for `rime-fast refine --anchor_bank`."
        },
    )


def run(values: dict[str, Any]) -> int:
    """Embed and write."""
    required(values, "model", "data")
    options, loading = build(EmbedOptions, values), build(EmbedderOptions, values)
    if options.mode not in (*MODES, "both"):
        raise UsageError(f"--mode is {options.mode!r}; expected {', '.join(MODES)}, both")
    if options.precision not in ("float32", "int8"):
        raise UsageError(f"--precision is {options.precision!r}; expected float32, int8")
    model_exists(options.model)
    if options.reasoner is not None:
        if options.mode != "gen" or options.anchors is not None:
            raise UsageError("--reasoner goes with --mode gen, and without --anchors")
        if options.reasoner != "data":
            model_exists(options.reasoner)
    if options.anchors is not None:
        if options.dims is not None:
            raise UsageError("--dims goes without --anchors: a bank is whole, and refine --anchor_dims cuts it")
        if options.precision != "float32":
            raise UsageError("--precision goes without --anchors: a bank is float32")
        from rime_fast.cli.embed_anchors import embed_anchors

        return embed_anchors(options.model, options.data, options.output_dir, options.anchors, loading)
    from safetensors.torch import save_file

    from rime_fast.cli.bars import bars
    from rime_fast.data.sources import write_rows
    from rime_fast.engine.checkpoint import check_writable
    from rime_fast.engine.wrappers import dual_mode_of
    from rime_fast.eval.index import truncated
    from rime_fast.eval.think import embed_thought
    from rime_fast.recipe.int8 import to_int8, trained_step

    items = read_items(options.data, loading.image_root, loading.allow_outside)
    if (Path(options.output_dir) / "index.json").exists():
        raise UsageError(f"--output_dir {options.output_dir} holds an index, whose items.jsonl would be written over")
    check_writable(options.output_dir)
    thought = None if options.reasoner is None else _reasoned(options.reasoner, items, options.data, loading)
    embedder = load_embedder(options.model, loading)
    if options.dims is not None:
        embedder.check_widths([options.dims])
    step = trained_step(dual_mode_of(embedder.model).config) if options.precision == "int8" else None
    with bars() as progress:
        if thought is None:
            one = embedder.encode_items(items, options.mode, progress=partial(progress, options.mode))
        else:
            one = embed_thought(embedder, items, thought)
    encoded = {"disc": one.without_decoding(), "gen": one} if options.mode == "both" else {options.mode: one}
    directory = Path(options.output_dir)
    lines: list[dict[str, Any]] = []
    for row, item in enumerate(items):
        line: dict[str, Any] = {"row": row, "id": item.id}
        if "gen" in encoded:
            gen = encoded["gen"]
            assert gen.rewrites is not None
            line |= {"rewrite": gen.rewrites[row], "tokens": gen.tokens[row], "reached_gen_emb": gen.reached[row]}
        lines.append(line)
    metadata = {"model": options.model, "data": options.data, "template": loading.template}
    metadata["items"] = items_digest(items)
    if step is None:
        tensors = {mode: truncated(one.embeddings, options.dims) for mode, one in encoded.items()}
    else:
        tensors = {mode: to_int8(one.embeddings[:, : options.dims], step) for mode, one in encoded.items()}
        metadata["int8_step"] = repr(step)
    save_file(tensors, str(directory / "embeddings.safetensors"), metadata=metadata)
    write_rows(directory / "items.jsonl", lines)
    for mode, one in encoded.items():
        shape = " x ".join(map(str, tensors[mode].shape))
        cost = f"{one.seconds / len(items):.4f} s and {one.mean_tokens:.1f} decoded tokens an item"
        print(f"{mode}: {shape} {options.precision}, {cost}")
    if embedder.stats.missing_gen:
        print(
            f"{embedder.stats.missing_gen} generations never reached <gen_emb>: reached_gen_emb is false in items.jsonl"
        )
    print(f"written: {directory / 'embeddings.safetensors'}, {directory / 'items.jsonl'}")
    return 0


def _reasoned(reasoner: str, items: list[Side], path: str, loading: EmbedderOptions) -> Encoded:
    """What the reasoner says of every item; its model is gone afterwards."""
    from rime_fast.eval.think import given_rewrites

    if reasoner == "data":
        if missing := [item.name for item in items if item.rewrite is None]:
            raise UsageError(f"--reasoner data: {missing[0]} of {path} has no rewrite")
        return given_rewrites([item.rewrite or "" for item in items])
    from rime_fast.cli.bars import bars

    with bars() as progress:
        return load_embedder(reasoner, loading).encode_items(items, "gen", progress=partial(progress, "reasoner"))


def read_items(path: str, image_root: str | None, allow_outside: bool = False) -> list[Side]:
    """The items of a file: of a .txt its lines (a byte order mark is none of the text, ``\\n`` or ``\\r\\n`` ends a
    line), else sides, in whatever ``open_rows`` opens. Raises DataError naming file, row and field of what is wrong."""
    from rime_fast.data.images import ImageRoot
    from rime_fast.data.records import DataError, Problem, Side, side_from_json
    from rime_fast.data.sources import open_rows
    from rime_fast.data.texts import reject_half_surrogates, task_texts

    if path.endswith(".txt"):
        try:
            texts = re.split("\r?\n", Path(path).read_bytes().decode("utf-8-sig"))
        except OSError as error:
            raise UsageError(f"--data {path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"--data {path} is not UTF-8 (byte {error.start})") from None
        items = [Side(text=text, id=str(i)) for i, text in enumerate(texts, 1) if text.strip()]
        if not items:
            raise UsageError(f"--data {path} holds no text")
        return items
    rows = open_rows(path)
    root = ImageRoot(image_root or str(Path(path).parent), allow_outside)
    items, problems = [], [rows.problem] if rows.problem is not None else []
    for row in rows.between(0, len(rows)):
        found: list[tuple[str, str]] = [("", row.error)] if row.error else []
        if not found:
            items.append(side_from_json(row.value, "", root, found))
            for where, text in task_texts(items[-1], ""):
                reject_half_surrogates(text, where, found)
        problems += [Problem(path, row.number, field.lstrip("."), problem) for field, problem in found]
    if problems:
        raise DataError(problems)
    if not items:
        raise UsageError(f"--data {path} holds no items")
    return items


def items_digest(items: Sequence[Side]) -> str:
    """A digest of the items' ids and texts in their order: an index must show what was embedded."""
    told = repr([(item.id, item.text) for item in items]).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(told, digest_size=16).hexdigest()


COMMAND = Command(
    name="embed",
    text="Embeds every item of a file. embeddings.safetensors holds a float32 [items, D] matrix of unit rows per mode, "
    "under the mode's name and in the file's order; items.jsonl one line an item: row, id and, in mode gen, rewrite, "
    "decoded tokens and whether <gen_emb> was reached. With --anchors: anchors-query.safetensors, "
    "anchors-target.safetensors, anchor banks that know their model and data.",
    examples=(
        (
            "an index of cheap embeddings",
            "rime-fast embed --model runs/sft --data catalogue.jsonl --output_dir runs/embedded",
        ),
        (
            "Matryoshka embeddings of 256 numbers",
            "rime-fast embed --model runs/sft --data catalogue.jsonl --dims 256 --output_dir runs/embedded",
        ),
        (
            "a quarter of the bytes, after training with int8_weight",
            "rime-fast embed --model runs/sft --data catalogue.jsonl --precision int8 --output_dir runs/embedded",
        ),
        ("generative queries against it", "rime-fast embed --model runs/sft --data queries.txt --mode gen"),
        (
            "anchors of Refine-RL, made once for several runs",
            "rime-fast embed --model runs/sft --data pairs.jsonl --anchors both --output_dir runs/anchors",
        ),
    ),
    run=run,
    groups=(
        Group("What", "rime_fast.cli.embed", "EmbedOptions"),
        Group("How", "rime_fast.cli.loading", "EmbedderOptions"),
    ),
)
