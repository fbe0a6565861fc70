"""The contrastive loss, public and in torch.library.

    contrastive_loss                  checks (problem.py), then one of
      rime_fast::contrastive          one process: loss and hit@1 of each term (+ log-sum-exps for the backward)
      rime_fast::contrastive_backward its gradients; recomputes the tiles, where they were too many to keep
      _Grouped                        the same over a process group (not under torch.compile)
      reference.py                    plain torch, the only one with second derivatives
The first three run one schedule (schedule.py). An operator takes the tensors and ``Options`` as one list of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.checks import refuse_forward_ad
from rime_fast.ops.contrastive import cuda, reference, triton
from rime_fast.ops.contrastive.agreement import Agreement, agree
from rime_fast.ops.contrastive.problem import (
    Inputs,
    NonFiniteRow,
    Options,
    Problem,
    accumulation_dtype,
    make_problem,
)
from rime_fast.ops.contrastive.schedule import of_one_rank
from rime_fast.ops.dispatch import BackendTable, memory_of, on_device_of

TABLE = BackendTable(
    op="contrastive",
    probes={"reference": lambda _: None, "chunked": cuda.why_not, "triton": triton.why_not},
    order={"cpu": ("chunked",), "cuda": ("chunked", "triton", "reference")},  # as measured on an H100
)
KEEP_SHARE = 16  # similarities up to this part of a GPU's memory stay from the forward to the backward


@dataclass
class ContrastiveOutput:
    """What ``contrastive_loss`` returns.

    loss: 0-d, fp32 (fp64 for fp64 inputs): the sum over terms of weight x C(query mode, key mode).
    per_term: "query mode-key mode" -> C, 0-d, before its weight; carries gradient as ``loss`` does.
    per_dim: width -> sum over terms of weight x C, 0-d, before the width's own weight; empty without ``dims``.
    accuracy: "query mode-key mode" -> hit@1, 0-d, detached: the share of queries whose positive is more similar than
        every other candidate that is not masked. An equal candidate is a miss. With ``dims`` that of the widest, and
        ("query mode-key mode", width) -> that of each.
    """

    loss: Tensor
    per_term: dict[str, Tensor]
    accuracy: dict[str | tuple[str, int], Tensor]
    per_dim: dict[int, Tensor] = field(default_factory=dict)


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
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    group: Any = None,
    backend: str = "auto",
) -> ContrastiveOutput:
    """Contrast queries and keys by InfoNCE over every pair of modes in ``terms``, without an N x N matrix
    (docs/recipe.md).

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
        margin: leave out candidates whose similarity q.k exceeds that of the anchor's positive by more than this, and
            by more than rounding (1e-5 of the norms): twins of the positive stay, also with a margin of 0. In the
            second direction the anchor is the key (its most similar labelled query counts).
        symmetric: both directions, or queries to keys only.
        dims: Matryoshka widths, ascending, at most D: the loss is the sum over them of ``dim_weights`` (1 each) x the
            loss of the rows' first columns, normalised at every width (rows need not be unit then). Own softmaxes,
            margin and hit@1 for each; all in one sweep, at the products of the widest alone. ``dims=[D]`` is the
            loss of the normalised rows.
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
    arguments = (queries, keys, terms, temperature, labels, query_ids, key_ids, margin, symmetric, dims, dim_weights)

    def choose(tensor: Tensor) -> str:
        return TABLE.choose(backend, tensor)

    if group is not None and _has_others(group):
        agreed = agree(arguments, group, choose)
        problem = agreed.problem
        x = problem.inputs
        _refuse_forward_ad(problem)
        if problem.options.backend == "reference":
            per_term, hits = reference.over_group(x, problem.options, agreed)
        else:
            per_term, hits = _Grouped.apply(agreed, x.temperature, *x.queries, *x.keys)
    else:
        problem = make_problem(*arguments, choose=choose)
        _refuse_forward_ad(problem)
        try:
            if problem.options.backend == "reference":
                per_term, hits = reference.one_rank(problem.inputs, problem.options)
            else:
                options = replace(problem.options, keep=_keeps(problem))
                per_term, hits, *_ = _one_rank(problem.inputs, options.encode())
        except NonFiniteRow as error:  # below the public function modes have no names
            raise ValueError(problem.row_message(error)) from None
    if widths := problem.options.widths:
        return _of_widths(problem, per_term.view(-1, len(widths)), hits.detach().view(-1, len(widths)))
    losses = per_term.unbind()
    # Weights stay Python numbers: a tensor made from host data would make the host wait on CUDA.
    return ContrastiveOutput(
        loss=_weighted(problem.weights, losses),
        per_term=dict(zip(problem.names, losses, strict=True)),
        accuracy=dict(zip(problem.names, hits.detach().unbind(), strict=True)),
    )


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = torch.add(total, value, alpha=weight)
    return total


def _of_widths(problem: Problem, losses: Tensor, hits: Tensor) -> ContrastiveOutput:
    """From loss and hit@1 [terms, widths]."""
    names, widths = problem.names, problem.options.widths
    per_term = [_weighted(problem.width_weights, term.unbind()) for term in losses.unbind()]
    accuracy: dict[str | tuple[str, int], Tensor] = {}
    for name, term in zip(names, hits.unbind(), strict=True):
        accuracy[name] = term[-1]
        accuracy |= {(name, width): hit for width, hit in zip(widths, term.unbind(), strict=True)}
    return ContrastiveOutput(
        loss=_weighted(problem.weights, per_term),
        per_term=dict(zip(names, per_term, strict=True)),
        accuracy=accuracy,
        per_dim={
            width: _weighted(problem.weights, at.unbind()) for width, at in zip(widths, losses.T.unbind(), strict=True)
        },
    )


def _refuse_forward_ad(problem: Problem) -> None:
    if problem.options.backend != "reference":
        x = problem.inputs
        refuse_forward_ad("contrastive_loss", (*x.queries, *x.keys, x.temperature))


def _keeps(problem: Problem) -> bool:
    """Whether all similarities stay from the forward to the backward: on a GPU, where they are few."""
    x, options = problem.inputs, problem.options
    leaves = (*x.queries, *x.keys, x.temperature)
    trained = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    if not trained or not x.queries[0].is_cuda or options.backend != "chunked" or len(options.widths) > 1:
        return False
    return 4 * len(options.terms) * x.n_queries * x.n_keys <= memory_of(x.queries[0].get_device()) // KEEP_SHARE


def _room(x: Inputs, options: Options) -> Tensor:
    """Memory for what ``Options.keep`` keeps, [terms, N, K up to a multiple of 4], or nothing."""
    like, shape = x.queries[0], (len(options.terms), x.n_queries, -(-x.n_keys // 4) * 4)
    return like.new_empty(shape if options.keep else 0, dtype=accumulation_dtype(like.dtype))


def _has_others(group: Any) -> bool:
    """True when ``group`` holds more than this process; errors when it cannot be used."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group was given, but torch.distributed is not initialised; expected a live process group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is {type(group).__name__}; expected a torch.distributed process group this rank is in")
    return dist.get_world_size(group) > 1


class _Grouped(torch.autograd.Function):
    """The schedule over a group; gathered keys stay for the backward."""

    @staticmethod
    def forward(ctx: Any, agreed: Agreement, temperature: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        with on_device_of(rows[0]):
            ctx.agreed, ctx.schedule = agreed, agreed.schedule()
            loss, hit, *ctx.solved = ctx.schedule.forward()
        ctx.save_for_backward(*rows)  # so that autograd sees a change in place between forward and backward
        ctx.mark_non_differentiable(hit)
        return loss, hit

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            _no_second_derivative()
        _, x = ctx.saved_tensors, ctx.agreed.problem.inputs  # read: autograd looks for changes in place
        needs = [True] * len(x.queries), [ctx.agreed.keys_trained] * len(x.keys)
        with on_device_of(grad):
            dq, dk, dt = ctx.schedule.backward(grad, *ctx.solved, *needs, ctx.needs_input_grad[1])
        return None, dt, *dq, *dk


def contrastive(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    temperature: Tensor,
    labels: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, a custom operator too: (loss [terms], hit@1 [terms], and for the backward softmax.Solved: [terms, 2 +
    P, N] and [terms, 3, K] fp64; Schedule.flag and Schedule.masked; the similarities, if they are kept)."""
    x, decoded = Inputs(list(queries), list(keys), temperature, labels, query_ids, key_ids), Options.decode(options)
    with on_device_of(queries[0]):
        schedule, kept = of_one_rank(x, decoded), _room(x, decoded)
        schedule.kept = kept if decoded.keep else None
        return *schedule.forward(), schedule.flag, *schedule.masked, kept


_contrastive = torch.library.custom_op("rime_fast::contrastive", contrastive, mutates_args=())


@_contrastive.register_fake
def _(
    queries: Sequence[Tensor], keys: Sequence[Tensor], temperature: Tensor, labels: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options, both = Options.decode(rest[-1]), len(queries[0]) + len(keys[0])
    terms, like = options.n_losses, queries[0]
    loss = like.new_empty(terms, dtype=accumulation_dtype(like.dtype))
    positives = 1 if labels is None or labels.dim() == 1 else labels.shape[1]
    rows = like.new_empty(terms, 2 + positives, like.shape[0], dtype=torch.float64)
    cols = like.new_empty(terms, 3, keys[0].shape[0], dtype=torch.float64)
    return (
        loss,
        torch.empty_like(loss),
        rows,
        cols,
        like.new_empty((), dtype=torch.int32),
        like.new_empty(0 if rest[0] is None else both, dtype=torch.int32),
        loss.new_empty(0) if options.margin is None else loss.new_empty(terms, both),
        _room(Inputs(list(queries), list(keys), temperature, None, None, None), options),
    )


def contrastive_backward(
    grad: Tensor,
    rows: Tensor,
    cols: Tensor,
    flag: Tensor,
    classes: Tensor,
    limits: Tensor,
    kept: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    temperature: Tensor,
    labels: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    options: Sequence[float],
    need_queries: Sequence[bool],
    need_keys: Sequence[bool],
    need_temperature: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients, a custom operator too: (dq of each query mode, dk of each key mode, d temperature); [0] where not
    needed (a result cannot be None)."""
    x = Inputs(list(queries), list(keys), temperature, labels, query_ids, key_ids)
    with on_device_of(queries[0]):
        decoded = Options.decode(options)
        schedule = of_one_rank(x, decoded, flag, (classes, limits))
        schedule.kept = kept if decoded.keep else None
        dq, dk, dt = schedule.backward(grad, rows, cols, list(need_queries), list(need_keys), need_temperature)

    def results(found: list[Tensor | None], like: list[Tensor]) -> list[Tensor]:
        return [t.new_empty(0) if d is None else d for d, t in zip(found, like, strict=True)]

    return results(dq, x.queries), results(dk, x.keys), dt


_contrastive_backward = torch.library.custom_op(
    "rime_fast::contrastive_backward", contrastive_backward, mutates_args=()
)


@_contrastive_backward.register_fake
def _(*args: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    queries, keys, temperature, need_queries, need_keys = *args[7:10], *args[-3:-1]

    def like(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        return [t.new_empty(t.shape) if need else t.new_empty(0) for t, need in zip(tensors, needs, strict=True)]

    return like(queries, need_queries), like(keys, need_keys), torch.empty_like(temperature)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, temperature, labels, query_ids, key_ids, ctx.options = inputs
    ctx.n_query_modes = len(queries)
    ctx.save_for_backward(*output[2:], temperature, labels, query_ids, key_ids, *queries, *keys)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    solved, (temperature, *indices), modes = ctx.saved_tensors[:6], ctx.saved_tensors[6:10], ctx.saved_tensors[10:]
    queries, keys = modes[: ctx.n_query_modes], modes[ctx.n_query_modes :]
    need_q, need_k, need_t = ctx.needs_input_grad[:3]
    if grad is None:
        return [None] * len(queries), [None] * len(keys), None, None, None, None, None
    needs = [need or need_t for need in need_q], list(need_k)
    dq, dk, dt = torch.ops.rime_fast.contrastive_backward(
        grad, *solved, list(queries), list(keys), temperature, *indices, ctx.options, *needs, need_t
    )
    return (
        [d if need else None for d, need in zip(dq, need_q, strict=True)],
        [d if need else None for d, need in zip(dk, need_k, strict=True)],
        dt if need_t else None,
        None,
        None,
        None,
        None,
    )


_contrastive.register_autograd(_backward, setup_context=_setup)


def _no_second_derivative(*_: Any) -> Any:
    raise RuntimeError("contrastive_loss: the fused backends have no second derivative; use backend='reference'")


_contrastive_backward.register_autograd(_no_second_derivative)


class _Eager(torch.autograd.Function):
    """What the operators do, without their wrappers, which take longer than all else that a small call does on the
    host."""

    @staticmethod
    def forward(ctx: Any, options: list[float], n: int, temperature: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
        labels, query_ids, key_ids, *rows = tensors
        loss, hits, *solved = contrastive(rows[:n], rows[n:], temperature, labels, query_ids, key_ids, options)
        ctx.options, ctx.n_query_modes = options, n
        ctx.save_for_backward(*solved, temperature, *tensors)
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return loss, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        n, need_t, need = ctx.n_query_modes, ctx.needs_input_grad[2], ctx.needs_input_grad[6:]
        solved, (temperature, labels, query_ids, key_ids, *modes) = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        x = modes[:n], modes[n:], temperature, labels, query_ids, key_ids, ctx.options
        needs = [one or need_t for one in need[:n]], list(need[n:])
        # With create_graph=True the operator, so that a derivative of the gradients is an error and not 0.
        run: Any = torch.ops.rime_fast.contrastive_backward if torch.is_grad_enabled() else contrastive_backward
        dq, dk, dt = run(grad, *solved, *x, *needs, need_t)
        gradients = [d if one else None for d, one in zip([*dq, *dk], need, strict=True)]
        return None, None, dt if need_t else None, None, None, None, *gradients


def _one_rank(x: Inputs, options: list[float]) -> Sequence[Tensor]:
    """(loss, hit@1) of one process: by the operators where somebody traces, else by what they stand for."""
    if torch.compiler.is_compiling() or type(x.queries[0]) not in (Tensor, torch.nn.Parameter):
        return torch.ops.rime_fast.contrastive(*x, options)
    rows = *x.queries, *x.keys
    return _Eager.apply(options, len(x.queries), x.temperature, x.labels, x.query_ids, x.key_ids, *rows)
