"""Loss and hit@1 of each data set of a mixture, for the log: the query -> key half of one contrastive term, by row."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.recipe.false_negatives import gathered

_ROWS = 1024  # queries whose similarities are held at a time


@torch.no_grad()
def set_scores(
    queries: Tensor,
    keys: Tensor,
    sets: Tensor,
    count: int,
    *,
    temperature: float | Tensor,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    blocks: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum over this rank's queries of each set, [count, 3] fp32: -log p(positive), hits, queries.

    queries: [n, D] unit rows; keys: [n + h, D], the n positives in the queries' order, then hard negatives; candidates
        are all ranks' keys. sets: [n] int64, the set of each query. query_ids [n], key_ids [n + h]: equal ids are no
        negatives (``mask_ids``). blocks: [n + h], with ``contrast_scope: block``: only keys of the query's block count.
    A hit: the positive is more similar than every candidate that is not masked.
    """
    n = queries.shape[0]
    every, start = gathered(keys, group)
    ids = None if key_ids is None else gathered(key_ids, group)[0]
    places = None if blocks is None else gathered(blocks, group)[0]
    out = torch.zeros(count, 3, device=queries.device)
    for first in range(0, n, _ROWS):
        rows = torch.arange(first, min(first + _ROWS, n), device=queries.device)
        similar = (queries[rows].float() @ every.float().T) / temperature
        own = start + rows
        positive = similar.gather(1, own[:, None])
        out_of = torch.zeros_like(similar, dtype=torch.bool)
        if ids is not None and query_ids is not None:
            out_of |= query_ids[rows, None] == ids[None]
        if places is not None and blocks is not None:
            out_of |= blocks[rows, None] != places[None]
        others = similar.masked_fill_(out_of.scatter_(1, own[:, None], True), -torch.inf)
        loss = torch.logaddexp(others.logsumexp(1, keepdim=True), positive) - positive
        hit = (positive > others.amax(1, keepdim=True)).float()
        out.index_add_(0, sets[rows], torch.cat([loss, hit, torch.ones_like(loss)], dim=1))
    return out
