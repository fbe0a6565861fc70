"""Attention of rollouts to their prompt and to themselves, in two flash passes that share one softmax.

    pass 1, no mask:  the rows of all rollouts of a prompt  x  the keys of that prompt      (out_1, lse_1)
    pass 2, causal:   the rows of a rollout                 x  its own keys                 (out_2, lse_2)
    lse = log(exp lse_1 + exp lse_2),    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

This is exact. So is the backward: a flash backward needs the softmax's normaliser and the output only through
P = exp(s - lse) and rowsum(dO * O), so each pass run backwards with the MERGED out and lse gives its own part of the
gradients, and the parts add up. No mask and no score matrix exist, and a prompt's keys are read once for its G rollouts
(with grouped-query attention, once for all query heads that share them).

CPU: torch's flash kernel, prompt by prompt (pass 1) and block by block (pass 2). CUDA, fp16 or bf16: torch's varlen
flash kernel, one call a pass whatever the lengths are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rime_fast.model.packing import PackedLayout, serves_varlen

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PrefixBounds:
    """Which rows belong together; all bounds are cumulative and start at 0.

    prefix [B + 1]: rows of each prompt among the prompts' rows. group [B + 1]: rows of all rollouts of each prompt
    among the rollouts' rows. own: the rollouts themselves. On a CUDA device the first two also as int32 tensors there.
    """

    prefix: list[int]
    group: list[int]
    own: PackedLayout
    device_prefix: Tensor | None = None
    device_group: Tensor | None = None

    @classmethod
    def make(
        cls, prefix: Sequence[int], group: Sequence[int], own: Sequence[int], device: torch.device
    ) -> PrefixBounds:
        """Make the bounds from the numbers of rows of each prompt, of each prompt's rollouts together, and of each
        rollout."""
        host = [torch.tensor([0, *rows]).cumsum(0) for rows in (prefix, group)]
        on_device: list[Tensor | None] = [None, None]
        if device.type == "cuda":
            on_device = [bounds.to(device, torch.int32, non_blocking=True) for bounds in host]
        return cls(host[0].tolist(), host[1].tolist(), PackedLayout(own, device, causal=True), *on_device)


class Pass(NamedTuple):
    """What the backward of one pass reads: its rows, and the output and log-sum-exp of both passes together."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor


class Cuts(NamedTuple):
    """Where torch's varlen kernel cuts the rows and the keys of one pass: cumulative int32, and the longest of each."""

    rows: Tensor | None
    keys: Tensor | None
    longest_rows: int
    longest_keys: int


class PrefixAttention(torch.autograd.Function):
    """Attends from rollouts to their prompt and to themselves: query, key, value [rows, heads, D] of the rollouts and
    the prompts' keys and values -> [rows, heads, D].

    Arguments: query, key, value, prompt_key, prompt_value (one dtype), bounds, scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        bounds: PrefixBounds,
        scale: float,
    ) -> Tensor:
        out, lse = prefix_forward(query, key, value, prompt_key, prompt_value, bounds, scale)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, out, lse)
        ctx.bounds, ctx.scale = bounds, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, prompt_key, prompt_value, *merged = ctx.saved_tensors
        keys, done = (prompt_key, prompt_value), Pass(query, key, value, *merged)
        return *prefix_backward(grads[0], done, *keys, ctx.bounds, ctx.scale), None, None


def prefix_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    bounds: PrefixBounds,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend as ``PrefixAttention``, without autograd: (out [rows, heads, D], lse [rows, heads] fp32)."""
    prefix = _varlen_prefix if query.is_cuda else _cpu_prefix
    out_1, lse_1 = prefix(query, prompt_key, prompt_value, bounds, scale)
    out_2, lse_2 = own_forward(query, key, value, bounds, scale)
    return (_merge if query.device.type == "cpu" else _merge_on_gpu)(out_1, lse_1, out_2, lse_2)


def prefix_backward(
    grad: Tensor, done: Pass, prompt_key: Tensor, prompt_value: Tensor, bounds: PrefixBounds, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of ``prefix_forward``'s five tensors; ``done``: the rollouts' rows and its results."""
    prefix, grad = _varlen_prefix_backward if grad.is_cuda else _cpu_prefix_backward, grad.contiguous()
    shared = done._replace(key=prompt_key, value=prompt_value)
    d_query, d_prompt_key, d_prompt_value = prefix(grad, shared, bounds, scale)
    d_own, d_key, d_value = own_backward(grad, done, bounds, scale)
    return d_query + d_own, d_key, d_value, d_prompt_key, d_prompt_value


def own_forward(query: Tensor, key: Tensor, value: Tensor, bounds: PrefixBounds, scale: float) -> tuple[Tensor, Tensor]:
    """Attend inside each sequence of ``bounds.own``, causally and without autograd: (out [rows, heads, D], lse [rows,
    heads])."""
    return (_varlen_own if query.is_cuda else _cpu_own)(query, key, value, bounds, scale)


def own_backward(grad: Tensor, done: Pass, bounds: PrefixBounds, scale: float) -> Grads:
    """Compute the gradients of ``own_forward``'s query, key and value."""
    return (_varlen_own_backward if grad.is_cuda else _cpu_own_backward)(grad, done, bounds, scale)


def _merge(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_1, lse_2)
    first, second = (
        out.to(lse.dtype) * (part - lse).exp_()[..., None] for out, part in ((out_1, lse_1), (out_2, lse_2))
    )
    return (first + second).to(out_1.dtype), lse


def _merge_on_gpu(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    from rime_fast.model.triton_prefix import merge_passes

    return merge_passes(out_1, lse_1, out_2, lse_2)


def flash_serves(tensor: Tensor) -> bool:
    """Whether the two passes have a kernel for this device and dtype."""
    if tensor.device.type == "cpu":
        return tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return serves_varlen(tensor)


# --- CPU -------------------------------------------------------------------------------------------------------------
# Kernel shapes: query [n, heads, Q, D], keys [n, heads, S, D], out as query, lse [n, heads, Q].


def _forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _backward(grad: Tensor, done: Pass, causal: bool, scale: float) -> Grads:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, *done, 0.0, causal, scale=scale)


def _fold(rows: Tensor, kv: int) -> Tensor:
    """[Q, heads, ...] -> [1, kv, Q * shared, ...]: heads that share keys become rows (no mask tells rows apart)."""
    return rows.unflatten(1, (kv, -1)).transpose(0, 1).flatten(1, 2)[None]


def _unfold(rows: Tensor, shared: int) -> Tensor:
    """The inverse of ``_fold``: [1, kv, Q * shared, ...] -> [Q, heads, ...]."""
    return rows[0].unflatten(1, (-1, shared)).transpose(0, 1).flatten(1, 2)


def _keys(rows: Tensor) -> Tensor:
    """[S, kv, D] -> [1, kv, S, D]."""
    return rows.transpose(0, 1)[None]


def _cpu_prefix(query: Tensor, key: Tensor, value: Tensor, bounds: PrefixBounds, scale: float) -> tuple[Tensor, Tensor]:
    kv = key.shape[1]
    shared = query.shape[1] // kv
    outs, sums = [], []
    for (a, b), (s, e) in zip(pairwise(bounds.group), pairwise(bounds.prefix), strict=True):
        out, lse = _forward(_fold(query[a:b], kv), _keys(key[s:e]), _keys(value[s:e]), False, scale)
        outs.append(_unfold(out, shared))
        sums.append(_unfold(lse, shared))
    return torch.cat(outs), torch.cat(sums)


def _cpu_prefix_backward(grad: Tensor, done: Pass, bounds: PrefixBounds, scale: float) -> Grads:
    query, key, value, out, lse = done
    kv = key.shape[1]
    shared = query.shape[1] // kv
    d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for (a, b), (s, e) in zip(pairwise(bounds.group), pairwise(bounds.prefix), strict=True):
        g, q, o, sums = (_fold(x[a:b], kv) for x in (grad, query, out, lse))
        dq, dk, dv = _backward(g, Pass(q, _keys(key[s:e]), _keys(value[s:e]), o, sums), False, scale)
        d_query[a:b] = _unfold(dq, shared)
        d_key[s:e], d_value[s:e] = dk[0].transpose(0, 1), dv[0].transpose(0, 1)
    return d_query, d_key, d_value


def _blocks(rows: Tensor, own: PackedLayout) -> list[Tensor]:
    """[rows, heads, ...] of the rollouts as [n, heads, S, ...] blocks."""
    rows = rows if own.take is None else rows.index_select(0, own.take)
    parts = rows.split([n * s for n, s in own.blocks])
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, own.blocks, strict=True)]


def _rows(blocks: Sequence[Tensor], own: PackedLayout) -> Tensor:
    """The inverse of ``_blocks``; what stands in the padding is dropped."""
    rows = torch.cat([block.transpose(1, 2).flatten(0, 1) for block in blocks])
    return rows if own.slot is None else rows.index_select(0, own.slot)


def _widened(rows: Tensor, heads: int) -> Tensor:
    """[rows, kv, D] -> [rows, heads, D]: each key once per query head that uses it."""
    return rows if rows.shape[1] == heads else rows.repeat_interleave(heads // rows.shape[1], dim=1)


def _cpu_own(query: Tensor, key: Tensor, value: Tensor, bounds: PrefixBounds, scale: float) -> tuple[Tensor, Tensor]:
    own, heads = bounds.own, query.shape[1]
    inputs = (_blocks(x, own) for x in (query, _widened(key, heads), _widened(value, heads)))
    done = [_forward(q, k, v, True, scale) for q, k, v in zip(*inputs, strict=True)]
    return _rows([out for out, _ in done], own), _rows([lse for _, lse in done], own)


def _cpu_own_backward(grad: Tensor, done: Pass, bounds: PrefixBounds, scale: float) -> Grads:
    own, heads, kv = bounds.own, done.query.shape[1], done.key.shape[1]
    wide = done._replace(key=_widened(done.key, heads), value=_widened(done.value, heads))
    inputs = map(Pass, *(_blocks(x, own) for x in wide))
    if own.slot is not None:  # no gradient comes from the padding, unlike in _blocks, which repeats the last row
        grad = grad.new_zeros(own.padded, *grad.shape[1:]).index_copy_(0, own.slot, grad)
    sizes = [n * s for n, s in own.blocks]
    grads = [g.unflatten(0, shape).transpose(1, 2) for g, shape in zip(grad.split(sizes), own.blocks, strict=True)]
    made = [_backward(g, block, True, scale) for g, block in zip(grads, inputs, strict=True)]
    d_query, d_key, d_value = (_rows([parts[i] for parts in made], own) for i in range(3))
    if kv != heads:
        d_key, d_value = (d.unflatten(1, (kv, -1)).sum(2) for d in (d_key, d_value))
    return d_query, d_key, d_value


# --- CUDA ------------------------------------------------------------------------------------------------------------
# Kernel shapes: query [rows, heads, D], keys [rows, kv heads, D], lse [heads, rows].


def _longest(bounds: Sequence[int]) -> int:
    return max(b - a for a, b in pairwise(bounds))


def _prefix_cuts(bounds: PrefixBounds) -> Cuts:
    return Cuts(bounds.device_group, bounds.device_prefix, _longest(bounds.group), _longest(bounds.prefix))


def _own_cuts(bounds: PrefixBounds) -> Cuts:
    return Cuts(bounds.own.bounds, bounds.own.bounds, bounds.own.longest, bounds.own.longest)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cuts: Cuts, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(query, key, value, *cuts, 0.0, causal, False, scale=scale)
    return out, lse.transpose(0, 1)


def _varlen_backward(grad: Tensor, done: Pass, cuts: Cuts, causal: bool, scale: float) -> Grads:
    done = done._replace(lse=done.lse.transpose(0, 1).contiguous())
    nothing = torch.empty(0, device=grad.device)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad.device)
    return torch.ops.aten._flash_attention_backward(grad, *done, *cuts, 0.0, causal, no_dropout, nothing, scale=scale)


def _varlen_prefix(
    query: Tensor, key: Tensor, value: Tensor, bounds: PrefixBounds, scale: float
) -> tuple[Tensor, Tensor]:
    return _varlen(query, key, value, _prefix_cuts(bounds), False, scale)


def _varlen_own(query: Tensor, key: Tensor, value: Tensor, bounds: PrefixBounds, scale: float) -> tuple[Tensor, Tensor]:
    return _varlen(query, key, value, _own_cuts(bounds), True, scale)


def _varlen_prefix_backward(grad: Tensor, done: Pass, bounds: PrefixBounds, scale: float) -> Grads:
    return _varlen_backward(grad, done, _prefix_cuts(bounds), False, scale)


def _varlen_own_backward(grad: Tensor, done: Pass, bounds: PrefixBounds, scale: float) -> Grads:
    return _varlen_backward(grad, done, _own_cuts(bounds), True, scale)
