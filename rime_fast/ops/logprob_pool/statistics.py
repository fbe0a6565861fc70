"""What the backends of operator A hand around: statistics of rows, gradients, and how parts of a vocabulary add up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Per row, 0 where ignored: log-sum-exp [2, T] (rows.py), the target's score [T], the entropy [T] or [0]."""

    lse: Tensor
    hit: Tensor
    entropy: Tensor


def new_statistics(hidden: Tensor, entropy: bool, rows: int | None = None) -> Statistics:
    """All zero, for ``rows`` rows beside ``hidden`` (as many as it has)."""
    rows, device = hidden.shape[0] if rows is None else rows, hidden.device
    lse, hit, row_entropy = (torch.zeros(s, device=device) for s in ((2, rows), (rows,), (rows if entropy else 0,)))
    return Statistics(lse, hit, row_entropy)


def share_of_part(part: Statistics, top: Tensor) -> Tensor:
    """[2 or 3, R]: what adds up over the parts of a vocabulary. top [R]: the largest lse of a row's parts.

    With w_i = exp(lse_i - top): w_i, the target's score, and w_i (entropy_i - (lse_i - top)) if there is an entropy. A
    part whose every column is banned (-inf) has a share of 0.
    """
    own = part.lse[0]
    below = torch.where(own == -torch.inf, own, (own - top) + part.lse[1])
    share = below.exp()
    rows = [share, part.hit]
    if part.entropy.shape[0]:
        rows.append(torch.where(share == 0, share, share * (part.entropy - below)))
    return torch.stack(rows)


def whole_of_parts(total: Tensor, top: Tensor) -> Statistics:
    """The whole vocabulary's statistics from the sum of ``share_of_part`` over its parts."""
    log_sum = total[0].log()
    entropy = total[2] / total[0] + log_sum if total.shape[0] == 3 else total.new_empty(0)
    high = top + log_sum
    return Statistics(torch.stack([high, (top - high) + log_sum]), total[1], entropy)


class Gradients(NamedTuple):
    """What a backward gives; an entry that was not needed is None."""

    hidden: Tensor | None  # [T, H] in gradient_dtype(hidden.dtype)
    lm_head: Tensor | None  # [V, H] in gradient_dtype(lm_head.dtype)
    bias: Tensor | None  # [V] fp32
    temperature: Tensor | None  # 0-d fp32


class Needs(NamedTuple):
    """Which gradients to make."""

    hidden: bool
    lm_head: bool
    bias: bool
    temperature: bool


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype gradients wait in between forward and backward: fp16 would underflow before the loss scale arrives."""
    return torch.float32 if dtype == torch.float16 else dtype
