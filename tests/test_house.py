"""The rules of the house that a machine can check: floors, circles, the trainer's components, names, options, sizes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import rime_fast

PACKAGE = Path(rime_fast.__file__).parent
ROOT = PACKAGE.parent
# Floors from the ground up; a module may import its own folder and anything below, nothing beside it.
FLOORS = {"ops": 0, "recipe": 1, "model": 1, "data": 2, "engine": 3, "trainers": 4, "eval": 4, "integrations": 4}
TOP = 5  # demo, doctor, bench, cli: what people start; these may use each other


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name below rime_fast -> syntax tree; a package's is its __init__.py. Not here: the lazy public names."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = ast.parse(path.read_text())
    return found


@cache
def imports(name: str) -> set[str]:
    """The modules that ``name`` imports anywhere in its file: inside functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {one.removeprefix("rime_fast.") for one in found if one.startswith("rime_fast.")}
    # `from rime_fast.ops import native` means the module, not the package that holds it
    inside -= {one for one in inside if any(other.startswith(f"{one}.") and other in modules() for other in inside)}
    return {one for one in inside if one in modules() and one != name}


def floor(name: str) -> int:
    return FLOORS.get(name.split(".")[0], TOP)


def test_imports_run_downward_only():
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        for target in imports(name)
        if floor(target) > floor(name)
        or (floor(target) == floor(name) < TOP and target.split(".")[0] != name.split(".")[0])
    ]
    assert not wrong, wrong


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one module: what is left when ends are taken away until none are."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while True:
        reached = {target for targets in left.values() for target in targets}
        ends = {name for name, targets in left.items() if not targets & left.keys() or name not in reached}
        if not ends:
            return [sorted(left)] if left else []
        left = {name: targets - ends for name, targets in left.items() if name not in ends}


def test_no_circle_anywhere():
    """Between modules, inside a folder too."""
    found = circles({name: imports(name) for name in modules()})
    assert not found, found


def test_the_search_for_circles_finds_them():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_recipe_and_ops_stay_pure():
    for name, tree in modules().items():
        if name.split(".")[0] not in ("ops", "recipe"):
            continue
        for node in ast.walk(tree):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module or ""]
            assert not {"transformers", "accelerate"} & {one.split(".")[0] for one in names}, name


# --- the trainers and the operators ----------------------------------------------------------------------------------


def test_components_know_no_trainer():
    """A component gets the values it needs; only the trainers' own files, and those who start one, hold a trainer."""
    wrong = []
    for name, tree in modules().items():
        if floor(name) == TOP or name in ("trainers.base", "trainers.joint", "trainers.refine"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                wrong += [f"{name}.{node.name}" for argument in given if argument.arg == "trainer"]
    assert not wrong, wrong


def test_the_trainers_are_few_files_on_few_floors():
    own = {name for name in modules() if name.startswith("trainers.")}
    assert len(own) + 1 <= 11, sorted(own)  # and __init__.py

    def height(name: str) -> int:
        return 1 + max((height(one) for one in imports(name) & own), default=0)

    assert max(map(height, own)) <= 4, {name: height(name) for name in own}


ANATOMY = {"op", "reference", "cpu", "cuda", "triton", "triton_kernels"}
OWN = {  # what an operator has besides, because no other needs it
    "contrastive": {"agreement", "fused", "keys", "nested", "problem", "schedule", "softmax", "tiles"}
    | {"triton_nested", "triton_nested_kernels", "triton_parts"},
    "logprob_pool": {"arguments", "places", "problem", "read_outs", "rows"}
    | {"triton_places", "triton_rows", "triton_tiles", "vocab_parallel"},
    "reward": {"stream", "weights"},
}


def test_every_operator_has_the_same_files():
    found: dict[str, set[str]] = {}
    for name in modules():
        folder, _, module = name.removeprefix("ops.").partition(".")
        if name.startswith("ops.") and module:
            found.setdefault(folder, set()).add(module)
    assert found == {name: ANATOMY | own for name, own in OWN.items()}


def test_the_contributors_page_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:rime_fast|csrc|tests|docs|benchmarks)/[\w./*]*)`", text)
    assert len(named) > 20
    missing = [one for one in named if not list(ROOT.glob(one.rstrip("/")))]
    assert not missing, missing


# --- the public interface --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rime_fast.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(rime_fast, name)
    assert name == "__version__" or (value.__doc__ and len(value.__doc__) > 40)


def test_public_docstrings_begin_with_a_sentence():
    """What it is for comes first; shapes, formulas and what is returned come after."""
    wrong = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                words = ast.get_docstring(node)
                if words is not None and not re.match("[A-Z][^:]", words):
                    wrong.append(f"{name}.{node.name}: {words[:40]}")
    assert not wrong, wrong


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rime_fast.nothing


@cache
def pages() -> str:
    return "\n".join(
        path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*")]
    )


def given(tree: ast.AST) -> set[str]:
    """The names that some call gives: keywords, and the text keys of dicts that become ** arguments."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found |= {keyword.arg for keyword in node.keywords if keyword.arg}
        elif isinstance(node, ast.Dict):
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found.add(node.slice.value)
    return {one for one in found if isinstance(one, str)}


def called(owner: Any) -> set[str]:
    """What the package outside the owner's folder (its file, in a flat folder) and the pages' examples give."""
    source = Path(inspect.getsourcefile(inspect.unwrap(owner)) or "").relative_to(PACKAGE).with_suffix("")
    own = ".".join(source.parts[:2])
    trees = [tree for name, tree in modules().items() if name != own and not name.startswith(f"{own}.")]
    trees += [ast.parse(block) for block in re.findall(r"```python[^\n]*\n(.*?)```", pages(), re.S)]
    return set().union(*map(given, trees))


def public_callables() -> list[Any]:
    """(owner, function) of every public function, and of every public class's own methods."""
    found = []
    for name in rime_fast.__all__:
        value = getattr(rime_fast, name)
        if inspect.isfunction(value):
            found.append(pytest.param(value, value, id=name))
        elif inspect.isclass(value) and not dataclasses.is_dataclass(value):
            for method, member in vars(value).items():
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                    found.append(pytest.param(value, function, id=f"{name}.{method}"))
    return found


@pytest.mark.parametrize(("owner", "function"), public_callables())
def test_every_option_has_a_caller(owner, function):
    """An option that neither the package nor a page's example gives is one that nobody needs."""
    import transformers

    stock = [transformers.Qwen2VLForConditionalGeneration, transformers.Trainer, transformers.PreTrainedModel]
    inherited: set[str] = set()
    for base in stock if inspect.isclass(owner) else ():
        if method := getattr(base, function.__name__, None):
            inherited |= set(inspect.signature(method).parameters)
    options = [one for one in inspect.signature(function).parameters.values() if one.default is not one.empty]
    missing = {one.name for one in options} - inherited - called(owner)
    assert not missing, f"{function.__qualname__}: {sorted(missing)} is given nowhere"


@pytest.mark.parametrize("name", ["RimeConfig", "RefineConfig", "RewardWeights"])
def test_every_field_of_a_config_is_on_a_page(name):
    """Its name stands in docs/, the README or an example; TrainingArguments' own fields are transformers'."""
    from transformers import TrainingArguments

    stock = {one.name for one in dataclasses.fields(TrainingArguments)}
    names = {one.name for one in dataclasses.fields(getattr(rime_fast, name)) if one.init} - stock
    missing = sorted(one for one in names if not one.startswith("_") and not re.search(rf"\b{one}\b", pages()))
    assert not missing, missing


# --- sizes -----------------------------------------------------------------------------------------------------------


def tracked(*patterns: str) -> list[Path]:
    """The repository's files, or all that match where this is no git checkout."""
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = {ROOT / name for name in listed.stdout.split("\0")}
    return [path for path in found if path in names] if listed.returncode == 0 else found


def test_files_stay_short():
    files = tracked("rime_fast/**/*.py", "benchmarks/**/*.py", "csrc/**/*.[ch]*")
    long = [f"{path} {count}" for path in files if (count := len(path.read_text().splitlines())) > 450]
    assert not long, long


def test_words_are_the_fields():
    """Names that were once used here and that no newcomer could know."""
    private = re.compile(r"\b(?:everyones|aim|heat(?! map)|operator [ABC])\b", re.I)
    files = tracked("rime_fast/**/*.py", "benchmarks/**/*.py", "csrc/**/*.[ch]*", "docs/*.md", "*.md")
    found = [f"{path}: {match[0]}" for path in files for match in private.finditer(path.read_text())]
    assert not found, found


def test_formatting_is_run_not_fought():
    here = Path(__file__)
    marks = [path for path in tracked("**/*.py") for line in path.read_text().splitlines() if "# fmt: skip" in line]
    assert len([path for path in marks if path != here]) < 20, marks
