"""What a command is: its words for the help, its options, the function that runs it."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rime_fast.cli.options import MADE, Group, Option, UsageError, parse_arguments, read_yaml
from rime_fast.data.examples import example

HELP = ("-h", "--help", "--help_all", "--help-all")


@dataclass(frozen=True)
class Command:
    """One command of the command line. name: as typed after ``program``. text: one paragraph. examples: (what it does,
    the line to type).

    groups: the options that the help shows. more: those it shows only with --help_all; both are accepted.
    positional: the option that words without a name go to. run: called with the raw values by name.
    """

    name: str
    text: str
    examples: tuple[tuple[str, str], ...]
    run: Callable[[dict[str, Any]], int]
    groups: tuple[Group, ...] = ()
    more: tuple[Group, ...] = ()
    positional: str | None = None
    program: str = "rime-fast"

    def options(self) -> dict[str, Option]:
        """Every accepted option; where two groups have one, the first counts."""
        known: dict[str, Option] = {}
        for group in (*self.groups, *self.more):
            for name, option in group.options().items():
                known.setdefault(name, option)
        return known

    def main(self, argv: Sequence[str]) -> int:
        """Help, or read the options and run."""
        if any(word in HELP for word in argv):
            print(self.help(everything=any(word in HELP[2:] for word in argv)))
            return 0
        return self.run(self.read(argv))

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Raw values: those of the --config files in order, then the command line's."""
        known = self.options()
        given = parse_arguments(argv, known, self.positional)
        values: dict[str, Any] = {}
        for path in given.pop("config", []):
            values |= read_yaml(example(path), known)
        return values | given

    def help(self, everything: bool = False) -> str:
        """The help page."""
        width = min(shutil.get_terminal_size((100, 40)).columns, 110)
        bold = _bold if sys.stdout.isatty() else str
        words = ""
        if self.positional:
            words = f" {self.positional.upper()}" + "..." * self.options()[self.positional].is_list
        parts = [bold(f"{self.program} {self.name}{words} [--config FILE.yaml] [--option value ...]"), ""]
        parts += [textwrap.fill(self.text, width), ""]
        parts.append(bold("Examples"))
        for what, line in self.examples:
            parts += [f"  # {what}", *(f"  {one}" for one in line.split("\n")), ""]
        shown: set[str] = set()
        for group in (*self.groups, *(self.more if everything else ())):
            options = {name: option for name, option in group.options().items() if name not in shown}
            shown |= set(options)
            if options:
                parts += [bold(group.title), *(_option_help(option, width) for option in options.values()), ""]
        parts.append(bold("Always"))
        parts.append(_entry("--config FILE", "YAML with the same names (name: value); the command line wins.", width))
        if self.more and not everything:
            parts.append(_entry("--help_all", f"Every option, {_titles(self.more)} included.", width))
        return "\n".join(parts)


def _titles(groups: Sequence[Group]) -> str:
    return ", ".join(group.title for group in groups)


def _option_help(option: Option, width: int) -> str:
    kind = option.annotation.replace(" | None", "").removeprefix("None | ")
    kind = re.sub(r"\b[A-Z]\w+ \| |(?<=dict)\[.*?\]", "", kind)  # an Enum beside its text, a mapping's types
    kind = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", "|"), kind)
    kind = "A B ..." if option.is_list else kind.replace("bool", "[true|false]")
    text, default = option.help, option.default
    if default is None:
        text = f"{text} (required)"
    elif default not in ("None", "[]", "''", MADE) and not default.isupper() and len(default) < 40:
        shown = {"True": "on", "False": "off"}.get(default, default.strip("'\""))
        text = f"{text} (default: {shown})"
    return _entry(f"--{option.name} {kind}", text.strip(), width)


def _entry(left: str, text: str, width: int) -> str:
    indent = 34
    body = textwrap.wrap(text, max(30, width - indent)) or [""]
    head = f"  {left}"
    lines = [f"{head:<{indent}}{body.pop(0)}"] if len(head) < indent - 1 else [head]
    return "\n".join([*lines, *(" " * indent + line for line in body)]).rstrip()


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m"


def model_exists(*names: str) -> None:
    """Check a model's name before anything slow is imported: UsageError for one that can only be a directory and is
    none (hub names have at most one slash)."""
    for name in names:
        local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).parts[0] in ("runs", "models")
        if local and not Path(name).expanduser().is_dir():
            raise UsageError(f"--model {name}: no such directory")


def required(values: Mapping[str, Any], *names: str) -> None:
    """Check that options without a default were given: UsageError for the first of ``names`` that has no value."""
    for name in names:
        if not values.get(name):
            raise UsageError(f"--{name} is required")
