"""Forward and backward of the contrastive loss on one process, from a backend's two sweeps.

A backend provides ``Sweep``-like objects (chunked.py): ``statistics(into)`` fills the softmax statistics of every
term, ``gradients(slopes, dq, dk)`` adds every term's gradient. All else, which is O(N D), is here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rime_fast.ops.contrastive import backends, chunked, softmax
from rime_fast.ops.contrastive.backends import AnySweep
from rime_fast.ops.contrastive.finite import require_finite, require_temperature
from rime_fast.ops.contrastive.inputs import accumulation_dtype
from rime_fast.ops.contrastive.positives import Positives, check_values
from rime_fast.ops.contrastive.products import scale_by, unit_of
from rime_fast.ops.contrastive.rows import Masks, Statistics
from rime_fast.ops.contrastive.softmax import Solved


@dataclass
class Options:
    """The settings of a call that are no tensors."""

    terms: list[tuple[int, int]]
    margin: float | None
    symmetric: bool
    backend: str


@dataclass
class Operands:
    """The tensors of a call; see ``contrastive_loss``."""

    queries: list[Tensor]
    keys: list[Tensor]
    temperature: Tensor
    labels: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None


def forward(x: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss of each term, hit@1 of each term, then Solved.rows and Solved.cols of each term for the backward)."""
    sweep, positives = make_sweep(x, options)
    n, n_keys = x.queries[0].shape[0], x.keys[0].shape[0]
    dtype = accumulation_dtype(x.queries[0].dtype)
    states = [Statistics.empty(positives.labels, n_keys, sweep.bounded, dtype) for _ in options.terms]
    sweep.statistics(states)
    solved = [softmax.solve(state, positives) for state in states]
    loss = torch.stack([term.total(positives, options.symmetric) for term in solved]) / n
    hit = torch.stack([softmax.hits(state).mean() for state in states])
    rows, cols = torch.stack([term.rows for term in solved]), torch.stack([term.cols for term in solved])
    return loss.to(dtype), hit.to(dtype), rows, cols


def backward(
    grad: Tensor, rows: Tensor, cols: Tensor, x: Operands, options: Options, needs: tuple[list[bool], list[bool]]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(dq of each query mode, dk of each key mode, d temperature); unneeded ones are empty tensors."""
    sweep, positives = make_sweep(x, options)
    weights = positives.key_weights(x.keys[0].shape[0])
    share = 0.5 if options.symmetric else 1.0
    factors = grad.double() * share / (x.temperature.double() * x.queries[0].shape[0])
    dtype, unit = accumulation_dtype(x.queries[0].dtype), unit_of(factors, sweep.queries[0].dtype)
    factors = factors if unit is None else factors / unit
    slopes = [
        softmax.make_slopes(Solved(*term), positives, weights, factor, options.symmetric, sweep.bounded, dtype)
        for *term, factor in zip(rows, cols, factors.unbind(), strict=True)
    ]
    dq = [torch.zeros_like(q, dtype=dtype) if need else None for q, need in zip(sweep.queries, needs[0], strict=True)]
    dk = [torch.zeros_like(k, dtype=dtype) if need else None for k, need in zip(sweep.keys, needs[1], strict=True)]
    sweep.gradients(slopes, dq, dk)
    scale_by(unit, [*dq, *dk])
    d_temperature = temperature_gradient(dq, sweep.queries, x.temperature)
    return as_gradients(dq, x.queries), as_gradients(dk, x.keys), d_temperature


def temperature_gradient(dq: list[Tensor | None], queries: list[Tensor], temperature: Tensor) -> Tensor:
    """-(1/t) sum_i dq_i . q_i over all modes, since every logit is q.k / t; an empty sum (no dq) gives 0."""
    total = torch.zeros((), dtype=torch.float64, device=temperature.device)
    for d, q in zip(dq, queries, strict=True):
        if d is not None:
            total = total - (d * q.to(d.dtype)).sum(1).double().sum()
    return (total / temperature.double()).to(temperature.dtype)


def as_gradients(found: list[Tensor | None], like: list[Tensor]) -> list[Tensor]:
    """In the inputs' dtype; an empty tensor where no gradient was wanted (an operator cannot return None)."""
    return [t.new_empty(0) if d is None else d.to(t.dtype) for d, t in zip(found, like, strict=True)]


def make_sweep(x: Operands, options: Options) -> tuple[AnySweep, Positives]:
    """The backend's sweep over the call's operands, and the positives."""
    n, n_keys = x.queries[0].shape[0], x.keys[0].shape[0]
    if x.labels is None:
        positives = Positives.of(torch.arange(n, device=x.queries[0].device))
    else:
        check_values(x.labels, n_keys)
        positives = Positives.of(x.labels)
    queries, keys = (backends.operands(options.backend, side) for side in (x.queries, x.keys))
    row_ids, col_ids = chunked.id_classes(x.query_ids, x.key_ids)
    masks = []
    for q, k in options.terms:
        mask = Masks(positives.labels, row_ids, col_ids)
        if options.margin is not None:
            similarity = chunked.pair_similarity(queries[q], keys[k], positives)
            mask.row_limit = similarity.amax(1) + options.margin
            mask.col_limit = positives.best_by_key(similarity, n_keys) + options.margin
        masks.append(mask)
    scale, bounded = x.temperature.reciprocal(), None
    if scale.device.type == "cpu":
        require_temperature(x.temperature)
        norms = float(chunked.largest_norm(queries)), float(chunked.largest_norm(keys))
        require_finite("queries", queries, norms[0])
        require_finite("keys", keys, norms[1])
        bounded = chunked.is_bounded(*norms, scale)
    return backends.make_sweep(options.backend, queries, keys, options.terms, scale, masks, bounded), positives
