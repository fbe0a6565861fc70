"""The documents: links lead somewhere, code names what exists, every public name is described.

That code and commands on the pages work is held by test_docs_run.py.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import rime_fast

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"```python[^\n]*\n(.*?)```", re.S)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives the page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not fragment or fragment in anchors(file), f"{page.name}: {target}"


def test_readme_leads_to_every_page():
    linked = set(LINK.findall((ROOT / "README.md").read_text()))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked


def blocks() -> list[Any]:
    found = []
    for page in PAGES:
        for i, text in enumerate(BLOCK.findall(page.read_text())):
            found.append(pytest.param(text, id=f"{page.stem}-{i}"))
    return found


@pytest.mark.parametrize("text", blocks())
def test_python_blocks_name_things_that_exist(text):
    """They compile, and what they import from rime_fast is there, with the keyword arguments they give."""
    tree = ast.parse(text)
    names: dict[str, Any] = {"rime_fast": rime_fast}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rime_fast"):
            module = importlib.import_module(node.module or "")
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert hasattr(names[node.value.id], node.attr), ast.unparse(node)


def test_every_public_name_is_on_the_page_of_the_interface():
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in rime_fast.__all__ if name != "__version__" and f"`{name}" not in text]
    assert not missing


SHOWN = ["fused_logprob_pool", "contrastive_loss", "score_rewrites_", "RimeEmbedder"]
SHOWN += ["rewrite_rows", "mine_negatives", "MixtureSampler"]


@pytest.mark.parametrize("name", SHOWN)
def test_signatures_on_the_page_are_those_of_the_code(name):
    import inspect

    text = (ROOT / "docs" / "api.md").read_text()
    shown = re.search(rf"`{name}\((.*?)\)( ->|`)", text, re.S)
    assert shown
    told = re.findall(r"(\w+)(?:=[^,]*(?:\(\))?)?(?:,|$)", " ".join(shown[1].split()))
    assert [one for one in told if one] == list(inspect.signature(getattr(rime_fast, name)).parameters)
