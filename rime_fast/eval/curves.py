"""From a trainer's ``log_history`` to the panels of the report.

Names are the trainers': ``loss``, ``ce/<side>``, ``contrast/<cell>``, ``hit@1/<cell>``, ``reward/<term>``,
``rewrite_tokens``, ``kl``, ``clip_fraction``, and transformers' ``grad_norm`` and ``eval_*``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rime_fast.eval.plots import Panel

# title, names (a trailing / takes every name under it), logarithmic, range 0..1
_TRAINING = (
    ("Loss", ("loss",), True, False),
    ("Cross-entropy (nats a token)", ("ce/",), True, False),
    ("Contrastive terms", ("contrast/",), True, False),
    ("In-batch hit@1", ("hit@1/",), False, True),
    ("Gradient norm", ("grad_norm",), True, False),
    ("Share of the peak, and of the time that waits for data", ("mfu", "hfu", "data_wait"), False, False),
)
# A rank runs to the size of the bank, a similarity to one, a reward term to a tenth: each kind has its own scale.
_REFINE = (
    ("Reward", ("reward/total",), False, False),
    ("Reward terms", ("reward/score", "reward/refine", "reward/length"), False, False),
    ("Similarity to the anchors", ("reward/positive", "reward/negative"), False, False),
    ("Rank of the own anchor", ("reward/rank",), True, False),
    ("Shares", ("reward/format", "reward/hit", "reward/nan", "degenerate_groups", "clip_fraction"), False, True),
    ("Decoded tokens a rewrite", ("rewrite_tokens",), False, False),
    ("KL to the reference (nats a token)", ("kl",), False, False),
    ("Standard deviation in a group", ("reward_std", "group_std"), False, False),
    ("Entropy of the policy (nats a token)", ("entropy",), False, False),
)


def is_refine(log_history: Sequence[Mapping[str, Any]]) -> bool:
    """True for a Refine-RL run's history."""
    return any(name.startswith("reward/") for entry in log_history for name in entry)


def training_panels(log_history: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Panels of a joint-training run; empty for a Refine-RL run or an empty history."""
    return [] if is_refine(log_history) else _panels(log_history, _TRAINING)


def refine_panels(log_history: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Panels of a Refine-RL run: reward, length, KL; empty for any other."""
    return _panels(log_history, _REFINE) if is_refine(log_history) else []


def _panels(log_history: Sequence[Mapping[str, Any]], layout: Sequence[tuple]) -> list[Panel]:
    panels = []
    for title, wanted, log, unit in layout:
        names: dict[str, str] = {}
        for name in dict.fromkeys(name for entry in log_history for name in entry):
            bare = name.removeprefix("eval_")
            for want in wanted:
                if bare == want or (want.endswith("/") and bare.startswith(want)):
                    names[name] = bare.rsplit("/", 1)[-1] + (" (eval)" if bare != name else "")
        series = {}
        for name, label in names.items():
            points = [(entry["step"], entry[name]) for entry in log_history if _drawable(entry, name)]
            if points:
                series[label] = ([float(x) for x, _ in points], [float(y) for _, y in points])
        if series:
            panels.append(Panel(title, series, log=log, unit=unit))
    return panels


def _drawable(entry: Mapping[str, Any], name: str) -> bool:
    value = entry.get(name)
    return "step" in entry and isinstance(value, (int, float)) and math.isfinite(value)
