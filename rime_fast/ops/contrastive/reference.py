"""The contrastive loss in plain torch: the truth for tests and the path for double backward.

It holds the whole similarity matrix of a term; read it first, the other backends compute the same numbers in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops.contrastive.inputs import accumulation_dtype
from rime_fast.ops.contrastive.positives import Positives


def reference_terms(
    queries: list[Tensor],
    keys: list[Tensor],
    terms: list[tuple[int, int]],
    temperature: Tensor,
    labels: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    margin: float | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """(loss of each term [n_terms], hit@1 of each term [n_terms]) in the accumulation dtype.

    labels: [N] or [N, P], see positives.py. temperature: 0-d, or [N] with one value a query (the group path uses it to
    split the gradient over ranks).
    """
    losses, hits = [], []
    positives = Positives.of(labels)
    columns = torch.arange(keys[0].shape[0], device=labels.device)
    own = (positives.labels[:, :, None] == columns).any(1)
    twins = torch.zeros_like(own) if query_ids is None or key_ids is None else query_ids[:, None] == key_ids[None, :]
    for q, k in terms:
        loss, hit = _one_term(queries[q], keys[k], temperature, positives, own, twins & ~own, margin, symmetric)
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
    margin: float | None,
    symmetric: bool,
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
    if margin is not None:
        positive = pair_similarity.detach()
        row_masked = twins | ((similarity > positive.amax(1, keepdim=True) + margin) & ~own)
        column_masked = twins | ((similarity > positives.best_by_key(positive, keys.shape[0]) + margin) & ~own)

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
        if symmetric:
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
