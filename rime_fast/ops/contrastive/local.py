"""Forward and backward of the contrastive loss on one process, from a backend's two sweeps.

A backend provides ``Sweep``-like objects (chunked.py): ``statistics(into)`` fills the softmax statistics of every
term, ``gradients(slopes, dq, dk)`` adds every term's gradient. All else, which is O(N D), is here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rime_fast.ops._checks import require_range
from rime_fast.ops.contrastive import backends, chunked, softmax
from rime_fast.ops.contrastive.backends import AnySweep
from rime_fast.ops.contrastive.inputs import accumulation_dtype
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
    sweep, labels = make_sweep(x, options)
    n, n_keys = x.queries[0].shape[0], x.keys[0].shape[0]
    dtype = accumulation_dtype(x.queries[0].dtype)
    states = [Statistics.empty(n, n_keys, sweep.bounded, dtype, labels.device) for _ in options.terms]
    sweep.statistics(states)
    solved = [softmax.solve(state, softmax.lse_by_label(state.positive, labels, n_keys)) for state in states]
    loss = torch.stack([term.row_loss().mean() for term in solved])
    if options.symmetric:
        loss = 0.5 * (loss + torch.stack([term.col_loss(labels).mean() for term in solved]))
    hit = torch.stack([softmax.hits(state).mean() for state in states])
    rows, cols = torch.stack([term.rows for term in solved]), torch.stack([term.cols for term in solved])
    return loss.to(dtype), hit.to(dtype), rows, cols


def backward(
    grad: Tensor, rows: Tensor, cols: Tensor, x: Operands, options: Options, needs: tuple[list[bool], list[bool]]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(dq of each query mode, dk of each key mode, d temperature); unneeded ones are empty tensors."""
    sweep, labels = make_sweep(x, options)
    counts = softmax.label_counts(labels, x.keys[0].shape[0])
    share = 0.5 if options.symmetric else 1.0
    factors = grad.double() * share / (x.temperature.double() * x.queries[0].shape[0])
    dtype = accumulation_dtype(x.queries[0].dtype)
    slopes = [
        softmax.make_slopes(Solved(*term), labels, counts, factor, options.symmetric, sweep.bounded, dtype)
        for *term, factor in zip(rows, cols, factors.unbind(), strict=True)
    ]
    dq = [torch.zeros_like(q, dtype=dtype) if need else None for q, need in zip(sweep.queries, needs[0], strict=True)]
    dk = [torch.zeros_like(k, dtype=dtype) if need else None for k, need in zip(sweep.keys, needs[1], strict=True)]
    sweep.gradients(slopes, dq, dk)
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


def make_sweep(x: Operands, options: Options) -> tuple[AnySweep, Tensor]:
    """The backend's sweep over the call's operands, and the labels."""
    n, n_keys = x.queries[0].shape[0], x.keys[0].shape[0]
    labels = x.labels
    if labels is None:
        labels = torch.arange(n, device=x.queries[0].device)
    else:
        require_range("labels", labels, 0, n_keys)
        labels = labels.contiguous()
    queries, keys = (backends.operands(options.backend, side) for side in (x.queries, x.keys))
    row_ids, col_ids = chunked.id_classes(x.query_ids, x.key_ids)
    masks = []
    for q, k in options.terms:
        mask = Masks(labels, row_ids, col_ids)
        if options.margin is not None:
            similarity = chunked.pair_similarity(queries[q], keys[k], labels)
            mask.row_limit = similarity + options.margin
            mask.col_limit = chunked.best_of_column(similarity, labels, n_keys) + options.margin
        masks.append(mask)
    scale, bounded = x.temperature.reciprocal(), None
    if options.backend == "chunked":
        bounded = chunked.is_bounded(chunked.largest_norm(queries), chunked.largest_norm(keys), scale)
    return backends.make_sweep(options.backend, queries, keys, options.terms, scale, masks, bounded), labels
