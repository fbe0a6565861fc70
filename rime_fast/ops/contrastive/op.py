"""The public contrastive loss: checks, choice of backend, and the weighted sum of the terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rime_fast.ops.contrastive import library  # noqa: F401  (registers the operators)
from rime_fast.ops.contrastive.backends import TABLE
from rime_fast.ops.contrastive.distributed import check_group, grouped_terms
from rime_fast.ops.contrastive.finite import NonFiniteRow, reason, require_finite, require_temperature
from rime_fast.ops.contrastive.inputs import Problem, make_problem
from rime_fast.ops.contrastive.positives import check_values
from rime_fast.ops.contrastive.reference import reference_terms


@dataclass
class ContrastiveOutput:
    """What ``contrastive_loss`` returns.

    loss: 0-d, fp32 (fp64 for fp64 inputs): the sum over terms of weight x C(query mode, key mode).
    per_term: "query mode-key mode" -> C, 0-d, before its weight; carries gradient as ``loss`` does.
    accuracy: "query mode-key mode" -> hit@1, 0-d, detached: the share of queries whose positive is more similar than
        every other candidate that is not masked. An equal candidate is a miss.
    """

    loss: Tensor
    per_term: dict[str, Tensor]
    accuracy: dict[str, Tensor]


def contrastive_loss(
    queries: Mapping[str, Tensor],
    keys: Mapping[str, Tensor],
    *,
    terms: Sequence[tuple[str, str, float]],
    temperature: float | Tensor = 0.02,
    labels: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = True,
    group: Any = None,
    backend: str = "auto",
) -> ContrastiveOutput:
    """InfoNCE over every pair of modes in ``terms``, without an N x N matrix (recipe.md, section 3).

    C(a, b) = 1/2 [ mean_i CE(a_i . b_all / tau, label_i) + mean_i CE(b_label_i . a_all / tau, i) ]; with
    ``symmetric=False`` the first half alone, with factor 1.

    Args:
        queries: mode name -> [N, D] (bf16, fp16, fp32 or fp64; unit norm is usual, not required).
        keys: mode name -> [K, D], same dtype and device. K > N: the further rows are hard negatives, candidates of
            the first direction only (they have no query of their own, so no term of the second).
        terms: (query mode, key mode, weight), for instance RIME's ``[("disc", "disc", 1.), ("gen", "gen", 1.),
            ("gen", "disc", .5), ("disc", "gen", .5)]``.
        temperature: tau, a number > 0 or a floating 0-d tensor, which then receives its gradient.
        labels: [N] int64, the key of each query; default: key i for query i. Two queries may share a key. Or [N, P]:
            up to P positives a query, -1 where there are fewer (one at least). A query's loss is then the mean of its
            pairs' cross-entropies, -log e^s_ip / sum over all that is not masked, the other positives included; the
            second direction runs over the same pairs with the same weights. With class labels this is SupCon's "out"
            form (arXiv 2004.11362, eq. 2) both ways. hit@1 and the margin look at the most similar positive.
        query_ids, key_ids: [N], [K] int64, both or neither: candidates whose ids are equal are left out of both
            directions (false negatives). A labelled positive is never left out, so a row always keeps one candidate;
            a row with no other candidate has loss 0.
        margin: leave out candidates whose similarity q.k exceeds that of the anchor's positive by more than this.
            In the second direction the anchor is the key (its most similar labelled query counts).
        symmetric: both directions, or queries to keys only.
        group: a torch.distributed process group. Rows are this rank's; candidates are all ranks' keys (in rank order)
            and, in the second direction, all ranks' queries; ``labels`` index the keys of all ranks (default: key i of
            this rank). Ranks may hold different N and K; every rank must call, and call backward. Not under compile.
        backend: "auto" | "reference" | "chunked" | "triton" | "cuda".

    With ``group``, what each rank gets: ``loss``, ``per_term`` and ``accuracy`` are those of the GLOBAL batch, the same
    numbers on every rank as one process holding all rows would compute, and the gradients of this rank's ``queries``
    and ``keys`` are the matching rows of that one process's gradients (contributions of remote rows included). The
    gradient of a tensor shared by all ranks (the model, a learnable temperature) is therefore the SUM over ranks:
    under gradient averaging (DDP, FSDP, DeepSpeed) multiply the loss by the world size; under summing use it as it is.

    Raises:
        ValueError, TypeError: naming the argument; for NaN or Inf also the mode and the first such row. With ``group``
            on every rank, also for another rank's argument or for ranks that disagree.
            On CUDA without ``group`` nothing is read back: labels out of range are a device-side assertion, and NaN or
            Inf in a row gives a NaN loss and NaN gradients where they depend on that row (other queries' gradients
            stay finite with symmetric=False).
    """
    arguments = (queries, keys, terms, temperature, labels, query_ids, key_ids, margin, symmetric)
    if group is not None and check_group(group):
        problem, per_term, hits = grouped_terms(arguments, group, backend)
    else:
        problem = make_problem(*arguments)
        per_term, hits = _local_terms(problem, backend)
    losses = per_term.unbind()
    # Weights stay Python numbers: a tensor made from host data would make the host wait on CUDA.
    loss = problem.weights[0] * losses[0]
    for weight, value in zip(problem.weights[1:], losses[1:], strict=True):
        loss = loss + weight * value
    return ContrastiveOutput(
        loss=loss,
        per_term=dict(zip(problem.names, losses, strict=True)),
        accuracy=dict(zip(problem.names, hits.detach().unbind(), strict=True)),
    )


def _local_terms(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    chosen = TABLE.choose(backend, problem.queries[0])
    if chosen != "reference":
        return _by_operator(problem, chosen)
    labels = problem.labels
    readable = problem.queries[0].device.type == "cpu" and not torch.compiler.is_compiling()
    if readable:
        require_temperature(problem.temperature.detach())
    if labels is None:
        labels = torch.arange(problem.n_queries, device=problem.queries[0].device)
    else:
        check_values(labels, problem.n_keys)
    loss, hits = reference_terms(
        problem.queries,
        problem.keys,
        problem.terms,
        problem.temperature,
        labels,
        problem.query_ids,
        problem.key_ids,
        problem.margin,
        problem.symmetric,
    )
    if readable and not bool(loss.detach().isfinite().all()):
        _name_bad_row(problem)
    return loss, hits


def _by_operator(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    arguments = (
        problem.queries,
        problem.keys,
        problem.temperature,
        problem.labels,
        problem.query_ids,
        problem.key_ids,
        [q for q, _ in problem.terms],
        [k for _, k in problem.terms],
        problem.margin,
        problem.symmetric,
        backend,
    )
    if torch.compiler.is_compiling():
        return torch.ops.rime_fast.contrastive(*arguments)[:2]
    try:
        return torch.ops.rime_fast.contrastive(*arguments)[:2]
    except NonFiniteRow as error:  # the operator does not know the modes' names
        raise ValueError(_named(problem, error)) from None


def _name_bad_row(problem: Problem) -> None:
    try:
        require_finite("queries", problem.queries, math.inf)
        require_finite("keys", problem.keys, math.inf)
    except NonFiniteRow as error:
        raise ValueError(_named(problem, error)) from None


def _named(problem: Problem, error: NonFiniteRow) -> str:
    modes = problem.query_modes if error.side == "queries" else problem.key_modes
    return f"{error.side}[{modes[error.mode]!r}] {reason(error.row)}"
