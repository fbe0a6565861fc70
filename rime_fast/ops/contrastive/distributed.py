"""The contrastive loss over a process group: local rows against every rank's rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.contrastive.agreement import Agreement, agree
from rime_fast.ops.contrastive.collectives import gather_rows
from rime_fast.ops.contrastive.inputs import Problem
from rime_fast.ops.contrastive.reference import reference_terms
from rime_fast.ops.dispatch import BackendTable


def check_group(group: Any) -> bool:
    """True when ``group`` holds more than this process; errors when it cannot be used."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group was given, but torch.distributed is not initialised; expected a live process group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is {type(group).__name__}; expected a torch.distributed process group this rank is in")
    return dist.get_world_size(group) > 1


def grouped_terms(
    arguments: tuple[Any, ...], group: Any, backend: str, table: BackendTable
) -> tuple[Problem, Tensor, Tensor]:
    """(this rank's problem, global loss of each term, global hit@1 of each term), with this rank's gradients."""
    settled = agree(arguments, group, lambda tensor: table.choose(backend, tensor))
    per_term, hits = _reference(settled, group)
    return settled.problem, per_term, hits


def global_labels(settled: Agreement) -> Tensor:
    """This rank's labels as positions among the keys of all ranks."""
    problem = settled.problem
    if problem.labels is not None:
        return problem.labels
    return torch.arange(problem.n_queries, device=problem.queries[0].device) + settled.key_offset


def _reference(settled: Agreement, group: Any) -> tuple[Tensor, Tensor]:
    """Every rank computes the whole loss from gathered rows, its own rows live and the others constant.

    The gradient of its rows is then complete without a collective in the backward; W times the arithmetic, no matter:
    this is the truth that the tiled path is tested against.
    """
    problem = settled.problem

    def with_own(rows: Tensor, counts: list[int]) -> Tensor:
        parts = list(gather_rows(rows, counts, group).split(counts))
        parts[settled.rank] = rows
        return torch.cat(parts)

    # Each rank takes its own rows' share of the gradient to the temperature.
    temperature = list(problem.temperature.detach().expand(sum(settled.n_queries)).split(settled.n_queries))
    temperature[settled.rank] = problem.temperature.expand(problem.n_queries)
    ids = problem.query_ids, problem.key_ids
    return reference_terms(
        [with_own(rows, settled.n_queries) for rows in problem.queries],
        [with_own(rows, settled.n_keys) for rows in problem.keys],
        problem.terms,
        torch.cat(temperature),
        gather_rows(global_labels(settled), settled.n_queries, group),
        None if ids[0] is None else gather_rows(ids[0], settled.n_queries, group),
        None if ids[1] is None else gather_rows(ids[1], settled.n_keys, group),
        problem.margin,
        problem.symmetric,
    )
