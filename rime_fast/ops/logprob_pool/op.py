"""Operator A, public: log-probs, entropy and pooled embeddings of one pass over the hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool import backends, library
from rime_fast.ops.logprob_pool import linear_ce as _linear_ce  # noqa: F401  (registers the operator)
from rime_fast.ops.logprob_pool.arguments import Call, Pool, check_weight, prepare
from rime_fast.ops.logprob_pool.reference import reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LogprobPool(NamedTuple):
    """What one pass over the hidden states gives.

    logp: [T] fp32, log-probability of targets[t] at row t; 0 where ignored.
    entropy: [T] fp32 in nats, 0 where ignored; None unless asked for.
    embeddings: name of the pool -> [N, H] fp32, unit norm if ``normalize``.
    All are fp64 when ``hidden`` is fp64 (which runs on the reference).
    """

    logp: Tensor
    entropy: Tensor | None
    embeddings: dict[str, Tensor]


def fused_logprob_pool(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    pools: Mapping[str, Pool] | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    normalize: bool = True,
    backend: str = "auto",
    vocab_group: ProcessGroup | None = None,
    max_scored: int | None = None,
) -> LogprobPool:
    """Log-probabilities of given tokens, entropies and pooled embeddings, without the logits in memory.

    With s = lm_head h_t + bias, s <- softcap tanh(s / softcap) if softcap, z = s / temperature:
    logp_t = z[targets_t] - logsumexp(z). Only rows whose target is not ``ignore_index`` meet the head. The backward
    recomputes the logits (8 M H V FLOP for M scored rows) and makes one gradient buffer for ``hidden``, into which
    the pools' gradients are added. logp of a row is the same bits whatever else is in the batch.

    hidden: [T, H] bf16, fp16, fp32 (fp64 on the reference). lm_head: [V, H] of the same dtype (or under autocast).
    targets: [T] integer, the token scored AT row t (already shifted), in [0, V) or ``ignore_index``.
    pools: name -> row index [N], or (starts [N], ends [N]) for the mean over rows [start, end).
    bias: [V]. temperature: a number above 0, or a 0-d tensor, which gets a gradient. softcap: a number above 0.
    backend: "auto", "reference", "chunked", "triton", "cuda"; see rime_fast.ops.dispatch.
    vocab_group: process group over which lm_head and bias are split by vocabulary, V/p rows on each rank in rank
        order; everything else is the same on all ranks, targets are numbers in the whole vocabulary.
    max_scored: a bound on the number of scored rows that the host knows (the collator counts them); on CUDA it bounds
        the workspace, and the library backend's work, which otherwise follow T. The result does not depend on it.

    Raises TypeError or ValueError naming the argument. On an accelerator, values inside tensors are checked by an
    asynchronous device assertion instead.
    """
    call = prepare(
        hidden,
        lm_head,
        targets,
        pools,
        bias,
        temperature,
        softcap,
        ignore_index,
        entropy,
        normalize,
        vocab_group,
        max_scored,
    )
    chosen = backends.TABLE.choose(backend, call.hidden)
    return _logprob_pool(call, chosen)


def fused_linear_ce(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    token_weight: Tensor | None = None,
    pools: Mapping[str, Pool] | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    normalize: bool = True,
    backend: str = "auto",
    vocab_group: ProcessGroup | None = None,
    max_scored: int | None = None,
) -> tuple[Tensor, LogprobPool]:
    """(sum_t token_weight_t * -logp_t, the pass's LogprobPool), the gradients made in the forward (6 M H V FLOP).

    token_weight: [T], 1 everywhere by default (divide it by the number of scored tokens for a mean); it gets a
    gradient if it asks for one. The loss is 0-d fp32. All other arguments as in ``fused_logprob_pool``. The returned
    LogprobPool is differentiable too; a gradient through its logp or entropy costs a recomputation, one through its
    embeddings does not. On CUDA, where the logits of enough rows to fill the chip exceed the workspace, the logits are
    recomputed here as well (8 M H V): docs/logprob_pool.md says why.
    """
    call = prepare(
        hidden,
        lm_head,
        targets,
        pools,
        bias,
        temperature,
        softcap,
        ignore_index,
        entropy,
        normalize,
        vocab_group,
        max_scored,
    )
    weight = check_weight(token_weight, call.hidden)
    chosen = backends.TABLE.choose(backend, call.hidden)
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (call.hidden, call.lm_head, call.bias, call.temperature)
    )
    if chosen == "reference" or not trains:
        found = _logprob_pool(call, chosen)
        # Ignored rows are left out, not multiplied by 0: their weight may be anything, 1/0 as well.
        return -torch.where(call.targets == ignore_index, 0.0, weight * found.logp).sum(), found
    loss, logp, _, row_entropy, pooled, *_ = torch.ops.rime_fast.linear_ce(
        call.hidden,
        call.lm_head,
        call.targets,
        weight,
        call.starts,
        call.ends,
        call.bias,
        call.temperature,
        call.softcap,
        call.ignore_index,
        call.entropy,
        call.normalize,
        chosen,
        call.max_scored,
        call.vocab_start,
        call.group,
        library.REVISION,
        call.hidden.requires_grad,
        call.lm_head.requires_grad,
        call.bias is not None and call.bias.requires_grad,
        call.temperature.requires_grad,
    )
    return loss, _as_output(call, logp, row_entropy, pooled)


def _logprob_pool(call: Call, backend: str) -> LogprobPool:
    if backend == "reference":
        if call.group:
            raise ValueError("vocab_group: the reference backend works on a whole head; use backend='chunked'")
        logp, row_entropy, pooled = reference(
            call.hidden,
            call.lm_head,
            call.targets,
            call.starts,
            call.ends,
            call.bias,
            call.temperature,
            call.softcap,
            call.ignore_index,
            call.entropy,
            call.normalize,
        )
    else:
        logp, _, row_entropy, pooled, _ = torch.ops.rime_fast.logprob_pool(
            call.hidden,
            call.lm_head,
            call.targets,
            call.starts,
            call.ends,
            call.bias,
            call.temperature,
            call.softcap,
            call.ignore_index,
            call.entropy,
            call.normalize,
            backend,
            call.max_scored,
            call.vocab_start,
            call.group,
            library.REVISION,
        )
    return _as_output(call, logp, row_entropy, pooled)


def _as_output(call: Call, logp: Tensor, row_entropy: Tensor | None, pooled: Tensor) -> LogprobPool:
    embeddings = dict(zip(call.names, pooled.split(list(call.sizes)), strict=True)) if call.names else {}
    return LogprobPool(logp, row_entropy if call.entropy else None, embeddings)
