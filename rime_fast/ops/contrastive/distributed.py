"""The contrastive loss over a process group: local queries against every rank's keys.

A rank owns the rows of the similarity matrix that belong to its queries, so row softmaxes are local; column softmaxes
are merged by one MAX and one SUM all-reduce of O(all keys) numbers. Gradients: dq is local and complete, dk of remote
keys goes home by reduce-scatter (or around the ring, key_source.py). The loss is the global one on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rime_fast.ops.contrastive import softmax
from rime_fast.ops.contrastive.agreement import Agreement, agree
from rime_fast.ops.contrastive.backends import TABLE, AnySweep, knows_bound, make_sweep, operands
from rime_fast.ops.contrastive.chunked import id_classes, is_bounded, pair_similarity
from rime_fast.ops.contrastive.collectives import gather_rows
from rime_fast.ops.contrastive.inputs import Problem, accumulation_dtype
from rime_fast.ops.contrastive.key_source import KeySource
from rime_fast.ops.contrastive.local import as_gradients, temperature_gradient
from rime_fast.ops.contrastive.positives import Positives
from rime_fast.ops.contrastive.products import scale_by, unit_of
from rime_fast.ops.contrastive.reference import reference_terms
from rime_fast.ops.contrastive.rows import Masks, Statistics
from rime_fast.ops.contrastive.softmax import Solved


def check_group(group: Any) -> bool:
    """True when ``group`` holds more than this process; errors when it cannot be used."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group was given, but torch.distributed is not initialised; expected a live process group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is {type(group).__name__}; expected a torch.distributed process group this rank is in")
    return dist.get_world_size(group) > 1


def grouped_terms(arguments: tuple[Any, ...], group: Any, backend: str) -> tuple[Problem, Tensor, Tensor]:
    """(this rank's problem, global loss of each term, global hit@1 of each term), with this rank's gradients."""
    settled = agree(arguments, group, lambda tensor: TABLE.choose(backend, tensor))
    problem = settled.problem
    if settled.backend == "reference":
        per_term, hits = _reference(settled, group)
    else:
        per_term, hits = _Grouped.apply(settled, group, problem.temperature, *problem.queries, *problem.keys)
    return problem, per_term, hits


class _Grouped(torch.autograd.Function):
    """Tiled forward and backward; see the module's head for who computes what."""

    @staticmethod
    def forward(ctx: Any, settled: Agreement, group: Any, temperature: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        problem = settled.problem
        work = _Work(settled, group, temperature.detach())
        states = work.statistics()
        hits = [softmax.hits(state).sum() for state in states]
        solved, weights = work.solve(states)
        losses = [term.total(work.positives, problem.symmetric) for term in solved]
        totals = torch.stack([*losses, *hits])
        dist.all_reduce(totals, group=group)
        loss, hit = (totals / sum(settled.n_queries)).to(temperature.dtype).view(2, -1).unbind()
        loss, hit = loss.clone(), hit.clone()
        ctx.work, ctx.solved, ctx.weights = work, solved, weights
        ctx.save_for_backward(*rows)  # so that autograd sees a change in place between forward and backward
        ctx.mark_non_differentiable(hit)
        return loss, hit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        rows, work = ctx.saved_tensors, ctx.work
        dq, dk = work.gradients(grad, ctx.solved, ctx.weights)
        key_rows = rows[len(dq) :]
        d_queries = as_gradients(dq, rows[: len(dq)])
        d_keys = as_gradients(dk, key_rows) if dk else [None] * len(key_rows)
        return None, None, temperature_gradient(dq, work.queries, work.temperature), *d_queries, *d_keys


class _Work:
    """The state of one grouped call on one rank."""

    def __init__(self, settled: Agreement, group: Any, temperature: Tensor) -> None:
        self.settled, self.group, self.problem = settled, group, settled.problem
        self.temperature, self.scale = temperature, temperature.reciprocal()
        self.queries = operands(settled.backend, self.problem.queries)
        self.positives = Positives.of(global_labels(settled))
        self.n_keys = sum(settled.n_keys)
        self.source = KeySource(self.problem.keys, settled, group)
        self.masks = self._masks()
        self.bounded = is_bounded(settled.query_norm, settled.key_norm, self.scale)
        self.shiftless = self.bounded and knows_bound(settled.backend, self.queries[0])

    def statistics(self) -> list[Statistics]:
        """Of this rank's queries against all keys."""
        labels, dtype = self.positives.labels, accumulation_dtype(self.queries[0].dtype)
        states = [Statistics.empty(labels, self.n_keys, self.shiftless, dtype) for _ in self.problem.terms]
        for start, stop, keys in self.source.blocks():
            self._sweep(start, stop, keys).statistics([state.columns(start, stop) for state in states])
        return states

    def solve(self, states: list[Statistics]) -> tuple[list[Solved], Tensor]:
        """Complete every softmax; column sums and key weights are merged over ranks when they are needed."""
        solved = [softmax.solve(state, self.positives) for state in states]
        weights = self.positives.key_weights(self.n_keys)
        if not self.problem.symmetric:
            return solved, weights
        local = torch.stack([term.cols[1:] for term in solved])  # [terms, 2, K] log-sum-exps over this rank's queries
        best = local.clone()
        dist.all_reduce(best, op=dist.ReduceOp.MAX, group=self.group)
        shift = torch.where(best == -torch.inf, 0, best)
        merged = torch.cat([(local - shift).exp().flatten(0, 1), weights[None]])
        dist.all_reduce(merged, group=self.group)
        for term, total in zip(solved, shift + merged[:-1].view_as(shift).log(), strict=True):
            term.cols[1:] = total
        return solved, merged[-1]

    def gradients(self, grad: Tensor, solved: list[Solved], weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(dq, complete; dk of this rank's keys, summed over ranks, or [] when no rank trains its keys)."""
        symmetric, dtype = self.problem.symmetric, accumulation_dtype(self.queries[0].dtype)
        factors = grad.double() * (0.5 if symmetric else 1.0)
        factors = factors / (self.temperature.double() * sum(self.settled.n_queries))
        unit = unit_of(factors, self.queries[0].dtype)
        factors = factors if unit is None else factors / unit
        slopes = [
            softmax.make_slopes(term, self.positives, weights, factor, symmetric, self.shiftless, dtype)
            for term, factor in zip(solved, factors.unbind(), strict=True)
        ]
        dq = [torch.zeros_like(q, dtype=dtype) for q in self.queries]
        wanted = self.settled.keys_trained

        def add(start: int, stop: int, keys: list[Tensor], dk: list[Tensor]) -> None:
            part = [slope.columns(start, stop) for slope in slopes]
            self._sweep(start, stop, keys).gradients(part, list(dq), list(dk) if wanted else [None] * len(dk))
            scale_by(unit, list(dk))

        home = self.source.gradients(add, wanted)
        scale_by(unit, list(dq))
        return dq, home

    def _sweep(self, start: int, stop: int, keys: list[Tensor]) -> AnySweep:
        backend, masks = self.settled.backend, [masks.columns(start, stop) for masks in self.masks]
        moved = operands(backend, keys)
        return make_sweep(backend, self.queries, moved, self.problem.terms, self.scale, masks, self.bounded)

    def _masks(self) -> list[Masks]:
        """One a term, over all keys. Limits need the positives' similarities, which may lie with any rank."""
        problem = self.problem
        key_ids = None if problem.key_ids is None else gather_rows(problem.key_ids, self.settled.n_keys, self.group)
        row_ids, col_ids = id_classes(problem.query_ids, key_ids)
        masks = [Masks(self.positives.labels, row_ids, col_ids) for _ in problem.terms]
        if problem.margin is None:
            return masks
        similarity = self._pair_similarities()
        best = torch.stack([self.positives.best_by_key(term, self.n_keys) for term in similarity])
        dist.all_reduce(best, op=dist.ReduceOp.MAX, group=self.group)
        for mask, row_limit, col_limit in zip(masks, similarity.amax(2), best, strict=True):
            mask.row_limit, mask.col_limit = row_limit + problem.margin, col_limit + problem.margin
        return masks

    def _pair_similarities(self) -> Tensor:
        """[terms, N, P] similarity of each query with its positives, -inf for a missing one."""
        dtype, labels = accumulation_dtype(self.queries[0].dtype), self.positives.labels
        found = labels.new_full((len(self.problem.terms), *labels.shape), -torch.inf, dtype=dtype)
        for start, stop, keys in self.source.blocks():
            here = (labels >= start) & (labels < stop)
            block = Positives(labels, torch.where(here, labels - start, 0), here.double())
            for term, (q, k) in zip(found, self.problem.terms, strict=True):
                term.copy_(torch.where(here, pair_similarity(self.queries[q], keys[k], block), term))
        return found


def global_labels(settled: Agreement) -> Tensor:
    """This rank's labels as positions among the keys of all ranks."""
    problem = settled.problem
    if problem.labels is not None:
        return problem.labels.contiguous()
    return torch.arange(problem.n_queries, device=problem.queries[0].device) + sum(settled.n_keys[: settled.rank])


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
