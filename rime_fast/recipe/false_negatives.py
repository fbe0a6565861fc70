"""Which keys of a global batch are no negatives of which queries: as ids for ``contrastive_loss``, from hashes.

A key is the same item as a query's positive when their ids are equal or their contents (text and images); a hard
negative may be another row's positive. Several right answers of one query (a picture with five captions, or ``targets``
of a row) are no negatives of each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.collectives import all_gather, gather_rows

_ROUNDS = 4  # ids and contents alternate at most a few times in a chain of equal items


def mask_ids(
    keys: Tensor,
    queries: Tensor,
    others: Tensor | None = None,
    others_of: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Make (query_ids [n], key_ids [n + h]) for ``contrastive_loss``: equal where a key is no negative.

    keys: [n + h, 2] int64, of each key the hashes of its id and of its content; the n positives in their queries'
        order, then the hard negatives. queries: [n, 2], likewise. others: [m, 2] further right answers,
        others_of: [m] the query each belongs to. group: ranks that share the global batch; they may hold different
        numbers.

    Equal items are one class, also by way of a third (a's id is b's, b's content is c's). The classes of one query's
    answers are then joined where no other query has them: joined classes mask each other for all their queries, and
    an answer that many queries share ("yes") must stay a negative for those that it is wrong for. Where an answer is
    shared, two rows of one query thus remain negatives of each other [ours].
    """
    n, total = queries.shape[0], keys.shape[0]
    device = keys.device
    owner = torch.arange(n, device=device)
    if others is None or others_of is None:
        others, others_of = keys.new_empty(0, 2), owner.new_empty(0)
    # rows of items: positives, hard negatives, further answers; `asked`: whose answer (-1: nobody's)
    items = torch.cat([keys, others])
    asked = torch.cat([queries, queries.new_full((total - n, 2), -1), queries[others_of]])
    rows, start = gathered(torch.cat([items, asked], dim=1), group)
    places, columns = torch.arange(rows.shape[0], device=device), rows.unbind(1)
    query = torch.where(columns[2] < 0, -1, _joined(places, columns[2:]))
    classes = _join_answers(_joined(places, columns[:2]), query)
    own = classes[start : start + total]
    return own[:n].contiguous(), own.contiguous()


def _joined(labels: Tensor, columns: tuple[Tensor, ...]) -> Tensor:
    """Labels [N] made equal (to the smallest) where any column is, in a few rounds without a wait for the host."""
    groups = [_dense(column) for column in columns]
    for _ in range(_ROUNDS):
        for index in groups:
            labels = _smallest(labels, index)[index]
    return labels


def _join_answers(classes: Tensor, asked: Tensor) -> Tensor:
    """Classes of one query's answers joined, of those classes that are no other query's."""
    index, query = _dense(classes), _dense(asked)
    answers = asked >= 0
    big = torch.iinfo(torch.int64).max
    low = _smallest(torch.where(answers, query, big), index)
    high = -_smallest(torch.where(answers, -query, big), index)
    exclusive = (answers & (low[index] == high[index])).to(torch.int64)
    # of each query, its smallest exclusive class stands for all of them
    first = _smallest(torch.where(exclusive > 0, classes, big), query)
    target = torch.where(exclusive > 0, first[query], big)
    joined = _smallest(target, index)[index]  # hard negatives follow the class they are equal to
    return torch.where(joined < big, joined, classes)


def _dense(values: Tensor) -> Tensor:
    """[N] numbers below N, equal exactly where ``values`` are. By a sort: counting them would wait for the device."""
    ordered, place = values.sort()
    steps = torch.zeros_like(place)
    steps[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(place).scatter_(0, place, steps)


def _smallest(values: Tensor, index: Tensor) -> Tensor:
    """[N] the smallest of ``values`` for each group number of ``index``."""
    out = torch.full_like(values, torch.iinfo(values.dtype).max)
    return out.scatter_reduce_(0, index, values, "amin")


def gathered(rows: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Gather all ranks' rows in rank order (ranks may hold different numbers), and where this rank's begin. No
    gradient."""
    if group is None:
        return rows.detach(), 0
    counts = all_gather(torch.tensor([rows.shape[0]], device=rows.device), group).tolist()
    return gather_rows(rows, counts, group), sum(counts[: dist.get_rank(group)])


def mask_ids_of(inputs: dict[str, Any], group: Any) -> tuple[Tensor, Tensor] | None:
    """Make the ids (``mask_ids``) of a packed batch of pairs; None where its rows have none."""
    if "key_ids" not in inputs:
        return None
    own = torch.cat([inputs["key_ids"], inputs["negative_ids"]]) if "negative_ids" in inputs else inputs["key_ids"]
    keys = torch.stack([own, inputs["key_contents"]], dim=1)
    queries = torch.stack([inputs["query_ids"], inputs["query_contents"]], dim=1)
    return mask_ids(keys, queries, inputs.get("other_ids"), inputs.get("other_of"), group=group)
