"""Which backend of operator A runs, and the operators' bodies in terms of backend functions on real tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from rime_fast.ops.dispatch import BackendTable
from rime_fast.ops.logprob_pool import chunked, panels, triton_backend, vocab_parallel
from rime_fast.ops.logprob_pool.pooling import pool_backward_, pool_forward
from rime_fast.ops.logprob_pool.statistics import Gradients, Needs, Statistics, gradient_dtype


def _any(_: Tensor) -> str | None:
    return None


def _no_fp64(tensor: Tensor) -> str | None:
    return "it computes in fp32; fp64 runs on the reference" if tensor.dtype == torch.float64 else None


TABLE = BackendTable(
    op="logprob",
    probes={"reference": _any, "chunked": _no_fp64, "triton": triton_backend.why_not},
    order={"cpu": ("chunked", "reference"), "cuda": ("triton", "chunked", "reference")},
)


def engine_for(backend: str, hidden: Tensor) -> Any:
    """The module that does the work; all have scored_rows, forward and backward."""
    if backend == "triton":
        return triton_backend
    return panels if hidden.is_cuda else chunked


Body = TypeVar("Body", bound=Callable[..., Any])


def _in_own_precision(body: Body) -> Body:
    """Without autocast: the operands came cast to it (arguments.py), the fp32 products must not be cut short."""

    @wraps(body)
    def run(*args: Any) -> Any:
        kind = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(kind, enabled=False):
            return body(*args)

    return run  # type: ignore[return-value]


def _plain(bias: Tensor | None) -> Tensor | None:
    """The bias as the row kernels take it."""
    return None if bias is None else bias.float().contiguous()


@_in_own_precision
def forward(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    normalize: bool,
    backend: str,
    max_scored: int,
    vocab_start: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Body of rime_fast::logprob_pool."""
    engine = engine_for(backend, hidden)
    scored = engine.scored_rows(targets, ignore_index, max_scored)
    local = targets - vocab_start
    stats = engine.forward(hidden, lm_head, local, scored, _plain(bias), temperature, softcap, entropy)
    if group:
        stats = vocab_parallel.merge(stats, group)
    logp, row_entropy = _finish_rows(stats, targets, ignore_index)
    pooled, inv_norm = pool_forward(hidden, starts, ends, normalize)
    return logp, stats.lse, row_entropy, pooled, inv_norm


def _finish_rows(stats: Statistics, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """logp and entropy (empty if not asked for) from the rows' statistics."""
    ignored = targets == ignore_index
    logp = ((stats.hit - stats.lse[0]) - stats.lse[1]).masked_fill_(ignored, 0.0)
    return logp, stats.entropy.masked_fill_(ignored, 0.0) if stats.entropy.shape == logp.shape else stats.entropy


@_in_own_precision
def backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_pooled: Tensor | None,
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    logp: Tensor,
    lse: Tensor,
    row_entropy: Tensor,
    pooled: Tensor,
    inv_norm: Tensor,
    softcap: float,
    ignore_index: int,
    normalize: bool,
    backend: str,
    max_scored: int,
    vocab_start: int,
    group: str,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Body of rime_fast::logprob_pool_backward."""
    engine = engine_for(backend, hidden)
    if grad_logp is None and grad_entropy is None:
        targets = torch.full_like(targets, ignore_index)  # only read-outs were used: the head has no part in it
    scored = engine.scored_rows(targets, ignore_index, max_scored)
    rows_logp = torch.zeros_like(logp) if grad_logp is None else grad_logp
    found = engine.backward(
        hidden,
        lm_head,
        targets - vocab_start,
        scored,
        lse,
        logp + lse[0],
        None if grad_entropy is None else row_entropy,
        rows_logp,
        grad_entropy,
        _plain(bias),
        temperature,
        softcap,
        needs,
    )
    if group:
        found = vocab_parallel.reduce_gradients(found, group)
    if found.hidden is not None and grad_pooled is not None:
        pool_backward_(found.hidden, grad_pooled, pooled, inv_norm, starts, ends, normalize)
    return _as_results(found, hidden, lm_head, bias, temperature)


def _as_results(
    found: Gradients, hidden: Tensor, lm_head: Tensor, bias: Tensor | None, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def result(grad: Tensor | None, source: Tensor | None) -> Tensor:
        if grad is None or source is None:
            return hidden.new_empty(0)
        return grad.to(source.dtype)

    return (
        result(found.hidden, hidden),
        result(found.lm_head, lm_head),
        result(found.bias, bias),
        result(found.temperature, temperature),
    )


@_in_own_precision
def linear_ce(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    normalize: bool,
    backend: str,
    max_scored: int,
    vocab_start: int,
    group: str,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Body of rime_fast::linear_ce."""
    engine = engine_for(backend, hidden)
    scored = engine.scored_rows(targets, ignore_index, max_scored)
    merge = partial(vocab_parallel.merge, name=group) if group else None
    local, shift = targets - vocab_start, _plain(bias)
    if engine is chunked:
        stats, found = chunked.forward_with_gradient(
            hidden, lm_head, local, scored, token_weight, shift, temperature, softcap, entropy, needs, merge
        )
    else:  # cheaper there than whole rows of logits (docs/logprob_pool.md, "Two schedules")
        stats = engine.forward(hidden, lm_head, local, scored, shift, temperature, softcap, entropy)
        stats = merge(stats) if merge else stats
        found = engine.backward(
            hidden,
            lm_head,
            local,
            scored,
            stats.lse,
            stats.hit,
            None,
            -token_weight,
            None,
            shift,
            temperature,
            softcap,
            needs,
        )
    if group:
        found = vocab_parallel.reduce_gradients(found, group)
    logp, row_entropy = _finish_rows(stats, targets, ignore_index)
    pooled, inv_norm = pool_forward(hidden, starts, ends, normalize)
    # Ignored rows are left out, not multiplied by 0: their weight may be anything, 1/0 as well.
    loss = -torch.where(targets == ignore_index, 0.0, token_weight * logp).sum()

    def result(grad: Tensor | None, source: Tensor | None) -> Tensor:
        if grad is None or source is None:
            return hidden.new_empty(0)
        return grad.to(gradient_dtype(source.dtype))

    return (
        loss,
        logp,
        stats.lse,
        row_entropy,
        pooled,
        inv_norm,
        result(found.hidden, hidden),
        result(found.lm_head, lm_head),
        result(found.bias, bias),
        result(found.temperature, temperature),
    )
