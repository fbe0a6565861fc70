"""The house rules that a machine can check: import floors, public names, file length."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rime_fast

PACKAGE = Path(rime_fast.__file__).parent
# Floors from the ground up; a module may import its own folder and anything below.
FLOORS = {"ops": 0, "model": 1, "data": 2, "engine": 2, "recipe": 2}
FLOORS |= {"integrations": 3, "trainers": 3, "eval": 3, "bench": 3, "demo": 4}
TOP = 5  # cli/, doctor.py


def _floor(parts: tuple[str, ...]) -> int:
    return FLOORS.get(parts[0], TOP) if parts else TOP


def _imports(tree: ast.AST) -> set[tuple[str, ...]]:
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "rime_fast"}
    return {name for name in found if name}


def test_imports_run_downward_only():
    upward, sideways = [], set()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts
        if own == ("__init__",):
            continue  # the lazy public names
        for target in _imports(ast.parse(path.read_text())):
            if _floor(target) > _floor(own):
                upward.append(f"{'.'.join(own)} imports {'.'.join(target)}")
            elif target[0] != own[0] and _floor(target) == _floor(own) < TOP:
                sideways.add((own[0], target[0]))
    assert not upward, upward
    circles = {pair for pair in sideways if pair[::-1] in sideways}
    assert not circles, circles


def test_recipe_and_ops_stay_pure():
    for folder, banned in (("ops", {"transformers", "accelerate"}), ("recipe", {"transformers", "accelerate"})):
        for path in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module or ""]
                assert not banned & {name.split(".")[0] for name in names}, path


@pytest.mark.parametrize("name", rime_fast.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(rime_fast, name)
    assert name == "__version__" or (value.__doc__ and len(value.__doc__) > 40)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rime_fast.nothing


def test_files_stay_short():
    long = [
        f"{path} {count}"
        for path in [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("csrc/**/*.[ch]*")]
        if (count := len(path.read_text().splitlines())) > 450
    ]
    assert not long, long
