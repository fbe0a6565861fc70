"""The model card beside every saved model: how it was trained, on what, with which results, and how to use it.

Trainers write it with each save, ``rime-fast export`` again from the same facts: ``rime_training.json`` (all settings,
readable by people and programs) and ``README.md`` (the card, with the header that model hubs read).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

FACTS = "rime_training.json"
_TABLES = (("settings", "Recipe"), ("data", "Data"), ("results", "Results"))
_OURS = """from rime_fast import RimeEmbedder

embedder = RimeEmbedder.from_pretrained("{name}"{template})
d = embedder.encode([{{"text": "Find this animal.", "image": "cat.png"}}])  # one prefill
g, rewrites = embedder.encode(["a tabby cat"], mode="gen", return_rewrites=True)"""
_SENTENCE_TRANSFORMERS = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")  # needs torchvision
d = model.encode(["a tabby cat", {{"text": "Find this animal.", "image": "cat.png"}}])"""
_VLLM = """vllm serve {name} --runner pooling \\
  --chat-template {name}/additional_chat_templates/sentence_transformers.jinja"""


def write_card(directory: str | Path, facts: Mapping[str, Any], *, exported: bool = False) -> None:
    """Write ``rime_training.json`` and ``README.md`` into ``directory``.

    facts (all optional): "title", "base_model", "template", "matryoshka_dimensions", "int8_step", "step",
    "epoch", and three mappings of names to plain values: "settings", "data" (rows of each set), "results". exported:
    the folder is one that sentence-transformers and vLLM read; the card says how.
    """
    directory = Path(directory)
    (directory / FACTS).write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    card = _card(directory.resolve().name, facts, exported)
    (directory / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # names from outside


def read_facts(directory: str | Path) -> dict[str, Any]:
    """The facts that ``write_card`` left in a folder; {} where there are none."""
    path = Path(directory, FACTS)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _card(name: str, facts: Mapping[str, Any], exported: bool) -> str:
    base = facts.get("base_model")
    header = ["library_name: sentence-transformers" if exported else "library_name: transformers"]
    header += [f"base_model: {json.dumps(base)}"] if base and not Path(base).exists() else []
    header += ["pipeline_tag: feature-extraction", "tags: [rime-fast, multimodal-embedding, feature-extraction]"]
    lines = ["---", *header, "---", "", f"# {name}", ""]
    lines.append(
        "A dual-mode multimodal embedding model: `d` from one prefill, read at `<disc_emb>`; `g` after a short "
        "rewrite, read at `<gen_emb>`. Any query mode searches any target mode. Trained with rime-fast."
    )
    about = [
        f"{label}: {facts[key]}"
        for key, label in (
            ("title", "Last phase"),
            ("base_model", "Started from"),
            ("template", "Template"),
            ("matryoshka_dimensions", "Matryoshka dimensions"),
            ("int8_step", "Step of int8 embeddings"),
            ("step", "Steps"),
            ("epoch", "Epochs"),
        )
        if facts.get(key) not in (None, "", [])
    ]
    lines += ["", *(f"- {line}" for line in about), "", "## Use", ""]
    template = facts.get("template", "rewrite")
    given = "" if template == "rewrite" else f', template="{template}"'
    lines += ["```python", _OURS.format(name=name, template=given), "```", ""]
    if exported:
        lines += ["Mode `d` elsewhere, the same vectors:", "", "```python", _SENTENCE_TRANSFORMERS.format(name=name)]
        lines += ["```", "", "```bash", _VLLM.format(name=name), "```", ""]
    for key, title in _TABLES:
        if facts.get(key):
            lines += [f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {_cell(k)} | {_cell(v)} |" for k, v in facts[key].items()] + [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
