"""``rime-fast merge``: the weighted mean of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rime_fast.cli.command import Command, model_exists, required
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build


@dataclass
class MergeOptions:
    """What is merged, and where it goes."""

    models: list[str] = field(
        metadata={
            "help": "Directories or hub names with weights, NAME:0.5 (without one: 1); an adapter's is merged in."
        }
    )
    output_dir: str = field(default="runs/merged", metadata={"help": "Folder of the merged model."})


def run(values: dict[str, Any]) -> int:
    """Merge and write."""
    required(values, "models")
    options = build(MergeOptions, values)
    models = [weighted(word) for word in options.models]
    model_exists(*(name for name, _ in models))
    from rime_fast.cli.bars import quiet
    from rime_fast.model.merge import merge_models

    quiet()
    folder = merge_models(models, options.output_dir)
    total = sum(weight for _, weight in models)
    print("\n".join(f"{weight / total:.3f} {name}" for name, weight in models))
    print(f"model: {folder}")
    return 0


def weighted(word: str) -> tuple[str, float]:
    """Split NAME:WEIGHT. Raises UsageError for a weight that is no number above 0."""
    name, colon, text = word.rpartition(":")
    if not colon:
        return word, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not (name and 0 < weight < float("inf")):
        raise UsageError(f"{word!r} has weight {text!r}; expected NAME:WEIGHT with a number above 0")
    return name, weight


COMMAND = Command(
    name="merge",
    text="Writes the weighted mean of trained models that started from one: of two phases, two seeds, two mixtures. "
    "Weights are divided by their sum; processor and settings are the first model's.",
    examples=(
        ("two phases in equal parts", "rime-fast merge runs/s1:0.5 runs/s2:0.5 --output_dir runs/merged"),
        ("is it better?", "rime-fast merge runs/a:0.7 runs/b:0.3 --output_dir runs/ab"),
    ),
    run=run,
    groups=(Group("What", "rime_fast.cli.merge", "MergeOptions"),),
    positional="models",
)
