"""``rime-fast export``: a folder for sentence-transformers and vLLM, and whether another engine makes our vectors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rime_fast.cli.command import Command, model_exists
from rime_fast.cli.loading import EmbedderOptions, load_embedder
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build

NEXT = {
    "sentence-transformers": 'SentenceTransformer("{folder}")',
    "vllm": "vllm serve {folder} --runner pooling \\\n"
    "  --chat-template {folder}/additional_chat_templates/sentence_transformers.jinja",
}


@dataclass
class ExportOptions:
    """What is exported, or compared."""

    model: str | None = field(default=None, metadata={"help": "Directory or hub name; an adapter's is merged."})
    to: str = field(
        default="sentence-transformers",
        metadata={"help": "'sentence-transformers' or 'vllm': one folder serves both; this chooses the closing hint."},
    )
    output_dir: str = field(default="runs/export", metadata={"help": "The folder that is written."})
    dims: list[int] = field(
        default_factory=list,
        metadata={"help": "Matryoshka dimensions to announce; default: those of the model's configuration."},
    )
    report: str | None = field(
        default=None, metadata={"help": "A report.json of `rime-fast eval`: its figures go on the model card."}
    )
    check: list[str] = field(
        default_factory=list,
        metadata={
            "help": "FOLDER FILE: embed FILE's items by sentence-transformers (without torchvision: by stock "
            "transformers) from FOLDER and by us, print the largest difference. In place of FOLDER a server's URL up "
            "to /v1 (ours, vLLM), with the model's directory before."
        },
    )
    tolerance: float = field(default=1e-4, metadata={"help": "--check: exit code 1 above this difference."})


def run(values: dict[str, Any]) -> int:
    """Export, or check."""
    options, loading = build(ExportOptions, values), build(EmbedderOptions, values)
    if options.to not in NEXT:
        raise UsageError(f"--to is {options.to!r}; expected {' or '.join(NEXT)}")
    if options.check:
        return _check(options, loading)
    if not options.model:
        raise UsageError("--model is required")
    model_exists(options.model)
    from rime_fast.cli.bars import quiet
    from rime_fast.serve.export import export_model

    quiet()
    folder = export_model(
        options.model,
        options.output_dir,
        template=loading.template,
        dims=options.dims or None,
        results=_results(options.report) if options.report else None,
    )
    print(f"written: {folder}\n{NEXT[options.to].format(folder=folder)}")
    print(f"compare: rime-fast export --check {folder} items.jsonl")
    return 0


def _check(options: ExportOptions, loading: EmbedderOptions) -> int:
    if len(options.check) != 2:
        raise UsageError(f"--check has {len(options.check)} values; expected FOLDER FILE, or URL FILE")
    target, file = options.check
    remote = target.startswith(("http://", "https://"))
    if remote and not options.model:
        raise UsageError("--check with a server needs the directory of its model: rime-fast export MODEL --check ...")
    from rime_fast.cli.embed import read_items
    from rime_fast.serve.parity import differences, folder_embeddings, server_embeddings, stock_embeddings

    sides = read_items(file, loading.image_root, loading.allow_outside)
    reference = load_embedder(options.model or target, loading).encode(sides)
    if remote:
        engine, found = target, server_embeddings(target, sides)
    elif find_spec("sentence_transformers") and find_spec("torchvision"):
        engine, found = "sentence-transformers", folder_embeddings(target, sides)
    else:  # stock Qwen processors need torchvision
        engine, found = "stock transformers (no torchvision for sentence-transformers)", stock_embeddings(target, sides)
    largest = differences(reference, found, sides)
    for kind, value in largest.items():
        print(f"{kind:<6} {value:.2e}")
    within = largest["all"] <= options.tolerance
    verdict = "equal" if within else "DIFFERENT"
    print(f"{len(sides)} items by {engine}, largest difference {largest['all']:.2e}: {verdict}")
    return 0 if within else 1


def _results(path: str) -> dict[str, float]:
    """The cells of the last model in a report of ``rime-fast eval``: "disc-disc hit@1" and the like."""
    try:
        phases = json.loads(Path(path).read_text(encoding="utf-8")).get("phases", [])
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"--report {path}: {error}") from None
    cells = next((phase["mutual"]["cells"] for phase in reversed(phases) if phase.get("mutual")), None)
    if cells is None:
        raise UsageError(f"--report {path} holds no evaluation; expected report.json of `rime-fast eval`")
    names = ("hit@1", "mrr", "ndcg@10")
    return {f"{cell} {name}": row[name] for cell, row in cells.items() for name in names if name in row}


COMMAND = Command(
    name="export",
    text="Writes one folder that stock transformers, sentence-transformers and vLLM load: weights (a LoRA merged in), "
    "every part of the processor, sentence-transformers' modules, a chat template that ends at <disc_emb> beside the "
    "one for generation, and a model card. Their embedding is mode disc, exactly. --check compares another engine's "
    "vectors with ours.",
    examples=(
        ("a folder for both", "rime-fast export runs/refine --to sentence-transformers --output_dir runs/export"),
        ("with Matryoshka dimensions", "rime-fast export runs/refine --to vllm --dims 64 256 --output_dir runs/export"),
        ("the largest difference over a file of items", "rime-fast export --check runs/export items.jsonl"),
        ("a server beside us", "rime-fast export runs/export --check http://localhost:8000/v1 items.jsonl"),
    ),
    run=run,
    groups=(
        Group("What", "rime_fast.cli.export", "ExportOptions"),
        Group("How", "rime_fast.cli.loading", "EmbedderOptions"),
    ),
    positional="model",
)
