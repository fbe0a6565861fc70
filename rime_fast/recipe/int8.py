"""Embeddings of int8 by learned step size (LSQ, arXiv 1902.08153): one step s for all modes, so that any of them
searches any other.

    q = clamp(round(x / s), -128, 127),   trained as y = s q:   dy/dx = 1 inside the range, 0 beyond,
    dy/ds = round(x / s) - x / s inside, -128 or 127 beyond,   dL/ds times 1 / sqrt(127 D)

D, a row's width, is LSQ's count of an activation's features: no count of rows, which ranks and batches change. Rows are
compared by their cosine: s does not scale what is compared (that is the temperature's part), and q needs no s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

LOWEST, HIGHEST = -128, 127


def first_step(width: int) -> float:
    """The step to begin with, for unit rows of ``width`` numbers: LSQ's 2 mean|x| / sqrt(127), where mean|x| is that of
    evenly spread rows, sqrt(2 / (pi width)), and so neither the batch's nor the rank's."""
    return 2 * math.sqrt(2 / (math.pi * width) / HIGHEST)


def fake_int8(rows: Tensor, step: Tensor) -> Tensor:
    """Make of unit rows what is compared when they are kept as int8: [n, D] unit rows of their dtype, with LSQ's
    gradients.

    rows: [n, D] floating. step: 0-d fp32, above 0.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    share = 1 / math.sqrt(HIGHEST * rows.shape[1])
    step = step.detach() + share * (step - step.detach())  # the value of step, the gradient's share
    inside = (wide / step).clamp(LOWEST, HIGHEST)
    rounded = inside + (inside.round() - inside).detach()
    return normalize(rounded * step, dim=1).to(rows.dtype)


def to_int8(rows: Tensor, step: float) -> Tensor:
    """Quantise unit rows [n, D]: int8. A prefix of them is that of the rows (Matryoshka); compare by cosine."""
    return (rows.float() / step).round_().clamp_(LOWEST, HIGHEST).to(torch.int8)


def trained_step(config: Any) -> float:
    """The step of a model that was trained with ``int8_weight``, from its configuration. Raises ValueError for
    another."""
    step = getattr(config, "int8_step", None)
    if step is None:
        raise ValueError("the model has no int8_step in its config; expected one trained with int8_weight above 0")
    return float(step)
