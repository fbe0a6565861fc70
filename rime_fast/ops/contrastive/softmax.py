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

    rows [3, N]: maximum of the rivals (the shift of the gradient's exponentials), their log-sum-exp, positive logit.
    cols [3, K]: maximum of the rivals, their log-sum-exp, log-sum-exp of the logits labelled with this key; -inf where
        there is none.
    """

    rows: Tensor
    cols: Tensor

    def row_loss(self) -> Tensor:
        """[N] cross-entropy of each row."""
        _, rivals, positive = self.rows
        return softplus(rivals - positive)

    def col_loss(self, labels: Tensor) -> Tensor:
        """[N] cross-entropy of each labelled pair in its column."""
        _, rivals, positives = self.cols[:, labels]
        return softplus(rivals - positives) + (positives - self.rows[2])  # the second term is 0 unless keys are shared


def hits(state: Statistics) -> Tensor:
    """[N] fp64, 1 where the positive beats every rival; a row with NaN in any candidate is no hit."""
    return ((state.positive > state.rival) & ~state.row_sum.isnan()).double()


def solve(state: Statistics, positive_lse: Tensor) -> Solved:
    """Put the positives back. positive_lse [K]: log-sum-exp of the positive logits labelled with each key."""
    positive = state.positive.double()
    row_max, col_max = state.row_max.double(), state.col_max.double()
    rows = torch.stack([row_max, row_max + state.row_sum.log(), positive])
    return Solved(rows, torch.stack([col_max, col_max + state.col_sum.log(), positive_lse]))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) in fp64, to full relative precision for very negative x."""
    return torch.nn.functional.softplus(x, threshold=40.0)  # beyond it e^-x no longer counts in fp64


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
    slope = torch.expm1(-solved.row_loss())
    if symmetric:
        col_loss = solved.col_loss(labels)
        slope = slope + torch.expm1(-col_loss) + (counts[labels] - 1) * (-col_loss).exp()
    row_weight, col_weight = torch.ones_like(solved.rows[0]), counts if symmetric else torch.zeros_like(counts)
    row_shift, row_coef = _shift_and_coefficient(solved.rows, row_weight, bounded)
    col_shift, col_coef = _shift_and_coefficient(solved.cols, col_weight, bounded)
    return Slopes(
        bounded=bounded,
        row_shift=row_shift.to(dtype),
        row_coef=row_coef.to(dtype),
        col_shift=col_shift.to(dtype),
        col_coef=col_coef.to(dtype),
        positive_slope=slope.to(dtype),
        factor=factor.to(dtype),
    )


def _shift_and_coefficient(lines: Tensor, weight: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    """weight exp(s - lse) as coefficient exp(s - shift), with the shift that the sums were taken with."""
    shift, rivals, positives = lines
    coefficient = torch.where(weight > 0, weight * (shift - torch.logaddexp(rivals, positives)).exp(), 0)
    if bounded:
        return shift, coefficient
    # Without a rival the shift is -inf; nothing is kept there, and a shift of +inf makes that exact zeros.
    empty = (shift == -torch.inf) | (weight == 0)
    return torch.where(empty, torch.inf, shift), torch.where(empty, 0, coefficient)
