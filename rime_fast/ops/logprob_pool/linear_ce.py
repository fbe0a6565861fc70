"""rime_fast::linear_ce: the weighted cross-entropy with its gradients made in the forward (6MHV FLOP).

The gradients for an upstream gradient of 1 are results of the operator. The backward scales them in place and adds
the read-outs' gradients to that of ``hidden``. Whatever that cannot serve (a gradient that arrives at logp or entropy
as well, a second pass over a retained graph, a second derivative) goes through rime_fast::logprob_pool_backward,
which recomputes the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool import backends
from rime_fast.ops.logprob_pool.pooling import pool_backward_
from rime_fast.ops.logprob_pool.statistics import Needs, gradient_dtype

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("rime_fast::linear_ce", mutates_args=())
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
    revision: str,
    need_hidden: bool,
    need_lm_head: bool,
    need_bias: bool,
    need_temperature: bool,
) -> Results:
    """(loss, logp, lse, entropy, read-outs, inv_norm, d hidden, d lm_head, d bias, d temperature)."""
    return backends.linear_ce(
        hidden,
        lm_head,
        targets,
        token_weight,
        starts,
        ends,
        bias,
        temperature,
        softcap,
        ignore_index,
        entropy,
        normalize,
        backend,
        max_scored,
        vocab_start,
        group,
        Needs(need_hidden, need_lm_head, need_bias, need_temperature),
    )


@linear_ce.register_fake
def _(
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
    revision: str,
    need_hidden: bool,
    need_lm_head: bool,
    need_bias: bool,
    need_temperature: bool,
) -> Results:
    def like(tensor: Tensor | None, need: bool) -> Tensor:
        if tensor is None or not need:
            return hidden.new_empty(0)
        return tensor.new_empty(tensor.shape, dtype=gradient_dtype(tensor.dtype))

    row = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return (
        row.new_empty(()),
        row,
        row.new_empty(2, hidden.shape[0]),
        torch.empty_like(row) if entropy else row.new_empty(0),
        row.new_empty(starts.shape[0], hidden.shape[1]),
        row.new_empty(starts.shape[0]),
        like(hidden, need_hidden),
        like(lm_head, need_lm_head),
        like(bias, need_bias),
        like(temperature, need_temperature),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    hidden, lm_head, targets, token_weight, starts, ends, bias, temperature = inputs[:8]
    ctx.options = inputs[8:16]
    _, logp, lse, entropy, pooled, inv_norm, *made = output
    ctx.save_for_backward(
        hidden, lm_head, targets, token_weight, starts, ends, bias, temperature, logp, lse, entropy, pooled, inv_norm
    )
    # Kept as attributes, not as saved tensors: the backward scales them in place, once (see _backward).
    ctx.made = tuple(made)
    ctx.mark_non_differentiable(lse, inv_norm, *made)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss, grad_logp, _, grad_entropy, grad_pooled = grads[:5]
    (hidden, lm_head, targets, token_weight, starts, ends, bias, temperature, logp, lse, entropy, pooled, inv_norm) = (
        ctx.saved_tensors
    )
    needs = ctx.needs_input_grad
    wanted = (needs[0], needs[1], needs[6], needs[7])
    _, _, with_entropy, normalize, *_ = ctx.options
    grad_entropy = grad_entropy if with_entropy else None
    made, ctx.made = ctx.made, None
    if made is not None and grad_logp is None and grad_entropy is None and not torch.is_grad_enabled():
        found = _finish(
            made,
            (hidden, lm_head, bias, temperature),
            wanted,
            grad_loss,
            grad_pooled,
            (pooled, inv_norm, starts, ends, normalize),
        )
    else:
        upstream = grad_logp
        if grad_loss is not None:
            upstream = -grad_loss * token_weight if grad_logp is None else grad_logp - grad_loss * token_weight
        found = torch.ops.rime_fast.logprob_pool_backward(
            upstream,
            grad_entropy,
            grad_pooled,
            hidden,
            lm_head,
            targets,
            starts,
            ends,
            bias,
            temperature,
            logp,
            lse,
            entropy,
            pooled,
            inv_norm,
            *ctx.options,
            *wanted,
        )
    d_hidden, d_head, d_bias, d_temperature = (g if need else None for g, need in zip(found, wanted, strict=True))
    d_weight = -logp * grad_loss if needs[3] and grad_loss is not None else None
    rest = [None] * (len(ctx.options) + 5)  # the revision and the four needs
    return d_hidden, d_head, None, d_weight, None, None, d_bias, d_temperature, *rest


def _finish(
    made: tuple[Tensor, ...],
    inputs: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    grad_loss: Tensor | None,
    grad_pooled: Tensor | None,
    pools: tuple[Tensor, Tensor, Tensor, Tensor, bool],
) -> tuple[Tensor, ...]:
    """The made gradients times the upstream gradient, the read-outs' gradients added: in place when real."""
    real = type(made[0]) is Tensor  # tracing wants functions without side effects
    result = []
    for grad, source, want in zip(made, inputs, wanted, strict=True):
        if source is None or not want:
            result.append(grad)
            continue
        if grad_loss is None:
            grad = torch.zeros_like(grad)
        elif real:
            # On the CPU reading the factor is free, and it is mostly 1.
            if grad_loss.device.type != "cpu" or float(grad_loss) != 1.0:
                grad = grad.mul_(grad_loss.to(grad.dtype))
        else:
            grad = grad * grad_loss.to(grad.dtype)
        result.append(grad.to(source.dtype))
    if wanted[0] and grad_pooled is not None:
        pooled, inv_norm, starts, ends, normalize = pools
        if real:
            pool_backward_(result[0], grad_pooled, pooled, inv_norm, starts, ends, normalize)
        else:
            result[0] = torch.ops.rime_fast.pool_add(result[0], grad_pooled, pooled, inv_norm, starts, ends, normalize)
    return tuple(result)


linear_ce.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("rime_fast::pool_add", mutates_args=())
def pool_add(
    grad_hidden: Tensor,
    grad: Tensor,
    pooled: Tensor,
    inv_norm: Tensor,
    starts: Tensor,
    ends: Tensor,
    normalize: bool,
) -> Tensor:
    """grad_hidden plus the read-outs' gradients, as a new tensor (for compiled graphs)."""
    result = grad_hidden.clone()
    pool_backward_(result, grad, pooled, inv_norm, starts, ends, normalize)
    return result


@pool_add.register_fake
def _(
    grad_hidden: Tensor,
    grad: Tensor,
    pooled: Tensor,
    inv_norm: Tensor,
    starts: Tensor,
    ends: Tensor,
    normalize: bool,
) -> Tensor:
    return torch.empty_like(grad_hidden)
