"""What the schedules of the log-prob operator hand around: the call, its options, statistics of rows, gradients."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.dispatch import BACKENDS, memory_of

WORKSPACE_SHARE = 32  # of a GPU's memory: on an H100 room for all logits of 8,192 rows of 151,936
WORKSPACE_ENVIRONMENT = "RIME_FAST_WORKSPACE_MIB"
LOGITS_ENVIRONMENT = "RIME_FAST_FP32_LOGITS"


def _digest() -> int:
    """Of the files whose functions torch.compile traces into its graphs: 48 bits."""
    found = hashlib.sha256()
    for name in ("op.py", "problem.py"):
        found.update(Path(__file__).with_name(name).read_bytes())
    return int(found.hexdigest()[:12], 16)


# In every graph: torch.compile keeps graphs on disk under a key of the forward alone, and a backward that another
# version of this code traced would otherwise be called with that version's arguments.
REVISION = _digest()


class Needs(NamedTuple):
    """Which gradients to make."""

    hidden: bool = False
    lm_head: bool = False
    bias: bool = False
    temperature: bool = False


class Options(NamedTuple):
    """The settings of a call, all that is neither tensor nor process group: one list of integers in the operators.

    (temperature and softcap are numbers that training may change: they travel as 0-d tensors beside hidden.)
    """

    backend: str
    ignore_index: int = -100
    entropy: bool = False
    normalize: bool = True
    max_scored: int = -1  # at most so many rows are scored; -1 = unknown
    vocab_start: int = 0  # the first column of this rank's head
    needs: Needs = Needs()

    def encode(self) -> list[int]:
        """Write the options as whole numbers, since a custom operator takes no object; ``decode`` reverses it."""
        backend, flags = BACKENDS.index(self.backend), [int(need) for need in self.needs]
        numbers = [self.ignore_index, int(self.entropy), int(self.normalize), self.max_scored, self.vocab_start]
        return [REVISION, backend, *numbers, *flags]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Options:
        """Read the options that ``encode`` wrote."""
        _, backend, ignore_index, entropy, normalize, max_scored, vocab_start, *needs = numbers
        wanted = Needs(*map(bool, needs))
        return cls(BACKENDS[backend], ignore_index, bool(entropy), bool(normalize), max_scored, vocab_start, wanted)


class Spans(NamedTuple):
    """The rows [start, end) of every read-out."""

    starts: Tensor  # [K] int64
    ends: Tensor  # [K] int64


class Scoring(NamedTuple):
    """How logits x become scores: z = softcap(x + bias) / temperature."""

    bias: Tensor | None  # [V] fp32, contiguous
    temperature: Tensor  # 0-d fp32
    softcap: Tensor | None  # 0-d fp32

    def part(self, columns: slice) -> Scoring:
        """Give the scoring of these columns alone."""
        return self if self.bias is None else self._replace(bias=self.bias[columns])


class Problem(NamedTuple):
    """One call, as the schedules take it."""

    hidden: Tensor  # [T, H]
    lm_head: Tensor  # [V, H]
    targets: Tensor  # [T] int64, in the whole vocabulary
    scoring: Scoring
    spans: Spans
    options: Options

    @property
    def ignored(self) -> Tensor:
        """Say which rows are not scored: [T] bool."""
        return self.targets == self.options.ignore_index

    @property
    def local_targets(self) -> Tensor:
        """The targets in this rank's columns."""
        return self.targets - self.options.vocab_start if self.options.vocab_start else self.targets


def loss_slope(problem: Problem, token_weight: Tensor | None) -> Tensor:
    """Give the gradient [T] of the summed loss to logp."""
    if token_weight is None:
        return torch.full_like(problem.targets, -1.0, dtype=torch.float32)
    return -token_weight


class Statistics(NamedTuple):
    """The softmax of each row, 0 where ignored: log-sum-exp [2, T] (rows.py), the target's score [T], the entropy [T]
    or [0]."""

    lse: Tensor
    target_logit: Tensor
    entropy: Tensor

    def without(self, ignored: Tensor) -> Statistics:
        """Put 0 where ``ignored``."""
        return Statistics(*(s.masked_fill(ignored, 0.0) if s.numel() else s for s in self))


class Upstream(NamedTuple):
    """Gradients that arrive at the rows: of logp [T] and of the entropy [T] or None, fp32."""

    logp: Tensor
    entropy: Tensor | None


class Gradients(NamedTuple):
    """What a backward gives; an entry that was not needed is None."""

    hidden: Tensor | None  # [T, H] in gradient_dtype(hidden.dtype)
    lm_head: Tensor | None  # [V, H] in gradient_dtype(lm_head.dtype)
    bias: Tensor | None  # [V] fp32
    temperature: Tensor | None  # 0-d fp32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype gradients wait in between forward and backward: fp16 would underflow before the loss scale arrives."""
    return torch.float32 if dtype == torch.float16 else dtype


def new_statistics(hidden: Tensor, entropy: bool, rows: int | None = None) -> Statistics:
    """Make statistics of all zero for ``rows`` rows beside ``hidden`` (as many as it has)."""
    rows = hidden.shape[0] if rows is None else rows
    zeros = partial(torch.zeros, dtype=torch.float32, device=hidden.device)
    both = zeros(3, rows)  # one launch
    return Statistics(both[:2], both[2], zeros(rows) if entropy else both.new_empty(0))


def share_of_part(part: Statistics, top: Tensor) -> Tensor:
    """Compute what adds up over the parts of a vocabulary, [2 or 3, R]. top [R]: the largest lse of a row's parts.

    With w_i = exp(lse_i - top): w_i, the target's score, and w_i (entropy_i - (lse_i - top)) if there is an entropy. A
    part whose every column is banned (-inf) has a share of 0.
    """
    own = part.lse[0]
    below = torch.where(own == -torch.inf, own, (own - top) + part.lse[1])
    share = below.exp()
    rows = [share, part.target_logit]
    if part.entropy.shape[0]:
        rows.append(torch.where(share == 0, share, share * (part.entropy - below)))
    return torch.stack(rows)


def whole_of_parts(total: Tensor, top: Tensor) -> Statistics:
    """Make the whole vocabulary's statistics from the sum of ``share_of_part`` over its parts."""
    log_sum = total[0].log()
    entropy = total[2] / total[0] + log_sum if total.shape[0] == 3 else total.new_empty(0)
    high = top + log_sum
    return Statistics(torch.stack([high, (top - high) + log_sum]), total[1], entropy)


class Scored(NamedTuple):
    """The numbers of the scored rows. order [C] int64: ascending, then T in every further place. number: how many, 0-d
    int32.

    C, the capacity, is what the host knows to be enough: the caller's max_scored, or T.
    """

    order: Tensor
    number: Tensor

    def part(self, first: int, rows: int) -> Scored:
        """Give the scored rows in places [first, first + rows)."""
        return Scored(self.order[first : first + rows], (self.number - first).clamp(0, rows))


def scored_rows(ignored: Tensor, max_scored: int = -1) -> Scored:
    """Find the scored rows and count them."""
    order = scored_order(ignored, max_scored)
    return Scored(order, (~ignored).sum().clamp(max=order.shape[0]).to(torch.int32))


def scored_order(ignored: Tensor, max_scored: int = -1) -> Tensor:
    """Find the scored rows (``Scored.order``) by a prefix sum, which the host does not wait for: every one is written
    to its rank's place."""
    rows = ignored.shape[0]
    capacity = rows if max_scored < 0 else min(max_scored, rows)
    scored = ~ignored
    place = scored.cumsum(0) - 1
    # Ignored rows (and rows past a capacity that was wrong, which arguments.py reports) all write to a spare place.
    place = torch.where(scored, place, capacity).clamp_(max=capacity)
    order = torch.full((capacity + 1,), rows, dtype=torch.int64, device=ignored.device)
    order.scatter_(0, place, torch.arange(rows, device=ignored.device))
    return order[:capacity]


def workspace_limit(least: int = 0, beside: Tensor | None = None) -> int:
    """The bytes one call may use beside its results and gradients: RIME_FAST_WORKSPACE_MIB, else the most of 256 MiB,
    ``least`` and, beside a tensor on a GPU, a share of what that GPU has."""
    value = os.environ.get(WORKSPACE_ENVIRONMENT)
    if value is None:
        share = 0 if beside is None or not beside.is_cuda else memory_of(beside.get_device()) // WORKSPACE_SHARE
        return max(256 << 20, least, share)
    if not value.isdecimal() or int(value) < 16:
        raise ValueError(f"{WORKSPACE_ENVIRONMENT}: expected a whole number of MiB, 16 or more, got {value!r}")
    return int(value) << 20


def logits_dtype(operands: torch.dtype) -> torch.dtype:
    """The dtype that whole rows of logits are kept in on a GPU: the operands', or fp32 with RIME_FAST_FP32_LOGITS=1."""
    return torch.float32 if os.environ.get(LOGITS_ENVIRONMENT) == "1" else operands
