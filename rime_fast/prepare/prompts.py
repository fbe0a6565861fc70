"""What a teacher is asked: the wording by task, from a YAML file, around the parts of a side."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rime_fast.data.records import Part, Side

FORMS = ("answer", "plain")
_TEXTS = ("system", "rules", "truth")
_KEYS = (*_TEXTS, "form", "tasks")
_TASK = ("query", "target", "datasets")
SIDES = ("query", "target")


@dataclass(frozen=True)
class Request:
    """Asks one thing of a teacher. key: its name in the cache. side: what it is about; content: what is shown, in
    order. truth: the right answer's text where the teacher is shown one, else None."""

    key: str
    side: Side
    system: str
    content: list[Part]
    truth: str | None = None


@dataclass(frozen=True)
class Prompts:
    """Holds the wording (prompts.yaml explains its keys). tasks: name -> {"query", "target"}; sets: a data set's name
    folded -> its task."""

    system: str
    form: str
    rules: str
    truth: str
    tasks: dict[str, dict[str, str]]
    sets: dict[str, str] = field(default_factory=dict)

    def task(self, dataset: str | None) -> str:
        """Find the task of a data set: "default" where none has it."""
        return self.sets.get(_folded(dataset or ""), "default")

    def wording(self, task: str, side: str, with_truth: bool) -> list[str]:
        """Give everything of a request that is not the side's: part of its key."""
        return [self.system, self.form, self.tasks[task][side], self.truth if with_truth else "", self.rules]

    def content(self, side: Side, task: str, name: str, truth: Side | None) -> list[Part]:
        """Write the user turn: the task, the side, the truth, the rules."""
        parts: list[Part] = [("text", f"{self.tasks[task][name].strip()}\n\nInput:\n"), *side.parts]
        if truth is not None:
            before, _, after = self.truth.partition("{answer}")
            parts += [("text", f"\n\n{before}"), *truth.parts, ("text", after)]
        return [*parts, ("text", f"\n\n{self.rules.strip()}")]


def load_prompts(path: str | Path | None = None) -> Prompts:
    """Load the package's own wording, or that of a file, over it. Raises ValueError naming file and key."""
    own = yaml.safe_load(files("rime_fast.prepare").joinpath("prompts.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = own
    if path is not None:
        given = _read(Path(path))
        found = own | given | {"tasks": own["tasks"] | given.get("tasks", {})}
    tasks, sets = {}, {}
    for name, task in found["tasks"].items():
        tasks[name] = {side: " ".join(str(task.get(side, own["tasks"]["default"][side])).split()) for side in SIDES}
        for one in task.get("datasets", ()):
            sets[_folded(str(one))] = name
    return Prompts(found["system"], found["form"], found["rules"], found["truth"], tasks, sets)


def _read(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"prompts {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError(f"prompts {path} holds {type(given).__name__}; expected keys {', '.join(_KEYS)}")
    for key, value in given.items():
        if key not in _KEYS:
            raise ValueError(f"prompts {path}: unknown key {key!r}; known: {', '.join(_KEYS)}")
        if key in _TEXTS and not isinstance(value, str):
            raise ValueError(f"prompts {path}: {key} is {type(value).__name__}; expected text")
    if given.get("form", "answer") not in FORMS:
        raise ValueError(f"prompts {path}: form is {given['form']!r}; expected {' or '.join(FORMS)}")
    if "truth" in given and "{answer}" not in given["truth"]:
        raise ValueError(f"prompts {path}: truth holds no {{answer}}, the place of the right answer")
    tasks = given.get("tasks", {})
    if not isinstance(tasks, dict):
        raise ValueError(f"prompts {path}: tasks is {type(tasks).__name__}; expected names of tasks")
    for name, task in tasks.items():
        wrong = [str(key) for key in task if key not in _TASK] if isinstance(task, dict) else [repr(task)]
        if wrong:
            raise ValueError(f"prompts {path}: task {name!r} holds {', '.join(wrong)}; expected {', '.join(_TASK)}")
        if not isinstance(task.get("datasets", []), list):
            raise ValueError(f"prompts {path}: task {name!r}: datasets is no list")
    return given


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
