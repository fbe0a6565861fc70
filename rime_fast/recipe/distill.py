"""Distillation: a student's distribution over candidates drawn towards a teacher's, as pure functions of tensors.

    D(q) = KL( P_T || P_S ) = sum_c P_T(c) ( log P_T(c) - log P_S(c) )
    P_S = softmax(cos(q, c) / temperature) over the candidates c,   P_T = softmax(teacher's score / teacher_temperature)

``score_distillation``: a pair's own candidates, the positive and its hard negatives, with scores that the data holds
(a reranker's logits). ``bank_distillation``: all targets of this rank's batch, with a larger embedder's cosines, of
any size. [known: KL to stored scores; a larger embedder as a smaller one's teacher (WeMM); ours: which candidates, and
one term for each mode]

Means over the queries of all ranks, as in joint.py: a rank's share is multiplied by the number of ranks, so that the
MEAN over ranks of values and gradients is that of one process. The temperature gets no gradient: it is the contrast's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROWS = 1024  # queries whose similarities to all targets are held at a time


def score_distillation(
    queries: Tensor,
    keys: Tensor,
    scores: Tensor,
    owners: Tensor | None,
    *,
    temperature: float | Tensor,
    teacher_temperature: float = 1.0,
    group: Any = None,
) -> Tensor:
    """Draw each query's distribution over its positive and its own hard negatives to the teacher's; 0-d.

    queries: [n, D] unit rows. keys: [n + h, D], the n positives in the queries' order, then the h hard negatives.
    scores: [n + h] the teacher's logits in the keys' order, NaN for all candidates of a query without scores: it does
    not count. owners: [h] int64, the query of each hard negative; None where there are none. group: ranks that share a
    global batch. A batch without any scored query gives 0.
    """
    n = queries.shape[0]
    owner = torch.arange(n, device=queries.device)
    if owners is not None:
        owner = torch.cat([owner, owners])
    there = ~scores.isnan()
    student = (queries[owner] * keys).sum(1)
    student = student.to(torch.promote_types(student.dtype, torch.float32)) / _number(temperature)
    teacher = torch.where(there, scores, 0).to(student.dtype) / teacher_temperature
    log_s, log_t = (_log_softmax_by(logits, owner, n) for logits in (student, teacher))
    total = torch.where(there, log_t.exp() * (log_t - log_s), 0).sum()
    return total * _share(there[:n].sum(), group)


def bank_distillation(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    *,
    temperature: float | Tensor,
    teacher_temperature: float = 0.02,
    group: Any = None,
) -> Tensor:
    """Draw each query's distribution over the batch's targets to that of the teacher's embeddings; 0-d.

    queries, keys: [n, D] unit rows of the student. teacher_queries, teacher_keys: [n, D'] unit rows of the teacher, in
    the same order. Both are this rank's own. No [n, n] matrix is kept: gradients are made with the value, ``ROWS``
    queries at a time, so there is no second derivative.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    q, k = queries.detach().to(dtype), keys.detach().to(dtype)
    t_q, t_k = teacher_queries.to(dtype), teacher_keys.to(dtype)
    dq, dk, total = torch.empty_like(q), torch.zeros_like(k), q.new_zeros(())
    tau = _number(temperature)
    for start in range(0, q.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        log_s = (q[rows] @ k.T / tau).log_softmax(1)
        log_t = (t_q[rows] @ t_k.T / teacher_temperature).log_softmax(1)
        total = total + (log_t.exp() * (log_t - log_s)).sum()
        slope = (log_s.exp() - log_t.exp()) / tau
        dq[rows] = slope @ k
        dk += slope.T @ q[rows]
    made = (queries * dq).sum() + (keys * dk).sum()
    loss = total + made - made.detach()
    return loss * _share(torch.full((), float(q.shape[0]), device=q.device), group)


def _number(temperature: float | Tensor) -> float | Tensor:
    return temperature.detach() if isinstance(temperature, Tensor) else temperature


def _share(count: Tensor, group: Any) -> Tensor:
    """One over the queries of all ranks, times the ranks."""
    count = count.float()
    if group is not None:
        dist.all_reduce(count, group=group)
    return (1 if group is None else dist.get_world_size(group)) / count.clamp(min=1)


def _log_softmax_by(logits: Tensor, owner: Tensor, n: int) -> Tensor:
    """Log-softmax of logits [m] among those of the same owner [m] < n, each of whom has at least one."""
    best = logits.new_full((n,), -torch.inf).scatter_reduce(0, owner, logits.detach(), "amax")
    sums = logits.new_zeros(n).scatter_add(0, owner, (logits - best[owner]).exp())
    return logits - best[owner] - sums.log()[owner]
