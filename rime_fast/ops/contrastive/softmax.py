"""From the statistics of a sweep to losses and gradient coefficients: O(N P) work, in fp64.

The sweep leaves the positives out of its sums. With r_i the log of a row's rival sum and q_i the log-sum-exp of its
positives' logits p_ij, the loss of a pair is log(e^r + e^q) - p = softplus(r - q) + (q - p), and its slope at the
positive is e^-loss - (its weight): both keep their digits when the positives win by far, where 1 - P computed in fp32
would be rounding noise. With one positive q is p, and the slope is expm1(-loss).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rime_fast.ops.contrastive.positives import Positives
from rime_fast.ops.contrastive.rows import Slopes, Statistics


@dataclass
class Solved:
    """One term's softmaxes, complete, in fp64.

    rows [2 + P, N]: maximum of the rivals (the shift of the gradient's exponentials), their log-sum-exp, the logits of
        the positives (-inf for a missing one).
    cols [3, K]: maximum of the rivals, their log-sum-exp, log-sum-exp of the logits labelled with this key; -inf where
        there is none.
    """

    rows: Tensor
    cols: Tensor

    def row_positives(self) -> Tensor:
        """[N] log-sum-exp of each row's positives."""
        return self.rows[2] if self.rows.shape[0] == 3 else self.rows[2:].logsumexp(0)

    def row_loss(self, positives: Positives) -> Tensor:
        """[N, P] cross-entropy of each pair in its row; 0 for a missing one."""
        together = self.row_positives()
        loss = softplus(self.rows[1] - together)
        if self.rows.shape[0] == 3:
            return loss[:, None]
        return _kept(loss[:, None] + (together[:, None] - self.rows[2:].T), positives)

    def col_loss(self, positives: Positives) -> Tensor:
        """[N, P] cross-entropy of each pair in its column; 0 for a missing one."""
        _, rivals, together = self.cols[:, positives.at]
        # The second part is 0 unless keys are shared.
        return _kept(softplus(rivals - together) + (together - self.rows[2:].T), positives)

    def total(self, positives: Positives, symmetric: bool) -> Tensor:
        """0-d: the term's loss summed over queries, each the mean over its positives."""
        loss = (positives.weight * self.row_loss(positives)).sum()
        return 0.5 * (loss + (positives.weight * self.col_loss(positives)).sum()) if symmetric else loss


def hits(state: Statistics) -> Tensor:
    """[N] fp64, 1 where the best positive beats every rival; a row with NaN in any candidate is no hit."""
    return ((state.positive.amax(1) > state.rival) & ~state.row_sum.isnan()).double()


def solve(state: Statistics, positives: Positives) -> Solved:
    """Put the positives back."""
    row_max, col_max = state.row_max.double(), state.col_max.double()
    rows = torch.cat([torch.stack([row_max, row_max + state.row_sum.log()]), state.positive.T.double()])
    by_key = positives.lse_by_key(state.positive, col_max.shape[0])
    return Solved(rows, torch.stack([col_max, col_max + state.col_sum.log(), by_key]))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) in fp64, to full relative precision for very negative x."""
    return torch.nn.functional.softplus(x, threshold=40.0)  # beyond it e^-x no longer counts in fp64


def make_slopes(
    solved: Solved,
    positives: Positives,
    key_weights: Tensor,
    factor: Tensor,
    symmetric: bool,
    bounded: bool,
    dtype: torch.dtype,
) -> Slopes:
    """Coefficients of one term's gradient.

    key_weights [K]: how much each key's column softmax counts, over all ranks (Positives.key_weights).
    factor: 0-d, the gradient to one direction's summed loss / temperature.
    """
    # Each softmax's share at a positive, weight e^-loss - (the pair's weight), written so that nothing cancels.
    row_loss = solved.row_loss(positives)
    slope = torch.expm1(-row_loss) + (1 - positives.weight)
    if symmetric:
        col_loss, weight = solved.col_loss(positives), positives.weight
        slope = slope + weight * torch.expm1(-col_loss) + (key_weights[positives.at] - weight) * (-col_loss).exp()
    row_weight = torch.ones_like(solved.rows[0])
    col_weight = key_weights if symmetric else torch.zeros_like(key_weights)
    rows, cols = solved.rows, solved.cols
    row_shift, row_coef = _shift_and_coefficient(rows[0], rows[1], solved.row_positives(), row_weight, bounded)
    col_shift, col_coef = _shift_and_coefficient(cols[0], cols[1], cols[2], col_weight, bounded)
    return Slopes(
        bounded=bounded,
        row_shift=row_shift.to(dtype),
        row_coef=row_coef.to(dtype),
        col_shift=col_shift.to(dtype),
        col_coef=col_coef.to(dtype),
        positive_slope=slope.to(dtype),
        factor=factor.to(dtype),
    )


def _kept(pairs: Tensor, positives: Positives) -> Tensor:
    return pairs if pairs.shape[1] == 1 else torch.where(positives.weight > 0, pairs, 0)


def _shift_and_coefficient(
    shift: Tensor, rivals: Tensor, positives: Tensor, weight: Tensor, bounded: bool
) -> tuple[Tensor, Tensor]:
    """weight exp(s - lse) as coefficient exp(s - shift), with the shift that the sums were taken with."""
    coefficient = torch.where(weight > 0, weight * (shift - torch.logaddexp(rivals, positives)).exp(), 0)
    if bounded:
        return shift, coefficient
    # Without a rival the shift is -inf; nothing is kept there, and a shift of +inf makes that exact zeros.
    empty = (shift == -torch.inf) | (weight == 0)
    return torch.where(empty, torch.inf, shift), torch.where(empty, 0, coefficient)
