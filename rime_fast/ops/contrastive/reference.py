"""The contrastive loss in plain torch: the truth for tests and the path for double backward.

It holds the whole similarity matrix of a term; read it first, the other backends compute the same numbers in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops.contrastive.inputs import accumulation_dtype


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

    temperature: 0-d, or [N] with one value a query (the group path uses it to split the gradient over ranks).
    """
    losses, hits = [], []
    own = torch.zeros(queries[0].shape[0], keys[0].shape[0], dtype=torch.bool, device=labels.device)
    own = own.scatter(1, labels[:, None], True)
    twins = torch.zeros_like(own) if query_ids is None or key_ids is None else query_ids[:, None] == key_ids[None, :]
    for q, k in terms:
        loss, hit = _one_term(queries[q], keys[k], temperature, labels, own, twins & ~own, margin, symmetric)
        losses.append(loss)
        hits.append(hit)
    return torch.stack(losses), torch.stack(hits)


def _one_term(
    queries: Tensor,
    keys: Tensor,
    temperature: Tensor,
    labels: Tensor,
    own: Tensor,
    twins: Tensor,
    margin: float | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """C(a, b) of recipe.md 3: 1/2 [CE(s a b^T, own) + CE(s b a^T, own)], or its first half when not symmetric."""
    dtype = accumulation_dtype(queries.dtype)
    similarity = queries.to(dtype) @ keys.to(dtype).T
    logits = similarity / (temperature if temperature.dim() == 0 else temperature[:, None])
    pair_similarity = similarity.gather(1, labels[:, None])  # [N, 1]
    pair_logits = logits.gather(1, labels[:, None]).squeeze(1)

    # Each direction compares with its own anchor's positive: the row's, or the best one of the column.
    row_masked, column_masked = twins, twins
    if margin is not None:
        positive = pair_similarity.detach()
        row_masked = twins | ((similarity > positive + margin) & ~own)
        best = torch.full((keys.shape[0],), -torch.inf, dtype=dtype, device=keys.device)
        best = best.scatter_reduce(0, labels, positive.squeeze(1), "amax")
        column_masked = twins | ((similarity > best + margin) & ~own)

    row_rivals = logits.masked_fill(row_masked | own, -torch.inf)
    row_loss = _cross_entropy(row_rivals, pair_logits)
    hit = (pair_logits.detach() > row_rivals.detach().amax(1)).to(dtype).mean()
    if not symmetric:
        return row_loss.mean(), hit
    # Only labelled keys are anchors of the second direction: a hard negative has no query of its own. Column i of
    # this matrix belongs to pair i; other queries with the same label stay in as rivals.
    columns = logits.masked_fill(column_masked, -torch.inf)[:, labels]
    self_pairs = torch.eye(queries.shape[0], dtype=torch.bool, device=queries.device)
    column_loss = _cross_entropy(columns.masked_fill(self_pairs, -torch.inf).T, pair_logits)
    return 0.5 * (row_loss.mean() + column_loss.mean()), hit


def _cross_entropy(rivals: Tensor, positive: Tensor) -> Tensor:
    """[N] -log(e^p / (e^p + sum_j e^r_j)) = log(1 + sum_j e^(r_j - p)), by log1p to keep the digits of a small loss."""
    gap = rivals - positive[:, None]
    shift = gap.detach().amax(1).clamp_min(0)
    return shift + torch.log1p((gap - shift[:, None]).exp().sum(1) + torch.expm1(-shift))
