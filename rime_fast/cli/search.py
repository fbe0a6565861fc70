"""``rime-fast search``: the nearest items of a text, a picture, both, or a file of queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rime_fast.cli.command import Command, model_exists, required
from rime_fast.cli.loading import EmbedderOptions, load_embedder
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build
from rime_fast.model.token_names import MODES

if TYPE_CHECKING:
    from rime_fast.data.records import Side
    from rime_fast.eval.embedder import Encoded
    from rime_fast.eval.index import EmbeddingIndex


@dataclass
class SearchOptions:
    """What is sought, and where."""

    index: str = field(metadata={"help": "Folder of `rime-fast index`."})
    text: str | None = field(default=None, metadata={"help": "The query's text."})
    image: list[str] = field(default_factory=list, metadata={"help": "The query's pictures; with --text one query."})
    queries: str | None = field(default=None, metadata={"help": "A file of queries, as for embed; in place of these."})
    k: int = field(default=5, metadata={"help": "How many are found for each."})
    mode: str = field(
        default="disc", metadata={"help": "The query's mode: 'disc', 'latent', or 'gen' (decodes a rewrite)."}
    )
    model: str | None = field(default=None, metadata={"help": "Default: the model that made the index."})
    html: str | None = field(default=None, metadata={"help": "Also write a page with thumbnails to this file."})


def run(values: dict[str, Any]) -> int:
    """Embed the queries, search, show."""
    required(values, "index")
    options = build(SearchOptions, values)
    if options.mode not in MODES:
        raise UsageError(f"--mode is {options.mode!r}; expected {', '.join(MODES)}")
    if options.k < 1:
        raise UsageError(f"--k is {options.k}; expected 1 or more")
    single = options.text is not None or bool(options.image)
    if single == (options.queries is not None):
        raise UsageError("give a query by --text, --image or both, or a file of them by --queries")
    if single and not options.image and not (options.text or "").strip():
        raise UsageError("--text holds no text")
    from rime_fast.data.records import Side
    from rime_fast.eval.index import EmbeddingIndex

    index = EmbeddingIndex.load(options.index)
    template = index.facts.get("template")
    loading = build(EmbedderOptions, ({"template": template} if template else {}) | values)
    model = options.model or index.facts.get("model")
    if not model:
        raise UsageError(f"--index {options.index} names no model; give --model")
    model_exists(model)
    if options.queries:
        from rime_fast.cli.embed import read_items

        sides = read_items(options.queries, loading.image_root, loading.allow_outside)
    else:
        sides = [Side(text=options.text or "", images=list(options.image))]
    made = load_embedder(model, loading).encode_items(sides, options.mode)
    results = _results(index, sides, made, options.k)
    for side, result in zip(sides, results, strict=True):
        pictures = f" [{len(side.images)} image(s)]" if side.images else ""
        rewrite = "" if result["rewrite"] is None else f"  rewrite: {result['rewrite']!r}"
        print(f"{side.text!r}{pictures}  margin {result['margin']:.3f}{rewrite}")
        for place, one in enumerate(result["retrieved"], 1):
            parts = [f"row {one['row']}", f"id {one['id']}" if one["id"] is not None else ""]
            parts += [" ".join(one["text"].split())[:80], *one["paths"]]
            print(f"{place:>3}. {one['score']:7.4f}  {'  '.join(part for part in parts if part)}")
    if options.html:
        facts = {"index": options.index, "rows": len(index), "index mode": index.facts.get("mode")}
        print(f"page: {_page(options.html, sides, results, facts | {'query mode': options.mode, 'model': model})}")
    return 0


def _results(index: EmbeddingIndex, sides: list[Side], made: Encoded, k: int) -> list[dict[str, Any]]:
    """Per query: text, rewrite, margin, and what was found."""
    scores, rows = (part.tolist() for part in index.search(made.embeddings, k))
    margins = index.margins(made.embeddings).tolist()
    results = []
    for i, side in enumerate(sides):
        retrieved = []
        for score, row in zip(scores[i], rows[i], strict=True):
            if row < 0:  # FAISS looked at fewer than k
                break
            item = index.items[row] if index.items else {}
            known = {"text": item.get("text") or "", "id": item.get("id"), "paths": item.get("images", [])}
            retrieved.append({"row": row, "score": score} | known)
        rewrite = made.rewrites[i] if made.rewrites else None
        results.append({"text": side.text, "rewrite": rewrite, "margin": margins[i], "retrieved": retrieved})
    return results


def _page(path: str, sides: list[Side], results: list[dict[str, Any]], facts: dict[str, Any]) -> Any:
    from rime_fast.data.records import Side
    from rime_fast.eval.search_page import write_search_page
    from rime_fast.eval.thumbnails import thumbnails

    for side, result in zip(sides, results, strict=True):
        result["images"] = thumbnails(side)
        for one in result["retrieved"]:
            one["images"] = thumbnails(Side(images=one["paths"][:1]))
            one["text"] = one["text"] or ("" if one["id"] is None else f"id {one['id']}")
    return write_search_page(path, results, facts)


COMMAND = Command(
    name="search",
    text="Embeds a query as the index's items were embedded and shows the nearest: on the terminal, and as a page with "
    "thumbnails. The margin is the first place's score less the second's: small means unsure.",
    examples=(
        ("by text", 'rime-fast search runs/index --text "a red shoe"'),
        (
            "by a picture and a text, as a page",
            "rime-fast search runs/index --image shoe.png --text 'in blue' --html runs/found.html",
        ),
        ("a file of queries, with rewrites", "rime-fast search runs/index --queries queries.jsonl --mode gen --k 10"),
    ),
    run=run,
    groups=(
        Group("What", "rime_fast.cli.search", "SearchOptions"),
        Group("How", "rime_fast.cli.loading", "EmbedderOptions"),
    ),
    positional="index",
)
