"""Which keys are the positives of each query, and the sums that go over the queries of one key.

``labels`` is [N] (one positive a query) or [N, P] (up to P, -1 where there are fewer). Inside it is always [N, P].
Every query weighs 1, shared equally by its positives, in both directions: a pair (query, positive) weighs one over the
number of positives of its query. With one positive each this is plain InfoNCE; with class labels it is SupCon's "out"
form (Khosla et al. 2020, eq. 2), forwards and backwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rime_fast.ops._checks import require, require_range

# Sums that several queries may reach are taken in fixed point on an accelerator, where float atomics would make the
# last bits depend on chance: terms lie in [0, 1], so 2^20 of them fit beside 42 bits of fraction.
FRACTION = float(1 << 42)


@dataclass
class Positives:
    """labels [N, P] int64: the positives of each query among the keys at hand, anything outside their range for none.

    at [N, P]: labels with a key in place of a missing one, to index with. weight [N, P] fp64: 1 / (positives of the
    query), 0 for a missing one.
    """

    labels: Tensor
    at: Tensor
    weight: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Positives:
        """From [N] or [N, P]; values are checked elsewhere (``check_values``)."""
        if labels.dim() == 1 or labels.shape[1] == 1:
            labels = labels.contiguous().view(-1, 1)
            return cls(labels, labels, torch.ones_like(labels, dtype=torch.float64))
        labels = labels.contiguous()
        there = labels >= 0
        return cls(labels, labels.clamp_min(0), there.double() / there.sum(1, keepdim=True))

    def lse_by_key(self, logits: Tensor, n_keys: int) -> Tensor:
        """[K] fp64 log-sum-exp of the positive logits [N, P] (-inf for a missing one) of each key; -inf without one."""
        logits = logits.double().flatten()
        at = self.at.flatten()
        best = logits.new_full((n_keys,), -torch.inf).scatter_reduce(0, at, logits, "amax")
        part = (logits - best[at]).exp()
        if self.labels.shape[1] > 1:
            part = torch.where(self.weight.flatten() > 0, part, 0)
        return best + sum_by_key(part, at, n_keys).log()

    def key_weights(self, n_keys: int) -> Tensor:
        """[K] fp64: the weights of the pairs that end at each key (bincount would read its maximum back)."""
        return sum_by_key(self.weight.flatten(), self.at.flatten(), n_keys)

    def best_by_key(self, similarity: Tensor, n_keys: int) -> Tensor:
        """[K] the largest similarity [N, P] (-inf for a missing one) that is a positive of each key; -inf without."""
        best = similarity.new_full((n_keys,), -torch.inf)
        return best.scatter_reduce(0, self.at.flatten(), similarity.flatten(), "amax")


def sum_by_key(values: Tensor, at: Tensor, n_keys: int) -> Tensor:
    """[n_keys] fp64: the values in [0, 1] that belong to each key, the same bits at every call."""
    if values.device.type == "cpu":
        return values.new_zeros(n_keys).scatter_add(0, at, values)
    return fixed_sum_by_key(values, at, n_keys)


def fixed_sum_by_key(values: Tensor, at: Tensor, n_keys: int) -> Tensor:
    """As ``sum_by_key``, in 42 bits of fraction: integers, so no order of additions changes the sum."""
    fixed = (values * FRACTION).round().to(torch.int64)
    lost = values.new_zeros(n_keys).scatter_reduce(0, at, values, "amax")  # NaN has no fixed point: it goes by maximum
    total = torch.zeros(n_keys, dtype=torch.int64, device=values.device).scatter_add(0, at, fixed).double() / FRACTION
    return torch.where(lost.isnan(), torch.nan, total)


def check_values(labels: Tensor, n_keys: int) -> None:
    """[N]: every label names a key. [N, P]: a key or -1, one at least in a row, none twice (``_checks.require``)."""
    if labels.dim() == 1:
        require_range("labels", labels, 0, n_keys)
        return
    require_range("labels", labels, -1, n_keys)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if (problem := values_problem(labels)) is not None:
            raise ValueError(problem)
        return
    require((labels >= 0).any(1), "labels: expected at least one positive (a label >= 0) in every row")
    require(~_repeated(labels), "labels: expected the positives of a row to differ; one names a key twice")


def _repeated(labels: Tensor) -> Tensor:
    """[N] bool: the row names a key twice."""
    ordered = labels.sort(1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)


def values_problem(labels: Tensor) -> str | None:
    """What ``check_values`` would refuse whatever the number of keys, in words; reads the labels on the host."""
    if labels.dim() == 1:
        return None
    empty = (labels < 0).all(1)
    if bool(empty.any()):
        return f"labels: expected at least one positive (a label >= 0) in every row, got none in row {first_row(empty)}"
    if bool((twice := _repeated(labels)).any()):
        return f"labels: expected the positives of a row to differ; row {first_row(twice)} names a key twice"
    return None


def first_row(bad: Tensor) -> int:
    """The first True of a boolean [N]."""
    return int(bad.to(torch.int8).argmax())
