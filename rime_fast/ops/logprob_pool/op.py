"""The log-prob operator, public and in torch.library.

fused_logprob_pool, fused_linear_ce    checks (arguments.py), then one of
    rime_fast::logprob_pool            hidden, head, ... -> logp, entropy, read-outs (+ what the backward needs)
    rime_fast::logprob_pool_backward   its gradients; recomputes the logits (8MHV FLOP in all)
    rime_fast::linear_ce               loss and its gradients from one set of logits (6MHV where the schedule can)
    rime_fast::scale_gradients_        those gradients times the upstream factor, the read-outs' added
which call a schedule: cpu.py, cuda.py or triton.py. An operator takes the tensors, ``Options`` as one list of integers
and the name of a vocabulary group. Optional results are empty tensors, since an operator's results cannot be None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.checks import refuse_forward_ad
from rime_fast.ops.dispatch import BackendTable, on_device_of
from rime_fast.ops.logprob_pool import cpu, cuda, triton, vocab_parallel
from rime_fast.ops.logprob_pool.arguments import Call, Pool, check_late, check_weight, prepare
from rime_fast.ops.logprob_pool.problem import (
    Gradients,
    Needs,
    Options,
    Problem,
    Scoring,
    Spans,
    Statistics,
    Upstream,
    gradient_dtype,
)
from rime_fast.ops.logprob_pool.read_outs import ReadOuts, row_gradients
from rime_fast.ops.logprob_pool.reference import reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TABLE = BackendTable(
    op="logprob",
    probes={"reference": lambda _: None, "chunked": cuda.why_not, "triton": triton.why_not},
    order={"cpu": ("chunked", "reference"), "cuda": ("chunked", "triton", "reference")},
)


class LogprobPool(NamedTuple):
    """What one pass over the hidden states gives.

    logp: [T] fp32, log-probability of targets[t] at row t; 0 where ignored.
    entropy: [T] fp32 in nats, 0 where ignored; None unless asked for.
    embeddings: name of the pool -> [N, H] fp32, unit norm if ``normalize``.
    All are fp64 when ``hidden`` is fp64 (which runs on the reference).
    """

    logp: Tensor
    entropy: Tensor | None
    embeddings: dict[str, Tensor]


def fused_logprob_pool(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    pools: Mapping[str, Pool] | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    normalize: bool = True,
    backend: str = "auto",
    vocab_group: ProcessGroup | None = None,
    max_scored: int | None = None,
) -> LogprobPool:
    """Score given tokens and read embeddings out of a model's last hidden states, without the logits in memory.

    For policy losses, distillation and rewards, where every token's log-probability has a gradient of its own.
    With s = lm_head h_t + bias, s <- softcap tanh(s / softcap) if softcap, z = s / temperature:
    logp_t = z[targets_t] - logsumexp(z). Only rows whose target is not ``ignore_index`` meet the head. The backward
    recomputes the logits (8 M H V FLOP for M scored rows) into the one gradient buffer of ``hidden``, which starts as
    the read-outs' gradient. logp of a row is the same bits whatever else is in the batch.

    hidden: [T, H] bf16, fp16, fp32 (fp64 on the reference). lm_head: [V, H] of the same dtype (or under autocast).
    targets: [T] integer, the token scored AT row t (already shifted), in [0, V) or ``ignore_index``.
    pools: name -> row index [N], or (starts [N], ends [N]) for the mean over rows [start, end).
    bias: [V]. temperature: a number above 0, or a 0-d tensor, which gets a gradient. softcap: a number above 0.
    backend: "auto", "reference", "chunked", "triton"; see rime_fast.ops.dispatch. Only the reference is differentiable
        twice.
    vocab_group: process group over which lm_head and bias are split by vocabulary, V/p rows on each rank in rank
        order; everything else is the same on all ranks, targets are numbers in the whole vocabulary.
    max_scored: a bound on the number of scored rows that the host knows (the collator counts them); on CUDA it bounds
        the workspace, and the library backend's work, which otherwise follow T. The result does not depend on it.

    Raises TypeError or ValueError naming the argument. On an accelerator, values inside tensors are checked by an
    asynchronous device assertion instead.
    """
    rest = pools, bias, temperature, softcap, ignore_index, entropy, normalize, backend, vocab_group, max_scored
    return _logprob_pool(prepare(hidden, lm_head, targets, *rest, TABLE))


def fused_linear_ce(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    token_weight: Tensor | None = None,
    pools: Mapping[str, Pool] | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    normalize: bool = True,
    backend: str = "auto",
    vocab_group: ProcessGroup | None = None,
    max_scored: int | None = None,
) -> tuple[Tensor, LogprobPool]:
    """Cross-entropy of a language-model head with the gradients made in the forward, for supervised training.

    Gives (sum_t token_weight_t * -logp_t, the pass's LogprobPool) for 6 M H V FLOP.
    token_weight: [T], 1 everywhere by default (divide it by the number of scored tokens for a mean); it gets a
    gradient if it asks for one. The loss is 0-d fp32. All other arguments as in ``fused_logprob_pool``. The returned
    LogprobPool is differentiable too; a gradient through its logp or entropy costs a recomputation, one through its
    embeddings does not. On CUDA, where the logits of enough rows to fill the chip exceed the workspace, the logits are
    recomputed here as well (8 M H V): docs/logprob_pool.md says why.
    """
    rest = pools, bias, temperature, softcap, ignore_index, entropy, normalize, backend, vocab_group, max_scored
    call = prepare(hidden, lm_head, targets, *rest, TABLE)
    weight = check_weight(token_weight, call.hidden)
    if call.options.backend != "reference":
        refuse_forward_ad("token_weight", [token_weight])
    if call.options.backend == "reference" or not any(call.options.needs):
        found = _logprob_pool(call)
        return _summed_loss(found.logp, weight, call.targets, ignore_index), found
    loss, logp, _, row_entropy, embeddings, *_ = torch.ops.rime_fast.linear_ce(
        *call.tensors, weight, call.options.encode(), call.group
    )
    check_late(call)
    return loss, _as_output(call, logp, row_entropy, embeddings)


def _logprob_pool(call: Call) -> LogprobPool:
    if call.options.backend == "reference":
        return _as_output(call, *reference(*call.tensors, call.options))  # type: ignore
    found = torch.ops.rime_fast.logprob_pool(*call.tensors, call.options.encode(), call.group)
    check_late(call)
    logp, _, row_entropy, embeddings, _ = found
    return _as_output(call, logp, row_entropy, embeddings)


def _as_output(call: Call, logp: Tensor, row_entropy: Tensor | None, embeddings: Tensor) -> LogprobPool:
    named = dict(zip(call.names, embeddings.split(list(call.sizes)), strict=True)) if call.names else {}
    return LogprobPool(logp, row_entropy if call.options.entropy else None, named)


# --- the operators' bodies -------------------------------------------------------------------------------------------


def schedule_for(backend: str, hidden: Tensor) -> ModuleType:
    """The module that does the work; all have the same functions."""
    if backend == "triton":
        return triton
    return cuda if hidden.is_cuda else cpu


def _problem(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    options: Options,
) -> Problem:
    scoring = Scoring(None if bias is None else bias.float().contiguous(), temperature, softcap)
    return Problem(hidden, lm_head, targets.contiguous(), scoring, Spans(starts, ends), options)


@contextmanager
def _own_settings(hidden: Tensor) -> Iterator[None]:
    """Without autocast: the operands came cast to it (arguments.py), the fp32 products must not be cut short; and on
    the tensors' device."""
    with on_device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        yield


def _row_results(problem: Problem, stats: Statistics, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, lse, entropy): 0 where ignored; no entropy is empty."""
    stats = stats.without(problem.ignored) if group else stats  # ranks' zeros merge to something else
    return (stats.target_logit - stats.lse[0]).sub_(stats.lse[1]), stats.lse, stats.entropy


def _summed_loss(logp: Tensor, weight: Tensor | None, targets: Tensor, ignore_index: int) -> Tensor:
    if weight is None:
        return -logp.sum()
    # Ignored rows are left out, not multiplied by 0: their weight may be anything, 1/0 as well.
    return -(weight * logp).masked_fill(targets == ignore_index, 0.0).sum()


Grads = tuple[Tensor, Tensor, Tensor, Tensor]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _as_grads(found: Gradients, sources: Sequence[Tensor | None], waiting: bool) -> Grads:
    """The gradients in the sources' dtypes, or in those they wait in until the upstream factor; empty if not made."""
    made = []
    for grad, source in zip(found, sources, strict=True):
        if grad is None or source is None:
            made.append(sources[0].new_empty(0))  # type: ignore[union-attr]
        else:
            made.append(grad.to(gradient_dtype(source.dtype) if waiting else source.dtype))
    return tuple(made)  # type: ignore[return-value]


def _fake_grads(sources: Sequence[Tensor | None], needs: Needs, waiting: bool) -> Grads:
    made = []
    for source, need in zip(sources, needs, strict=True):
        shape = source.shape if need and source is not None else (0,)
        like = sources[0] if source is None or not need else source
        made.append(like.new_empty(shape, dtype=gradient_dtype(like.dtype) if waiting else like.dtype))  # type: ignore
    return tuple(made)  # type: ignore[return-value]


# --- rime_fast::logprob_pool -----------------------------------------------------------------------------------------


@torch.library.custom_op("rime_fast::logprob_pool", mutates_args=())
def logprob_pool(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    options: Sequence[int],
    group: str,
) -> Outputs:
    """The forward as a custom operator: (logp [T], lse [2, T], entropy [T] or [0], embeddings [K, H], inv_norm [K]),
    fp32."""
    known = Options.decode(options)
    problem = _problem(hidden, lm_head, targets, starts, ends, bias, temperature, softcap, known)
    with _own_settings(hidden):
        stats, found = schedule_for(known.backend, hidden).forward(problem)
        return *_row_results(problem, vocab_parallel.merge(stats, group), group), *found


@logprob_pool.register_fake
def _(hidden: Tensor, lm_head: Tensor, targets: Tensor, starts: Tensor, *rest: Any) -> Outputs:
    row = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    embeddings, inv_norm = row.new_empty(starts.shape[0], hidden.shape[1]), row.new_empty(starts.shape[0])
    entropy = torch.empty_like(row) if Options.decode(rest[-2]).entropy else row.new_empty(0)
    return row, row.new_empty(2, hidden.shape[0]), entropy, embeddings, inv_norm


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, ctx.options, ctx.group = inputs
    _, lse, _, _, inv_norm = output
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(lse, inv_norm)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    options = Options.decode(ctx.options)._replace(needs=Needs(needs[0], needs[1], needs[5], needs[6]))
    grad_logp, _, grad_entropy, grad_embeddings, _ = grads
    upstream = grad_logp, grad_entropy if options.entropy else None, grad_embeddings
    found = torch.ops.rime_fast.logprob_pool_backward(*upstream, *ctx.saved_tensors, options.encode(), ctx.group)
    hidden, lm_head, bias, temperature = _only(found, options.needs)
    return hidden, lm_head, None, None, None, bias, temperature, None, None, None


def _only(found: Sequence[Tensor], needs: Needs) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


logprob_pool.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("rime_fast::logprob_pool_backward", mutates_args=())
def logprob_pool_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_embeddings: Tensor | None,
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    embeddings: Tensor,
    inv_norm: Tensor,
    options: Sequence[int],
    group: str,
) -> Grads:
    """The backward as a custom operator: gradients of hidden, lm_head, bias and temperature, in their dtypes; empty
    where not needed."""
    known = Options.decode(options)
    problem = _problem(hidden, lm_head, targets, starts, ends, bias, temperature, softcap, known)
    if grad_logp is None and grad_entropy is None:  # only read-outs were used: the head has no part in it
        problem = problem._replace(targets=torch.full_like(targets, known.ignore_index))
    rows: Tensor | None = None
    with _own_settings(hidden):
        # What a group sums over its ranks starts on one of them.
        if known.needs.hidden and grad_embeddings is not None and known.vocab_start == 0:
            rows = row_gradients(grad_embeddings, ReadOuts(embeddings, inv_norm), problem.spans, known.normalize)
        upstream = Upstream(torch.zeros_like(logp) if grad_logp is None else grad_logp, grad_entropy)
        stats = Statistics(lse, logp + lse[0], entropy)
        found = schedule_for(known.backend, hidden).backward(problem, stats, upstream, rows)
        found = vocab_parallel.reduce_gradients(found, group)
        return _as_grads(found, (hidden, lm_head, bias, temperature), waiting=False)


@logprob_pool_backward.register_fake
def _(*args: Any) -> Grads:
    return _fake_grads((args[3], args[4], args[8], args[9]), Options.decode(args[-2]).needs, waiting=False)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError(
        "fused_logprob_pool, fused_linear_ce: the fused backends have no second derivative; use backend='reference'"
    )


logprob_pool_backward.register_autograd(_no_second_derivative)


# --- rime_fast::linear_ce --------------------------------------------------------------------------------------------


@torch.library.custom_op("rime_fast::linear_ce", mutates_args=())
def linear_ce(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    token_weight: Tensor | None,
    options: Sequence[int],
    group: str,
) -> Results:
    """The summed loss and its gradients as a custom operator: (loss, the results of rime_fast::logprob_pool, d hidden,
    d lm_head, d bias, d temperature), upstream 1."""
    known = Options.decode(options)
    problem = _problem(hidden, lm_head, targets, starts, ends, bias, temperature, softcap, known)
    merge = partial(vocab_parallel.merge, name=group) if group else None
    with _own_settings(hidden):
        schedule = schedule_for(known.backend, hidden)
        stats, read_outs, found = schedule.forward_with_gradient(problem, token_weight, merge)
        found = vocab_parallel.reduce_gradients(found, group)
        logp, lse, entropy = _row_results(problem, stats, group)
        loss = _summed_loss(logp, token_weight, targets, known.ignore_index)
        made = _as_grads(found, (hidden, lm_head, bias, temperature), waiting=True)
        return loss, logp, lse, entropy, *read_outs, *made


@linear_ce.register_fake
def _(hidden: Tensor, lm_head: Tensor, targets: Tensor, starts: Tensor, *rest: Any) -> Results:
    _, bias, temperature, _, _, numbers, _ = rest
    options = Options.decode(numbers)
    row = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    embeddings, inv_norm = row.new_empty(starts.shape[0], hidden.shape[1]), row.new_empty(starts.shape[0])
    entropy = torch.empty_like(row) if options.entropy else row.new_empty(0)
    made = _fake_grads((hidden, lm_head, bias, temperature), options.needs, waiting=True)
    return row.new_empty(()), row, row.new_empty(2, hidden.shape[0]), entropy, embeddings, inv_norm, *made


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *tensors, token_weight, ctx.options, ctx.group = inputs
    _, logp, lse, entropy, embeddings, inv_norm, *made = output
    ctx.save_for_backward(token_weight, *tensors, logp, lse, entropy, embeddings, inv_norm)
    # Kept as attributes, not as saved tensors: the backward scales them in place, once.
    ctx.made = made
    ctx.mark_non_differentiable(lse, inv_norm, *made)
    ctx.set_materialize_grads(False)


def _backward_loss(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss, grad_logp, _, grad_entropy, grad_embeddings = grads[:5]
    token_weight, *saved = ctx.saved_tensors
    options = Options.decode(ctx.options)
    grad_entropy = grad_entropy if options.entropy else None
    made, ctx.made = ctx.made, None
    if made is not None and grad_logp is None and grad_entropy is None and not torch.is_grad_enabled():
        torch.ops.rime_fast.scale_gradients_(made, grad_loss, grad_embeddings, saved[3:5], saved[11:], ctx.options)
        sources = saved[0], saved[1], saved[5], saved[6]
        found = [g if s is None else g.to(s.dtype) for g, s in zip(made, sources, strict=True)]
    else:  # a gradient at logp or entropy as well, a retained graph: the logits are recomputed
        upstream = grad_logp
        if grad_loss is not None:
            slope = (grad_loss if token_weight is None else grad_loss * token_weight).expand(saved[2].shape)
            upstream = -slope if grad_logp is None else grad_logp - slope
        found = torch.ops.rime_fast.logprob_pool_backward(
            upstream, grad_entropy, grad_embeddings, *saved, ctx.options, ctx.group
        )
    hidden, lm_head, bias, temperature = _only(found, options.needs)
    logp = saved[8]
    weight = -logp * grad_loss if ctx.needs_input_grad[8] and grad_loss is not None else None
    return hidden, lm_head, None, None, None, bias, temperature, None, weight, None, None


linear_ce.register_autograd(_backward_loss, setup_context=_setup_loss)


@torch.library.custom_op("rime_fast::scale_gradients_", mutates_args=("made",))
def scale_gradients_(
    made: Sequence[Tensor],
    factor: Tensor | None,
    grad_embeddings: Tensor | None,
    spans: Sequence[Tensor],
    read_outs: Sequence[Tensor],
    options: Sequence[int],
) -> None:
    """Multiply the made gradients by the upstream gradient of the loss (None: 0), in place; that of hidden also takes
    up the read-outs' gradient, which no forward can know."""
    known, at = Options.decode(options), Spans(*spans)
    schedule = schedule_for(known.backend, made[0])
    with on_device_of(made[0]):
        if known.needs.hidden:
            rows = None
            if grad_embeddings is not None:
                rows = row_gradients(grad_embeddings, ReadOuts(*read_outs), at, known.normalize)
            schedule.start_gradient_(made[0], factor, rows, at)
        for grad in made[1:]:
            if grad.numel():
                schedule.scale_(grad, factor)


@scale_gradients_.register_fake
def _(made: Sequence[Tensor], *rest: Any) -> None:
    return None
