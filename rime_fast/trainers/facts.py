"""What a model card says of a run: settings, data and last results, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import get_annotations
from typing import Any

from rime_fast.trainers.config import CommonConfig

# transformers' own settings that decide what was learnt; ours are all told
_STOCK = (
    *("num_train_epochs", "max_steps", "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "optim"),
    *("bf16", "fp16", "seed", "world_size"),
)
_LEFT_OUT = ("progress", "report_to", "logging_steps", "logging_nan_inf_filter", "remove_unused_columns", "image_root")


def settings_of(args: CommonConfig) -> dict[str, Any]:
    """The recipe's fields and the deciding ones of transformers, by name."""
    classes = [cls for cls in reversed(type(args).__mro__) if issubclass(cls, CommonConfig)]
    own = [name for cls in classes for name in get_annotations(cls) if hasattr(args, name)]
    chosen = {name: getattr(args, name) for name in (*own, *_STOCK) if name not in _LEFT_OUT}
    plain = (int, float, str, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in chosen.items()}


def data_of(dataset: Any) -> dict[str, int]:
    """Rows of each file (or other source) of a training set."""
    parts: Sequence[Any] = getattr(dataset, "datasets", None) or [dataset]
    named = {}
    for part in parts:
        if part is not None and hasattr(part, "__len__"):
            named[str(getattr(part, "name", type(part).__name__))] = len(part)
    return named


def results_of(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of every number that was logged."""
    found: dict[str, float] = {}
    for entry in history:
        found |= {name: value for name, value in entry.items() if isinstance(value, (int, float))}
    return {name: value for name, value in found.items() if name not in ("step", "epoch", "total_flos")}
