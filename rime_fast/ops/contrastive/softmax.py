"""The softmaxes of the contrastive loss, in O(N P) work: positives, running statistics, losses, gradient coefficients.

``labels`` is [N] (one positive a query) or [N, P] (up to P, -1 where there are fewer). Inside it is always [N, P].
Every query weighs 1, shared equally by its positives, in both directions: a pair (query, positive) weighs one over the
number of positives of its query. With one positive each this is plain InfoNCE; with class labels it is SupCon's "out"
form (Khosla et al. 2020, eq. 2), forwards and backwards.

A sweep over the candidates leaves the positives out of its sums. With r_i the log of a row's rival sum and q_i the
log-sum-exp of its positives' logits p_ij, the loss of a pair is log(e^r + e^q) - p = softplus(r - q) + (q - p), and its
slope at the positive is e^-loss - (its weight): both keep their digits when the positives win by far, where 1 - P
computed in fp32 would be rounding noise. With one positive q is p, and the slope is expm1(-loss).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Largest |logit| for which no softmax shift is needed in fp32 (csrc/rime/contrastive.h counts on it).
BOUNDED = 60.0
# Sums that several queries may reach are taken in fixed point on an accelerator, where float atomics would make the
# last bits depend on chance: terms lie in [0, 1], so 2^20 of them fit beside 42 bits of fraction.
FRACTION = float(1 << 42)


@dataclass
class Positives:
    """The positives of each query among the keys at hand: labels [N, P] int64, anything outside their range for none.

    at [N, P]: labels with a key in place of a missing one, to index with. weight [N, P] fp64: 1 / (positives of the
    query), 0 for a missing one.
    """

    labels: Tensor
    at: Tensor
    weight: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Positives:
        """Make them from labels [N] or [N, P]; values are checked elsewhere (``problem.check_labels``)."""
        if labels.dim() == 1 or labels.shape[1] == 1:
            labels = labels.contiguous().view(-1, 1)
            return cls(labels, labels, torch.ones_like(labels, dtype=torch.float64))
        labels = labels.contiguous()
        there = labels >= 0
        return cls(labels, labels.clamp_min(0), there.double() / there.sum(1, keepdim=True))

    def lse_by_key(self, logits: Tensor, n_keys: int) -> Tensor:
        """Sum up by key: the log-sum-exp [K] fp64 of the positive logits [N, P] (-inf for a missing one) of each key;
        -inf without one."""
        logits = logits.double().flatten()
        at = self.at.flatten()
        best = logits.new_full((n_keys,), -torch.inf).scatter_reduce(0, at, logits, "amax")
        part = (logits - best[at]).exp()
        if self.labels.shape[1] > 1:
            part = torch.where(self.weight.flatten() > 0, part, 0)
        return best + sum_by_key(part, at, n_keys).log()

    def key_weights(self, n_keys: int) -> Tensor:
        """Add up the weights of the pairs that end at each key, [K] fp64 (bincount would read its maximum back)."""
        return sum_by_key(self.weight.flatten(), self.at.flatten(), n_keys)

    def best_by_key(self, similarity: Tensor, n_keys: int) -> Tensor:
        """Find the largest similarity [N, P] (-inf for a missing one) that is a positive of each key, [K]; -inf
        without."""
        best = similarity.new_full((n_keys,), -torch.inf)
        return best.scatter_reduce(0, self.at.flatten(), similarity.flatten(), "amax")


def sum_by_key(values: Tensor, at: Tensor, n_keys: int) -> Tensor:
    """Add up the values in [0, 1] that belong to each key, [n_keys] fp64, the same bits at every call."""
    if values.device.type == "cpu":
        return values.new_zeros(n_keys).scatter_add(0, at, values)
    return fixed_sum_by_key(values, at, n_keys)


def fixed_sum_by_key(values: Tensor, at: Tensor, n_keys: int) -> Tensor:
    """Add up as ``sum_by_key`` does, in 42 bits of fraction: integers, so no order of additions changes the sum."""
    fixed = (values * FRACTION).round().to(torch.int64)
    lost = values.new_zeros(n_keys).scatter_reduce(0, at, values, "amax")  # NaN has no fixed point: it goes by maximum
    total = torch.zeros(n_keys, dtype=torch.int64, device=values.device).scatter_add(0, at, fixed).double() / FRACTION
    return torch.where(lost.isnan(), torch.nan, total)


@dataclass
class Statistics:
    """Running statistics of one term over all candidates that count, the positives left out.

    Sums are of exponentials below the maximum beside them, which stays 0 when ``shiftless``.
    """

    shiftless: bool
    row_max: Tensor  # [N]
    row_sum: Tensor  # [N] fp64
    col_max: Tensor  # [K]
    col_sum: Tensor  # [K] fp64
    positive: Tensor  # [N, P] logits of the positives, -inf until they are met
    rival: Tensor  # [N] largest logit of a row

    @classmethod
    def empty(cls, labels: Tensor, n_keys: int, shiftless: bool, dtype: torch.dtype) -> Statistics:
        """Make the statistics from before the first tile. labels [N, P]."""

        def full(size: int, value: float, of: torch.dtype = dtype) -> Tensor:
            return torch.full((size,), value, dtype=of, device=labels.device)

        n_queries, start = labels.shape[0], 0.0 if shiftless else -torch.inf
        return cls(
            shiftless=shiftless,
            row_max=full(n_queries, start),
            row_sum=full(n_queries, 0.0, torch.float64),
            col_max=full(n_keys, start),
            col_sum=full(n_keys, 0.0, torch.float64),
            positive=torch.full(labels.shape, -torch.inf, dtype=dtype, device=labels.device),
            rival=full(n_queries, -torch.inf),
        )

    def columns(self, start: int, stop: int) -> Statistics:
        """A view on keys start .. stop - 1: adding to it adds to the whole."""
        return replace(self, col_max=self.col_max[start:stop], col_sum=self.col_sum[start:stop])

    def hits(self) -> Tensor:
        """Say which queries hit, [N] fp64: 1 where the best positive beats every rival; a row with NaN in any candidate
        is no hit."""
        return ((self.positive.amax(1) > self.rival) & ~self.row_sum.isnan()).double()


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

    @classmethod
    def of(cls, state: Statistics, positives: Positives) -> Solved:
        """Put the positives back into the statistics."""
        row_max, col_max = state.row_max.double(), state.col_max.double()
        rows = torch.cat([torch.stack([row_max, row_max + state.row_sum.log()]), state.positive.T.double()])
        by_key = positives.lse_by_key(state.positive, col_max.shape[0])
        return cls(rows, torch.stack([col_max, col_max + state.col_sum.log(), by_key]))

    def row_positives(self) -> Tensor:
        """The log-sum-exp of each row's positives, [N]."""
        return self.rows[2] if self.rows.shape[0] == 3 else self.rows[2:].logsumexp(0)

    def row_loss(self, positives: Positives) -> Tensor:
        """The cross-entropy of each pair in its row, [N, P]; 0 for a missing one."""
        together = self.row_positives()
        loss = softplus(self.rows[1] - together)
        if self.rows.shape[0] == 3:
            return loss[:, None]
        return _kept(loss[:, None] + (together[:, None] - self.rows[2:].T), positives)

    def col_loss(self, positives: Positives) -> Tensor:
        """The cross-entropy of each pair in its column, [N, P]; 0 for a missing one."""
        _, rivals, together = self.cols[:, positives.at]
        # The second part is 0 unless keys are shared.
        return _kept(softplus(rivals - together) + (together - self.rows[2:].T), positives)

    def total(self, positives: Positives, symmetric: bool) -> Tensor:
        """The term's loss summed over queries, each the mean over its positives, 0-d."""
        loss = (positives.weight * self.row_loss(positives)).sum()
        return 0.5 * (loss + (positives.weight * self.col_loss(positives)).sum()) if symmetric else loss


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + e^x) in fp64, to full relative precision for very negative x."""
    return torch.nn.functional.softplus(x, threshold=40.0)  # beyond it e^-x no longer counts in fp64


@dataclass
class Slopes:
    """What a tile's gradient needs of one term, in the tile's dtype.

    G = factor (row_coef exp(s - row_shift) + col_coef exp(s - col_shift)), and factor positive_slope at the positives.
    With ``shiftless`` all shifts are 0, and one exponential serves both.
    """

    shiftless: bool
    row_shift: Tensor  # [N]
    row_coef: Tensor  # [N]
    col_shift: Tensor  # [K]
    col_coef: Tensor  # [K]
    positive_slope: Tensor  # [N, P]
    factor: Tensor  # 0-d

    @classmethod
    def of(
        cls,
        solved: Solved,
        positives: Positives,
        key_weights: Tensor,
        factor: Tensor,
        symmetric: bool,
        shiftless: bool,
        dtype: torch.dtype,
    ) -> Slopes:
        """Compute the coefficients of one term's gradient.

        key_weights [K]: how much each key's column softmax counts, over all ranks (Positives.key_weights).
        factor: 0-d, the gradient to one direction's summed loss / temperature.
        """
        # Each softmax's share at a positive, weight e^-loss - (the pair's weight), written so that nothing cancels.
        slope = torch.expm1(-solved.row_loss(positives)) + (1 - positives.weight)
        if symmetric:
            col_loss, weight = solved.col_loss(positives), positives.weight
            slope = slope + weight * torch.expm1(-col_loss) + (key_weights[positives.at] - weight) * (-col_loss).exp()
        rows, cols = solved.rows, solved.cols
        col_weights = key_weights if symmetric else torch.zeros_like(key_weights)
        by_row = _shift_and_coefficient(rows[0], rows[1], solved.row_positives(), torch.ones_like(rows[0]), shiftless)
        by_col = _shift_and_coefficient(cols[0], cols[1], cols[2], col_weights, shiftless)
        return cls(shiftless, *(t.to(dtype) for t in (*by_row, *by_col, slope, factor)))

    def columns(self, start: int, stop: int) -> Slopes:
        """The same rows against keys start .. stop - 1 only."""
        return replace(self, col_shift=self.col_shift[start:stop], col_coef=self.col_coef[start:stop])


def _kept(pairs: Tensor, positives: Positives) -> Tensor:
    return pairs if pairs.shape[1] == 1 else torch.where(positives.weight > 0, pairs, 0)


def _shift_and_coefficient(
    shift: Tensor, rivals: Tensor, positives: Tensor, weight: Tensor, shiftless: bool
) -> tuple[Tensor, Tensor]:
    """weight exp(s - lse) as coefficient exp(s - shift), with the shift that the sums were taken with."""
    coefficient = torch.where(weight > 0, weight * (shift - torch.logaddexp(rivals, positives)).exp(), 0)
    if shiftless:
        return shift, coefficient
    # Without a rival the shift is -inf; nothing is kept there, and a shift of +inf makes that exact zeros.
    empty = (shift == -torch.inf) | (weight == 0)
    return torch.where(empty, torch.inf, shift), torch.where(empty, 0, coefficient)
