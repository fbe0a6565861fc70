"""Drawing the next token (temperature, top-k, top-p) and seeing loops, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Raise ValueError for a setting out of range, naming it."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or a positive number")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; expected a number above 0, up to 1")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; expected 0 (off) or a positive count")


def filter_logits(logits: Tensor, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Narrow logits [N, V] to what may be drawn: -inf outside the ``top_k`` largest, then outside the smallest set of
    probability ``top_p``.

    The order and the rules of transformers' warpers: ties at the k-th value stay in, and the token that carries the
    sum across ``top_p`` stays in, here with all that are as likely.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1.0:
        lowest = _floor_by_kernel(logits, top_p) if logits.is_cuda else _floor_by_sort(logits, top_p)
        logits = logits.masked_fill(logits < lowest[:, None], float("-inf"))
    return logits


def _floor_by_kernel(logits: Tensor, top_p: float) -> Tensor:
    from rime_fast.engine.triton_nucleus import nucleus_floor

    return nucleus_floor(logits, top_p)


def _floor_by_sort(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit of the smallest set of probability ``top_p``, [N]."""
    values = logits.sort(dim=-1, descending=True).values
    probs = values.softmax(dim=-1)
    outside = probs.cumsum(dim=-1) - probs >= top_p
    outside[:, 0] = False
    return values.masked_fill(outside, float("inf")).amin(dim=-1)


def draw_tokens(
    logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None
) -> Tensor:
    """Draw one token for each row of ``logits`` [N, V] -> [N] int64; temperature 0 takes the largest logit.

    Neither way waits for the device, as ``torch.multinomial`` may: on the CPU one uniform number a row meets the
    cumulative sum (fp64), elsewhere the tokens race. A row with a NaN gives some token: its log-probability is NaN.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probs = filter_logits(logits / temperature, top_p, top_k).softmax(dim=-1)
    draw = _draw_by_sum if logits.device.type == "cpu" else _draw_by_race
    return draw(probs, generator)


def _draw_by_sum(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """The first token whose cumulative probability exceeds a uniform number: one random number a row."""
    summed = probs.cumsum(dim=-1, dtype=torch.float64)
    total = summed[:, -1:]
    uniform = torch.rand(total.shape, dtype=torch.float64, device=probs.device, generator=generator)
    # Below the total even when the product rounds up: a token of probability 0 is never drawn.
    point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(summed, point, right=True)[:, 0]
    return torch.where(found < probs.shape[-1], found, 0)


def _draw_by_race(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """argmax of p / E with E ~ Exp(1) has the distribution p."""
    race = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / race).argmax(dim=-1)


class LoopGuard:
    """Sees responses that have fallen into a loop: the same 1 to ``PERIODS`` tokens, ``limit`` times in a row.

    One row a response; ``limit`` 0 sees none. Memory [N, PERIODS]: tokens that agree with the one a period earlier,
    in a row, up to now, for every period.
    """

    PERIODS = 16

    def __init__(self, rows: int, limit: int, device: torch.device) -> None:
        if limit == 1 or limit < 0:
            raise ValueError(f"repetition_limit is {limit}; expected 0 (off) or at least 2 repetitions")
        self.limit = limit
        self.recent = torch.full((rows, self.PERIODS), -1, device=device)  # the newest first
        self.agree = torch.zeros((rows, self.PERIODS), dtype=torch.int64, device=device)
        # a period of p tokens stands `limit` times when p * (limit - 1) tokens in a row equal the one p before
        self.enough = torch.arange(1, self.PERIODS + 1).mul(limit - 1).to(device, non_blocking=True)

    def looping(self, token: Tensor) -> Tensor:
        """Take in one more token a row, [N] int64, and say which rows are in a loop now, [N] bool."""
        self.agree = torch.where(self.recent == token[:, None], self.agree + 1, 0)
        self.recent = torch.cat([token[:, None], self.recent[:, :-1]], dim=1)
        return (self.agree >= self.enough).any(dim=1)

    def keep(self, kept: Tensor) -> None:
        """Go on with the rows ``kept``."""
        self.recent, self.agree = self.recent.index_select(0, kept), self.agree.index_select(0, kept)


def cut_loops(tokens: Tensor, lengths: Tensor, limit: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Cut whole responses [N, R] where ``LoopGuard`` would have ended them; (tokens, lengths [N]), padded anew."""
    if limit == 0:
        return tokens, lengths
    guard, ends = LoopGuard(len(tokens), limit, tokens.device), lengths
    for step in range(tokens.shape[1]):
        seen = guard.looping(tokens[:, step])
        ends = torch.where(seen & (ends > step + 1), step + 1, ends)
    outside = torch.arange(tokens.shape[1], device=tokens.device) >= ends[:, None]
    return tokens.masked_fill(outside, pad_id), ends
