"""From the statistics of a sweep to losses and gradient coefficients: O(N) work, in fp64.

The sweep leaves the positives out of its sums. With r_i the log of a row's rival sum and p_i the positive's logit, the
row's loss is log(e^r + e^p) - p = softplus(r - p) and its slope at the positive is -(1 - P_i) = expm1(-loss): both keep
their digits when the positive wins by far, where 1 - P computed in fp32 would be rounding noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rime_fast.ops.contrastive.rows import Slopes, Statistics


@dataclass
class Solved:
    """One term's softmaxes, complete, in fp64.

    rows [3, N]: maximum of the rivals (the shift of the gradient's exponentials), log-sum-exp, the positive's logit.
    cols [2, K]: maximum of the rivals, log-sum-exp over rivals and labelled queries (-inf for an empty column).
    """

    rows: Tensor
    cols: Tensor

    def row_loss(self) -> Tensor:
        """[N] cross-entropy of each row."""
        return self.rows[1] - self.rows[2]

    def col_loss(self, labels: Tensor) -> Tensor:
        """[N] cross-entropy of each labelled pair in its column."""
        return self.cols[1][labels] - self.rows[2]


def hits(state: Statistics) -> Tensor:
    """[N] fp64, 1 where the positive beats every rival; a row with NaN in any candidate is no hit."""
    return ((state.positive > state.rival) & ~state.row_sum.isnan()).double()


def solve(state: Statistics, positive_lse: Tensor) -> Solved:
    """Put the positives back. positive_lse [K]: log-sum-exp of the positive logits labelled with each key."""
    positive = state.positive.double()
    row_max, col_max = state.row_max.double(), state.col_max.double()
    row_rivals, col_rivals = row_max + state.row_sum.log(), col_max + state.col_sum.log()
    # positive + softplus keeps the digits of a small loss in the fp64 difference row_lse - positive.
    row_lse = positive + torch.nn.functional.softplus(row_rivals - positive, threshold=700.0)
    col_lse = torch.logaddexp(col_rivals, positive_lse)
    return Solved(torch.stack([row_max, row_lse, positive]), torch.stack([col_max, col_lse]))


def lse_by_label(positive: Tensor, labels: Tensor, n_keys: int) -> Tensor:
    """[K] fp64 log-sum-exp of the logits that share a label; -inf for a key without a query."""
    positive = positive.double()
    best = positive.new_full((n_keys,), -torch.inf).scatter_reduce(0, labels, positive, "amax")
    total = positive.new_zeros(n_keys).scatter_add(0, labels, (positive - best[labels]).exp())
    return best + total.log()


def label_counts(labels: Tensor, n_keys: int) -> Tensor:
    """[K] fp64: how many queries have each key as their positive (bincount would read its maximum back)."""
    counts = torch.zeros(n_keys, dtype=torch.float64, device=labels.device)
    return counts.scatter_add(0, labels, torch.ones_like(labels, dtype=torch.float64))


def make_slopes(
    solved: Solved, labels: Tensor, counts: Tensor, factor: Tensor, symmetric: bool, bounded: bool, dtype: torch.dtype
) -> Slopes:
    """Coefficients of one term's gradient.

    counts [K]: queries (of all ranks) labelled with each key, i.e. how often its column softmax counts.
    factor: 0-d, the gradient to one direction's summed loss / temperature.
    """
    row_shift, row_lse, positive = solved.rows
    col_shift, col_lse = solved.cols
    used = (counts > 0) if symmetric else torch.zeros_like(counts, dtype=torch.bool)
    slope = torch.expm1(positive - row_lse)
    if symmetric:
        slope = slope + counts[labels] * (positive - col_lse[labels]).exp() - 1
    # A row or column with no rival has shift -inf; nothing is kept there, and a shift of +inf makes that exact zeros.
    row_shift, row_coef = _shift_and_coefficient(row_shift, row_lse, torch.ones_like(row_lse), bounded)
    col_shift, col_coef = _shift_and_coefficient(col_shift, col_lse, torch.where(used, counts, 0), bounded)
    return Slopes(
        bounded=bounded,
        row_shift=row_shift.to(dtype),
        row_coef=row_coef.to(dtype),
        col_shift=col_shift.to(dtype),
        col_coef=col_coef.to(dtype),
        positive_slope=slope.to(dtype),
        factor=factor.to(dtype),
    )


def _shift_and_coefficient(shift: Tensor, lse: Tensor, weight: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    coefficient = torch.where(weight > 0, weight * (shift - lse).exp(), 0)
    if bounded:
        return shift, coefficient
    empty = (shift == -torch.inf) | (weight == 0)
    return torch.where(empty, torch.inf, shift), torch.where(empty, 0, coefficient)
