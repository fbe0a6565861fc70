"""Operator A in torch.library: three operators with fake implementations and autograd.

    rime_fast::logprob_pool           hidden, head, ... -> logp, entropy, read-outs (+ lse, inv_norm for the backward)
    rime_fast::logprob_pool_backward  the same, upstream gradients -> gradients; recomputes the logits (8MHV in all)
    rime_fast::linear_ce              loss and its gradients from one set of logits (6MHV in all)

The derivative of ``logprob_pool_backward`` (a second derivative of the operator) runs through reference.py. Optional
results are empty tensors, since an operator's results cannot be None.

Both forward operators take ``REVISION``, a digest of the traced code of this folder. torch.compile keeps compiled
graphs on disk under a key made from the forward graph; a backward that another version of this code traced would
otherwise be called with that version's arguments.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool import backends
from rime_fast.ops.logprob_pool.reference import reference
from rime_fast.ops.logprob_pool.statistics import Needs


def _digest() -> str:
    """Of the files whose functions torch.compile traces into its graphs."""
    found = hashlib.sha256()
    for name in ("library.py", "linear_ce.py"):
        found.update(Path(__file__).with_name(name).read_bytes())
    return found.hexdigest()[:12]


REVISION = _digest()
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Grads = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("rime_fast::logprob_pool", mutates_args=())
def logprob_pool(
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
    revision: str,
) -> Outputs:
    """(logp [T], lse [2, T], entropy [T] or [0], read-outs [K, H], inv_norm [K]), fp32."""
    return backends.forward(
        hidden,
        lm_head,
        targets,
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
    )


@logprob_pool.register_fake
def _(
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
    revision: str,
) -> Outputs:
    return _fake_outputs(hidden, starts, entropy)


def _fake_outputs(hidden: Tensor, starts: Tensor, entropy: bool) -> Outputs:
    row = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    read_outs = hidden.new_empty(starts.shape[0], hidden.shape[1], dtype=torch.float32)
    inv_norm = hidden.new_empty(starts.shape[0], dtype=torch.float32)
    row_entropy = torch.empty_like(row) if entropy else row.new_empty(0)
    return row, row.new_empty(2, hidden.shape[0]), row_entropy, read_outs, inv_norm


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    hidden, lm_head, targets, starts, ends, bias, temperature = inputs[:7]
    ctx.options = inputs[7:-1]
    logp, lse, entropy, pooled, inv_norm = output
    ctx.save_for_backward(
        hidden, lm_head, targets, starts, ends, bias, temperature, logp, lse, entropy, pooled, inv_norm
    )
    ctx.mark_non_differentiable(lse, inv_norm)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logp, _, grad_entropy, grad_pooled, _ = grads
    needs = ctx.needs_input_grad
    entropy = ctx.options[2]
    found = torch.ops.rime_fast.logprob_pool_backward(
        grad_logp,
        grad_entropy if entropy else None,
        grad_pooled,
        *ctx.saved_tensors,
        *ctx.options,
        needs[0],
        needs[1],
        needs[5],
        needs[6],
    )
    return _spread(found, needs, len(ctx.options) + 1)


def _spread(found: Grads, needs: tuple[bool, ...], options: int) -> tuple[Tensor | None, ...]:
    """The four gradients at the places of hidden, lm_head, bias and temperature among the operator's inputs."""
    hidden, lm_head, bias, temperature = (
        grad if need else None for grad, need in zip(found, (needs[0], needs[1], needs[5], needs[6]), strict=True)
    )
    return hidden, lm_head, None, None, None, bias, temperature, *([None] * options)


logprob_pool.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("rime_fast::logprob_pool_backward", mutates_args=())
def logprob_pool_backward(
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
    entropy: bool,
    normalize: bool,
    backend: str,
    max_scored: int,
    vocab_start: int,
    group: str,
    need_hidden: bool,
    need_lm_head: bool,
    need_bias: bool,
    need_temperature: bool,
) -> Grads:
    """Gradients of hidden, lm_head, bias and temperature, in their dtypes; empty where not needed."""
    return backends.backward(
        grad_logp,
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
        row_entropy,
        pooled,
        inv_norm,
        softcap,
        ignore_index,
        normalize,
        backend,
        max_scored,
        vocab_start,
        group,
        Needs(need_hidden, need_lm_head, need_bias, need_temperature),
    )


def _fake_grads(hidden: Tensor, lm_head: Tensor, bias: Tensor | None, temperature: Tensor, needs: Needs) -> Grads:
    def like(tensor: Tensor | None, need: bool) -> Tensor:
        if tensor is None or not need:
            return hidden.new_empty(0)
        return tensor.new_empty(tensor.shape)

    return (
        like(hidden, needs.hidden),
        like(lm_head, needs.lm_head),
        like(bias, needs.bias),
        like(temperature, needs.temperature),
    )


@logprob_pool_backward.register_fake
def _(
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
    entropy: bool,
    normalize: bool,
    backend: str,
    max_scored: int,
    vocab_start: int,
    group: str,
    need_hidden: bool,
    need_lm_head: bool,
    need_bias: bool,
    need_temperature: bool,
) -> Grads:
    needs = Needs(need_hidden, need_lm_head, need_bias, need_temperature)
    return _fake_grads(hidden, lm_head, bias, temperature, needs)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Grads) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.softcap, ctx.ignore_index, ctx.entropy, ctx.normalize = inputs[15:19]
    ctx.group = inputs[22]
    ctx.needs = inputs[23:27]
    ctx.set_materialize_grads(False)


def _second_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second derivatives: differentiate the reference's own gradients with respect to everything they depend on."""
    if ctx.group:
        raise RuntimeError("fused_logprob_pool: no second derivative over a vocabulary group; use the whole head")
    saved = ctx.saved_tensors
    wanted = [i for i in (0, 1, 2, 3, 4, 8, 9) if ctx.needs_input_grad[i] and saved[i] is not None]
    with torch.enable_grad():
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in saved]
        up, (hidden, lm_head, targets, starts, ends, bias, temperature) = leaves[:3], leaves[3:]
        logp, entropy, pooled = reference(
            hidden,
            lm_head,
            targets,
            starts,
            ends,
            bias,
            temperature,
            ctx.softcap,
            ctx.ignore_index,
            ctx.entropy,
            ctx.normalize,
        )
        pairs = [(y, u) for y, u in zip((logp, entropy, pooled), up, strict=True) if y is not None and u is not None]
        inputs = [t for t, need in zip((hidden, lm_head, bias, temperature), ctx.needs, strict=True) if need]
        first = torch.autograd.grad(
            [y for y, _ in pairs], inputs, [u for _, u in pairs], create_graph=True, allow_unused=True
        )
        above = [g for g, need in zip(grads, ctx.needs, strict=True) if need]
        live = [(y, g.to(y.dtype)) for y, g in zip(first, above, strict=True) if y is not None and g is not None]
        result = torch.autograd.grad(
            [y for y, _ in live], [leaves[i] for i in wanted], [g for _, g in live], allow_unused=True
        )
    out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(wanted, result, strict=True):
        out[i] = grad
    return tuple(out)


logprob_pool_backward.register_autograd(_second_backward, setup_context=_setup_second)
