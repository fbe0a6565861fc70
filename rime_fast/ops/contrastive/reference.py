"""The contrastive loss in plain torch: the truth for tests and the path for double backward.

It holds the whole similarity matrix of a term; read it first, the other backends compute the same numbers in tiles.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rime_fast.ops.collectives import gather_rows
from rime_fast.ops.contrastive.problem import (
    SAME_SIMILARITY,
    Inputs,
    Options,
    accumulation_dtype,
    check_labels,
    positive_temperature,
    require_finite,
    require_temperature,
    unit_rows,
)
from rime_fast.ops.contrastive.softmax import Positives

if TYPE_CHECKING:
    from rime_fast.ops.contrastive.agreement import Agreement


def one_rank(x: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Compute the loss of one process alone, (loss of each term, hit@1 of each term), its values checked as far as they
    can be read."""
    if x.labels is None:
        x = x._replace(labels=torch.arange(x.n_queries, device=x.queries[0].device))
    else:
        check_labels(x.labels, x.n_keys)
    readable = x.queries[0].device.type == "cpu" and not torch.compiler.is_compiling()
    if readable:
        require_temperature(x.temperature.detach())
        require_finite("queries", x.queries, math.inf)  # an infinite positive would give the loss 0
        require_finite("keys", x.keys, math.inf)
    return reference_terms(x._replace(temperature=positive_temperature(x.temperature)), options)


def over_group(x: Inputs, options: Options, agreed: Agreement) -> tuple[Tensor, Tensor]:
    """Compute the whole loss on every rank from gathered rows, its own rows live and the others constant.

    The gradient of its rows is then complete without a collective in the backward; W times the arithmetic, no matter:
    this is the truth that the tiled path is tested against.
    """

    def with_own(rows: Tensor, counts: list[int]) -> Tensor:
        parts = list(gather_rows(rows, counts, agreed.group).split(counts))
        parts[agreed.rank] = rows
        return torch.cat(parts)

    queries, keys = agreed.n_queries, agreed.n_keys
    labels = x.labels
    if labels is None:
        labels = torch.arange(x.n_queries, device=x.queries[0].device) + sum(keys[: agreed.rank])
    # Each rank takes its own rows' share of the gradient to the temperature.
    temperature = list(x.temperature.detach().expand(sum(queries)).split(queries))
    temperature[agreed.rank] = x.temperature.expand(x.n_queries)
    whole = Inputs(
        [with_own(rows, queries) for rows in x.queries],
        [with_own(rows, keys) for rows in x.keys],
        torch.cat(temperature),
        gather_rows(labels, queries, agreed.group),
        None if x.query_ids is None else gather_rows(x.query_ids, queries, agreed.group),
        None if x.key_ids is None else gather_rows(x.key_ids, keys, agreed.group),
    )
    return reference_terms(whole, options)


def reference_terms(x: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Compute (loss of each term [n_terms], hit@1 of each term [n_terms]) in the accumulation dtype.

    The temperature is 0-d, or [N] with one value a query (``over_group`` splits the gradient over ranks by it); labels
    are given.
    """
    with torch.autocast(x.queries[0].device.type, enabled=False):  # sums keep the accumulation dtype
        return _terms(x, options)


def _terms(x: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    assert x.labels is not None
    losses, hits = [], []
    positives = Positives.of(x.labels)
    columns = torch.arange(x.n_keys, device=x.labels.device)
    own = (positives.labels[:, :, None] == columns).any(1)
    twins = torch.zeros_like(own)
    if x.query_ids is not None and x.key_ids is not None:
        twins = (x.query_ids[:, None] == x.key_ids[None, :]) & ~own
    for q, k in options.terms:
        for width in options.widths or (x.queries[q].shape[1],):
            query, key = x.queries[q], x.keys[k]
            if width < query.shape[1]:
                dtype = accumulation_dtype(query.dtype)  # 16 bits would round the rows of every width anew
                query, key = unit_rows(query[:, :width].to(dtype)), unit_rows(key[:, :width].to(dtype))
            loss, hit = _one_term(query, key, x.temperature, positives, own, twins, options)
            losses.append(loss)
            hits.append(hit)
    return torch.stack(losses), torch.stack(hits)


def _one_term(
    queries: Tensor,
    keys: Tensor,
    temperature: Tensor,
    positives: Positives,
    own: Tensor,
    twins: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """C(a, b) of recipe.md 3: 1/2 [CE(s a b^T, own) + CE(s b a^T, own)], or its first half when not symmetric."""
    dtype = accumulation_dtype(queries.dtype)
    similarity = queries.to(dtype) @ keys.to(dtype).T
    logits = similarity / (temperature if temperature.dim() == 0 else temperature[:, None])
    there, weight = positives.weight > 0, positives.weight.to(dtype)
    pair_similarity = similarity.gather(1, positives.at).masked_fill(~there, -torch.inf)  # [N, P]
    pair_logits = logits.gather(1, positives.at)

    # Each direction compares with its own anchor's positive: the best one of the row, or of the column.
    row_masked, column_masked = twins, twins
    if (margin := options.margin) is not None:
        norms = queries.to(dtype).norm(dim=1)[:, None] * keys.to(dtype).norm(dim=1)[positives.at]
        positive = (pair_similarity + SAME_SIMILARITY * norms).detach()
        row_masked = twins | ((similarity > positive.amax(1, keepdim=True) + margin) & ~own)
        column_masked = twins | ((similarity > positives.best_by_key(positive[None], keys.shape[0])[0] + margin) & ~own)

    rivals = logits.masked_fill(row_masked | own, -torch.inf)
    best = pair_logits.detach().masked_fill(~there, -torch.inf).amax(1)
    hit = (best > rivals.detach().amax(1)).to(dtype).mean()
    loss = torch.zeros((), dtype=dtype, device=logits.device)
    rows = torch.arange(queries.shape[0], device=logits.device)
    candidates, columns = logits.masked_fill(row_masked, -torch.inf), logits.masked_fill(column_masked, -torch.inf)
    for at, is_there, share, pair in zip(
        positives.at.unbind(1), there.unbind(1), weight.unbind(1), pair_logits.unbind(1), strict=True
    ):
        # The other positives of a row, and of a column, stay in the denominator.
        pair_loss = _cross_entropy(_without(candidates, at), pair)
        if options.symmetric:
            # Only labelled keys are anchors of the second direction: a hard negative has no query of its own.
            pair_loss = 0.5 * (pair_loss + _cross_entropy(_without(columns.T[at], rows), pair))
        loss = loss + torch.where(is_there, share * pair_loss, 0).sum()
    return loss / queries.shape[0], hit


def _without(candidates: Tensor, at: Tensor) -> Tensor:
    """The candidates of each row but the one at ``at``."""
    return candidates.scatter(1, at[:, None], -torch.inf)


def _cross_entropy(rivals: Tensor, positive: Tensor) -> Tensor:
    """[N] -log(e^p / (e^p + sum_j e^r_j)) = log(1 + sum_j e^(r_j - p)), by log1p to keep the digits of a small loss."""
    gap = rivals - positive[:, None]
    shift = gap.detach().amax(1).clamp_min(0)
    return shift + torch.log1p((gap - shift[:, None]).exp().sum(1) + torch.expm1(-shift))
