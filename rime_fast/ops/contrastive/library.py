"""The contrastive loss in torch.library: two operators with fake implementations and autograd.

    rime_fast::contrastive           queries, keys, ... -> loss and hit@1 of each term (+ log-sum-exps for the backward)
    rime_fast::contrastive_backward  the same, upstream gradients -> dq, dk, d temperature; recomputes the tiles

Neither has a second derivative: ``backend="reference"`` is plain torch and has all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rime_fast.ops.contrastive.inputs import accumulation_dtype
from rime_fast.ops.contrastive.local import Operands, Options, backward, forward


@torch.library.custom_op("rime_fast::contrastive", mutates_args=())
def contrastive(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    temperature: Tensor,
    labels: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    term_queries: Sequence[int],
    term_keys: Sequence[int],
    margin: float | None,
    symmetric: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [terms], hit@1 [terms], and softmax.Solved for the backward: [terms, 2 + P, N] and [terms, 3, K] fp64)."""
    operands = Operands(list(queries), list(keys), temperature, labels, query_ids, key_ids)
    return forward(operands, Options(list(zip(term_queries, term_keys, strict=True)), margin, symmetric, backend))


@contrastive.register_fake
def _(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    temperature: Tensor,
    labels: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    term_queries: Sequence[int],
    term_keys: Sequence[int],
    margin: float | None,
    symmetric: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms, like = len(term_queries), queries[0]
    loss = like.new_empty(terms, dtype=accumulation_dtype(like.dtype))
    positives = 1 if labels is None or labels.dim() == 1 else labels.shape[1]
    rows = like.new_empty(terms, 2 + positives, like.shape[0], dtype=torch.float64)
    cols = like.new_empty(terms, 3, keys[0].shape[0], dtype=torch.float64)
    return loss, torch.empty_like(loss), rows, cols


@torch.library.custom_op("rime_fast::contrastive_backward", mutates_args=())
def contrastive_backward(
    grad: Tensor,
    rows: Tensor,
    cols: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    temperature: Tensor,
    labels: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    term_queries: Sequence[int],
    term_keys: Sequence[int],
    margin: float | None,
    symmetric: bool,
    backend: str,
    need_queries: Sequence[bool],
    need_keys: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(dq of each query mode, dk of each key mode, d temperature); [0] where not needed."""
    operands = Operands(list(queries), list(keys), temperature, labels, query_ids, key_ids)
    options = Options(list(zip(term_queries, term_keys, strict=True)), margin, symmetric, backend)
    return backward(grad, rows, cols, operands, options, (list(need_queries), list(need_keys)))


@contrastive_backward.register_fake
def _(
    grad: Tensor,
    rows: Tensor,
    cols: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    temperature: Tensor,
    labels: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    term_queries: Sequence[int],
    term_keys: Sequence[int],
    margin: float | None,
    symmetric: bool,
    backend: str,
    need_queries: Sequence[bool],
    need_keys: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    def like(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        return [t.new_empty(t.shape) if need else t.new_empty(0) for t, need in zip(tensors, needs, strict=True)]

    return like(queries, need_queries), like(keys, need_keys), torch.empty_like(temperature)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, temperature, labels, query_ids, key_ids = inputs[:6]
    ctx.sizes = len(queries), len(keys)
    ctx.options = inputs[6:]
    ctx.save_for_backward(*output[2:], temperature, labels, query_ids, key_ids, *queries, *keys)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    rows, cols, temperature, labels, query_ids, key_ids, *embeddings = ctx.saved_tensors
    n_query_modes, n_key_modes = ctx.sizes
    need_q, need_k, need_t = ctx.needs_input_grad[:3]
    rest = (None,) * 8
    if grad is None:
        return [None] * n_query_modes, [None] * n_key_modes, None, *rest
    dq, dk, dt = torch.ops.rime_fast.contrastive_backward(
        grad,
        rows,
        cols,
        embeddings[:n_query_modes],
        embeddings[n_query_modes:],
        temperature,
        labels,
        query_ids,
        key_ids,
        *ctx.options,
        [need or need_t for need in need_q],
        list(need_k),
    )
    return (
        [d if need else None for d, need in zip(dq, need_q, strict=True)],
        [d if need else None for d, need in zip(dk, need_k, strict=True)],
        dt if need_t else None,
        *rest,
    )


contrastive.register_autograd(_backward, setup_context=_setup)
