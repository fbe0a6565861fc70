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

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# Largest |logit| for which no softmax shift is needed in fp32 (csrc/rime/contrastive.h counts on it).
BOUNDED = 60.0
# Sums that several queries may reach are taken in fixed point on an accelerator, where float atomics would make the
# last bits depend on chance: terms lie in [0, 1], so 2^20 of them fit beside 42 bits of fraction.
FRACTION = float(1 << 42)
LOG2E = math.log2(math.e)


@dataclass
class Positives:
    """The positives of each query among the keys at hand: labels [N, P] int64, anything outside their range for none.

    at [N, P]: labels with a key in place of a missing one, to index with. shares [N, P] fp64: ``weight``, None until
    it is asked for where each query has one. first: where query i's one positive is key first + i; None where labels
    say it.
    """

    labels: Tensor
    at: Tensor
    shares: Tensor | None = None
    first: int | None = None

    @property
    def weight(self) -> Tensor:
        """The share of each pair in its query, [N, P] fp64: 1 / (positives of the query), 0 for a missing one."""
        if self.shares is None:
            self.shares = torch.ones_like(self.labels, dtype=torch.float64)
        return self.shares

    @property
    def single(self) -> bool:
        """Whether every query has exactly one positive, of weight 1."""
        return self.labels.shape[1] == 1

    def covers(self, n_keys: int) -> bool:
        """Whether each of the keys is the positive of one query, known without a look at labels."""
        return self.first is not None and len(self.labels) == n_keys

    @classmethod
    def of(cls, labels: Tensor) -> Positives:
        """Make them from labels [N] or [N, P]; values are checked elsewhere (``problem.check_labels``)."""
        if labels.dim() == 1 or labels.shape[1] == 1:
            labels = labels.contiguous().view(-1, 1)
            return cls(labels, labels)
        labels = labels.contiguous()
        there = labels >= 0
        return cls(labels, labels.clamp_min(0), there.double() / there.sum(1, keepdim=True))

    def lse_by_key(self, logits: Tensor, n_keys: int) -> Tensor:
        """Sum up by key: the log-sum-exp [L, K] of the positive logits [L, N, P] (-inf for a missing one) of each
        key; -inf without one."""
        logits = logits.flatten(1)
        if self.first is not None:
            return self._placed(logits, n_keys)
        logits = logits.double()
        at = self.at.flatten().expand_as(logits)
        best = logits.new_full((len(logits), n_keys), -torch.inf).scatter_reduce(1, at, logits, "amax")
        part = (logits - best.gather(1, at)).exp()
        if self.labels.shape[1] > 1:
            part = torch.where(self.weight.flatten() > 0, part, 0)
        return best + sum_by_key(part, at, n_keys).log()

    def key_weights(self, n_keys: int) -> Tensor:
        """Add up the weights of the pairs that end at each key, [K] fp64 (bincount would read its maximum back)."""
        if self.first is not None:
            return torch.nn.functional.pad(self.weight[:, 0], self._around(n_keys))
        return sum_by_key(self.weight.flatten()[None], self.at.flatten()[None], n_keys)[0]

    def best_by_key(self, similarity: Tensor, n_keys: int) -> Tensor:
        """Find the largest similarity [L, N, P] (-inf for a missing one) that is a positive of each key, [L, K]; -inf
        without."""
        similarity = similarity.flatten(1)
        if self.first is not None:
            return self._placed(similarity, n_keys)
        best = similarity.new_full((len(similarity), n_keys), -torch.inf)
        return best.scatter_reduce(1, self.at.flatten().expand_as(similarity), similarity, "amax")

    def of_keys(self, values: Tensor) -> Tensor:
        """Pick, from values [..., K] of the keys, those of the positives: [..., N, P]."""
        if self.first is not None:
            return values[..., self.first : self.first + len(self.labels), None]
        return values[..., self.at]

    def _around(self, n_keys: int) -> tuple[int, int]:
        before = self.first or 0
        return before, n_keys - before - len(self.labels)

    def _placed(self, values: Tensor, n_keys: int) -> Tensor:
        """Values [L, N] of the one positive each at their keys [L, K], -inf elsewhere."""
        return (
            values if self.covers(n_keys) else torch.nn.functional.pad(values, self._around(n_keys), value=-torch.inf)
        )


def sum_by_key(values: Tensor, at: Tensor, n_keys: int) -> Tensor:
    """Add up the values [L, N] in [0, 1] that belong to each key, [L, n_keys] fp64, the same bits at every call."""
    if values.device.type == "cpu":
        return values.new_zeros(len(values), n_keys).scatter_add(1, at, values)
    return fixed_sum_by_key(values, at, n_keys)


def fixed_sum_by_key(values: Tensor, at: Tensor, n_keys: int) -> Tensor:
    """Add up as ``sum_by_key`` does, in 42 bits of fraction: integers, so no order of additions changes the sum."""
    fixed = (values * FRACTION).round().to(torch.int64)
    zeros = values.new_zeros(len(values), n_keys)
    lost = zeros.scatter_reduce(1, at, values, "amax")  # NaN has no fixed point: it goes by maximum
    total = torch.zeros_like(zeros, dtype=torch.int64).scatter_add(1, at, fixed).double() / FRACTION
    return torch.where(lost.isnan(), torch.nan, total)


class _OfLosses:
    """Fields of all losses, along their first dimension; an index or a slice gives a view on some."""

    def __getitem__(self, index: Any) -> Any:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{name: x[index] for name, x in values.items() if isinstance(x, Tensor)})  # type: ignore

    def __len__(self) -> int:
        return next(len(x) for x in vars(self).values() if isinstance(x, Tensor))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


@dataclass
class Statistics(_OfLosses):
    """Running statistics of L losses over all candidates that count, the positives left out.

    Sums are of exponentials below the maximum beside them, which stays 0 when ``shiftless``.
    """

    shiftless: bool
    row_max: Tensor  # [L, N]
    row_sum: Tensor  # [L, N] fp64
    col_max: Tensor  # [L, K]
    col_sum: Tensor  # [L, K] fp64
    positive: Tensor  # [L, N, P] logits of the positives, -inf until they are met
    rival: Tensor  # [L, N] largest logit of a row

    @classmethod
    def empty(cls, losses: int, labels: Tensor, n_keys: int, shiftless: bool, dtype: torch.dtype) -> Statistics:
        """Make the statistics from before the first tile. labels [N, P]."""

        # Cut from one piece of each dtype: two fills for all.
        n_queries, sizes = len(labels), [losses * size for size in (len(labels), n_keys, len(labels), labels.numel())]
        sums = torch.zeros(sum(sizes[:2]), dtype=torch.float64, device=labels.device).split(sizes[:2])
        row_max, col_max, rival, positive = torch.full(
            (sum(sizes),), -torch.inf, dtype=dtype, device=labels.device
        ).split(sizes)
        if shiftless:
            row_max.zero_(), col_max.zero_()
        return cls(
            shiftless=shiftless,
            row_max=row_max.view(losses, n_queries),
            row_sum=sums[0].view(losses, n_queries),
            col_max=col_max.view(losses, n_keys),
            col_sum=sums[1].view(losses, n_keys),
            positive=positive.view(losses, *labels.shape),
            rival=rival.view(losses, n_queries),
        )

    def columns(self, start: int, stop: int) -> Statistics:
        """A view on keys start .. stop - 1: adding to it adds to the whole."""
        return replace(self, col_max=self.col_max[..., start:stop], col_sum=self.col_sum[..., start:stop])

    def hits(self) -> Tensor:
        """Count the queries that hit, [L] fp64: whose best positive beats every rival; a row with NaN in any candidate
        is no hit."""
        best = self.positive[:, :, 0] if self.positive.shape[2] == 1 else self.positive.amax(2)
        return ((best > self.rival) & (self.row_sum == self.row_sum)).sum(1, dtype=torch.float64)


@dataclass
class Solved:
    """The losses' softmaxes, complete, in fp64.

    rows [L, 2 + P, N]: maximum of the rivals (the shift of the gradient's exponentials), their log-sum-exp, the logits
        of the positives (-inf for a missing one).
    cols [L, 3, K]: maximum of the rivals, their log-sum-exp, log-sum-exp of the logits labelled with this key; -inf
        where there is none.
    """

    rows: Tensor
    cols: Tensor

    @classmethod
    def of(cls, state: Statistics, positives: Positives) -> Solved:
        """Put the positives back into the statistics."""
        (losses, n_queries, each), n_keys = state.positive.shape, state.col_max.shape[1]
        rows, cols = (state.row_sum.new_empty(losses, *size) for size in ((2 + each, n_queries), (3, n_keys)))
        rows[:, 2:] = state.positive.mT
        cols[:, 2] = positives.lse_by_key(state.positive, n_keys)
        for to, top, total in ((rows, state.row_max, state.row_sum), (cols, state.col_max, state.col_sum)):
            to[:, 0] = top
            torch.add(total.log(), top, out=to[:, 1])
        return cls(rows, cols)

    def row_positives(self) -> Tensor:
        """The log-sum-exp of each row's positives, [L, N]."""
        return self.rows[:, 2] if self.rows.shape[1] == 3 else self.rows[:, 2:].logsumexp(1)

    def row_loss(self, positives: Positives) -> Tensor:
        """The cross-entropy of each pair in its row, [L, N, P]; 0 for a missing one."""
        together = self.row_positives()
        loss = softplus(self.rows[:, 1] - together)
        if self.rows.shape[1] == 3:
            return loss[:, :, None]
        return _kept(loss[:, :, None] + (together[:, :, None] - self.rows[:, 2:].mT), positives)

    def col_loss(self, positives: Positives) -> Tensor:
        """The cross-entropy of each pair in its column, [L, N, P]; 0 for a missing one."""
        rivals, together = positives.of_keys(self.cols[:, 1]), positives.of_keys(self.cols[:, 2])
        loss = softplus(rivals - together)
        if positives.first is None:  # else no key is shared
            loss = loss + (together - self.rows[:, 2:].mT)
        return _kept(loss, positives)

    def total(self, positives: Positives, symmetric: bool) -> Tensor:
        """Each loss summed over queries, each the mean over its positives, [L]."""
        loss = self.row_loss(positives)
        if symmetric:
            loss = loss.add_(self.col_loss(positives)).mul_(0.5)
        return (loss if positives.single else loss.mul_(positives.weight)).sum((1, 2))


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + e^x) in fp64, to full relative precision for very negative x."""
    return torch.nn.functional.softplus(x, threshold=40.0)  # beyond it e^-x no longer counts in fp64


@dataclass
class Slopes(_OfLosses):
    """What a tile's gradient needs of L losses, in the tile's dtype.

    G = factor (row_coef exp(s - row_shift) + col_coef exp(s - col_shift)), and factor positive_slope at the positives.
    With ``shiftless`` all shifts are 0, and one exponential serves both.
    """

    shiftless: bool
    row_shift: Tensor  # [L, N]
    row_coef: Tensor  # [L, N]
    col_shift: Tensor  # [L, K]
    col_coef: Tensor  # [L, K]
    positive_slope: Tensor  # [L, N, P]
    factor: Tensor  # [L]

    @classmethod
    def of(
        cls,
        solved: Solved,
        positives: Positives,
        key_weights: Tensor | None,
        factor: Tensor,
        symmetric: bool,
        shiftless: bool,
        dtype: torch.dtype,
        base2: bool = False,
    ) -> Slopes:
        """Compute the coefficients of the losses' gradients.

        key_weights [K]: how much each key's column softmax counts, over all ranks (Positives.key_weights); None for 1.
        base2: shifts are for exponentials to base 2 of logits in base 2.
        factor: [L], the gradient to one direction's summed loss / temperature.
        """
        # Each softmax's share at a positive, weight e^-loss - (the pair's weight), written so that nothing cancels.
        slope = solved.row_loss(positives).neg_().expm1_()
        if not positives.single:
            slope = slope.add_(1 - positives.weight)
        if symmetric:
            col_loss = solved.col_loss(positives).neg_()
            if positives.first is None and key_weights is not None:  # else each key's column is its one pair's
                weight = positives.weight
                slope = slope + (positives.of_keys(key_weights) - weight) * col_loss.exp()
                slope = slope.add_(col_loss.expm1_().mul_(weight))
            else:
                slope = slope.add_(col_loss.expm1_())
        rows, cols = solved.rows.unbind(1), solved.cols.unbind(1)
        by_row = _shift_and_coefficient(rows[0], rows[1], solved.row_positives(), None, shiftless, dtype, base2)
        if symmetric:
            by_col = _shift_and_coefficient(cols[0], cols[1], cols[2], key_weights, shiftless, dtype, base2)
        else:
            shift = torch.full_like(cols[0], 0.0 if shiftless else torch.inf, dtype=dtype)
            by_col = shift, torch.zeros_like(shift)
        return cls(shiftless, *by_row, *by_col, slope.contiguous().to(dtype), factor.to(dtype))

    def columns(self, start: int, stop: int) -> Slopes:
        """The same rows against keys start .. stop - 1 only."""
        return replace(self, col_shift=self.col_shift[..., start:stop], col_coef=self.col_coef[..., start:stop])


def _kept(pairs: Tensor, positives: Positives) -> Tensor:
    return pairs if pairs.shape[2] == 1 else torch.where(positives.weight > 0, pairs, 0)


def _shift_and_coefficient(
    shift: Tensor,
    rivals: Tensor,
    positives: Tensor,
    weight: Tensor | None,
    shiftless: bool,
    dtype: torch.dtype,
    base2: bool,
) -> tuple[Tensor, Tensor]:
    """weight exp(s - lse) as coefficient exp(s - shift), with the shift that the sums were taken with.

    weight: None for 1. Without a rival the shift is -inf; nothing is kept there, and a shift of +inf makes that exact
    zeros.
    """
    lse = torch.logaddexp(rivals, positives)
    exact = shift  # as ``dtype`` holds it, in base e
    shift = (shift * LOG2E if base2 else shift).to(dtype, copy=True, memory_format=torch.contiguous_format)
    if base2:
        exact = shift.double().div_(LOG2E)
    coefficient = torch.sub(exact, lse, out=lse).exp_()
    if not shiftless:
        shift.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)
    if weight is not None:
        none = weight == 0
        coefficient.mul_(weight).masked_fill_(none, 0)
        if not shiftless:
            shift.masked_fill_(none, torch.inf)
    return shift, coefficient.to(dtype)
