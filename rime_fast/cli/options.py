"""Command-line options from dataclasses, read without importing them.

A command's options are the fields of one or more dataclasses (its own, a trainer's config, TrainingArguments). Help
and the check of names read them from the SOURCE (ast), so that ``rime-fast train --help`` and a mistyped option answer
at once; torch and transformers are imported only when there is something to run.

Why no library: HfArgumentParser, jsonargparse and tyro build their options from the imported class, and the configs
inherit from TrainingArguments, whose import alone takes 6.2 s of processor time on a Xeon core (transformers 5.23,
torch 2.13), 20.8 s by the clock on a busy machine; ``train --help`` here takes 0.10 s (0.3 s by that clock). argparse
fed from these fields would replace the splitting of words (45 lines) and none of the YAML, types and messages.

Values come from YAML files (``--config``, later ones win) and from the command line (wins over all):
``--name value``, ``--name=value``, ``--flag``, ``--list a b c``; dashes and underscores are the same.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

FLAGS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
MADE = "made at start"  # the default of an option whose value no text says; its help text does


class UsageError(Exception):
    """What the user typed or wrote cannot be used; the message says what and why."""


@dataclass(frozen=True)
class Option:
    """One field: its annotation and default as written in the source, and its help text."""

    name: str
    annotation: str
    default: str | None
    help: str

    @property
    def is_list(self) -> bool:
        return "list[" in self.annotation

    @property
    def is_flag(self) -> bool:
        return self.annotation in ("bool", "bool | None")


@dataclass(frozen=True)
class Group:
    """A dataclass as a group of options. module: dotted name. only: a part of its fields, in this order (None: all)."""

    title: str
    module: str
    cls: str
    only: tuple[str, ...] | None = None

    def options(self) -> dict[str, Option]:
        """The fields of the dataclass by name, as its source has them."""
        found = read_fields(_source(self.module), self.cls)
        return found if self.only is None else {name: found[name] for name in self.only}


def _source(module: str) -> Path:
    """The file of ``module``, found without importing anything (its top package's place is enough)."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"{top} is not installed; rime-fast doctor says what is missing")
    return Path(spec.submodule_search_locations[0], *rest).with_suffix(".py")


def read_fields(source: Path, cls: str) -> dict[str, Option]:
    """The annotated fields of dataclass ``cls`` in ``source``, without those of its bases; private ones left out."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            lines = [
                line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            ]
            fields = [_field(line) for line in lines]
            return {field.name: field for field in fields if field is not None and not field.name.startswith("_")}
    raise LookupError(f"{source} has no class {cls}")


def _field(line: ast.AnnAssign) -> Option | None:
    assert isinstance(line.target, ast.Name)
    annotation = ast.unparse(line.annotation)
    if annotation.startswith("ClassVar"):
        return None
    default, text = None, ""
    value = line.value
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        if isinstance(keywords.get("init"), ast.Constant) and keywords["init"].value is False:  # type: ignore[attr-defined]
            return None
        if "default" in keywords:
            default = ast.unparse(keywords["default"])
        elif "default_factory" in keywords:
            default = {"list": "[]", "dict": "{}"}.get(ast.unparse(keywords["default_factory"]), MADE)
        text = _help(keywords.get("metadata"))
    elif isinstance(value, ast.Call) and ast.unparse(value.func) == "option":  # option(default, text)
        default, text = ast.unparse(value.args[0]), _help(value)
    elif value is not None:
        default = ast.unparse(value)
    return Option(line.target.id, annotation, default, text)


def _help(metadata: ast.expr | None) -> str:
    """The help text: the value of key "help" in a literal dict, or the first text given to a helper function."""
    texts: list[ast.expr] = []
    if isinstance(metadata, ast.Dict):
        pairs = zip(metadata.keys, metadata.values, strict=True)
        texts = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "help"]
    elif isinstance(metadata, ast.Call):
        texts = metadata.args[-1:]
    for text in texts:
        strings = [n.value for n in ast.walk(text) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if strings:
            return " ".join("".join(strings).replace("%%", "%").split())
    return ""


# --- values ----------------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str], known: Mapping[str, Option], positional: str | None = None) -> dict[str, Any]:
    """Raw values by name from the command line; those of options that take several are lists.

    ``positional``: the option that words without a name go to. Raises UsageError for unknown or valueless options.
    """
    values: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if positional is None:
                raise UsageError(f"unexpected {word!r}; options are written --name value")
            values.setdefault(positional, []).append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name == "config":
            given = [value] if equals else _take(words, several=False)
            if not given:
                raise UsageError("--config needs a YAML file")
            values.setdefault("config", []).extend(given)
            continue
        option = known.get(name)
        if option is None:
            raise UsageError(f"unknown option --{name}{suggestion(name, known)}")
        if name in values and not option.is_list:
            raise UsageError(f"--{name} is given twice")
        given = [value] if equals else _take(words, several=option.is_list, flag=option.is_flag)
        if not given and not option.is_flag:
            raise UsageError(f"--{name} needs a value ({option.annotation})")
        if option.is_list:
            values.setdefault(name, []).extend(given)
        else:
            values[name] = given[0] if given else True
    return values


def _take(words: list[str], *, several: bool, flag: bool = False) -> list[str]:
    """Removes from ``words`` what belongs to the option just read."""
    taken: list[str] = []
    while words and not words[0].startswith("--"):
        if flag and words[0].lower() not in FLAGS:
            break
        taken.append(words.pop(0))
        if not several:
            break
    return taken


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's booleans (``eval_strategy: no`` is text) and without double keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        double = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if double is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {double!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(path: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """The options in a YAML file, by name. Raises UsageError naming file and key (with the likeliest meant)."""
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"--config {path} holds a {type(loaded).__name__}; expected lines of name: value")
    values = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"{path}: unknown key {key!r}{suggestion(name, known, '')}")
        if name in values:
            raise UsageError(f"{path}: {name!r} is given twice")
        values[name] = value
    return values


def suggestion(name: str, known: Iterable[str], prefix: str = "--") -> str:
    """The end of a message about an unknown name: "; did you mean ...?" with the closest names, or where to find them
    all."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(prefix + one for one in close)}?" if close else "; --help lists them"
