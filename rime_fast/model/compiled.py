"""torch.compile of the decoder layers: one graph serves every layer and every batch of packed rows.

Each layer is compiled in its place (``nn.Module.compile``), so that names in checkpoints, hooks and wrappers stay as
they are; lengths are dynamic. How a batch's sequences lie is a Python object that differs from batch to batch: it would
mean a compilation each time. So inside the graph attention is one operator that finds it by a number, and runs the
passes of ``prefix_attention.py``. What surrounds the layers (vision tower, head, losses) runs as it does without.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import count
from typing import Any

import torch
from torch import Tensor

from rime_fast.model.packing import AttentionLayout, PackedLayout, check_window
from rime_fast.model.prefix_attention import (
    Pass,
    PrefixBounds,
    flash_serves,
    own_backward,
    own_forward,
    prefix_backward,
    prefix_forward,
)
from rime_fast.model.shared_prefix import PrefixLayout

KEPT = 256  # layouts: more than a step has between a forward and its backward
_NUMBERS = count()
_LAYOUTS: OrderedDict[int, AttentionLayout] = OrderedDict()
Grads = tuple[Tensor, Tensor, Tensor]


def compile_layers(model: Any, backend: str = "inductor", mode: str | None = None) -> None:
    """Compile the decoder layers of a dual-mode model in their place; arguments as for ``torch.compile``."""
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)


def is_compiled(model: Any) -> bool:
    """Whether ``compile_layers`` was called on the model."""
    return model.model.language_model.layers[0]._compiled_call_impl is not None


def layout_kwargs(model: Any, layout: AttentionLayout) -> dict[str, Any]:
    """Give a layout as ``packed_attention`` takes it in the model's layers."""
    if is_compiled(model) and isinstance(layout, (PackedLayout, PrefixLayout)):
        return {"rime_handle": handle_of(layout)}
    return {"rime_layout": layout}


def handle_of(layout: AttentionLayout) -> Tensor:
    """Give the number under which ``layout_attention`` finds the layout, 0-d int64 on the host."""
    number = next(_NUMBERS)
    _LAYOUTS[number] = layout
    while len(_LAYOUTS) > KEPT:
        _LAYOUTS.popitem(last=False)
    return torch.tensor(number)


@torch.library.custom_op("rime_fast::layout_attention", mutates_args=())
def layout_attention(
    query: Tensor, key: Tensor, value: Tensor, handle: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Attend as ``AttentionLayout.attention``: [1, heads, T, D] -> ([1, T, heads, D], log-sum-exps [T, heads]).

    window: see ``check_window``; 0: none. Raises ValueError for a dtype that the flash passes do not take.
    """
    layout = _layout(handle)
    check_window(layout, window or None)
    q, k, v = _rows(query, key, value)
    if not flash_serves(q):
        raise ValueError(f"compiled layers attend in bf16 or fp16 on a GPU, got {value.dtype}")
    if isinstance(layout, PackedLayout):
        out, lse = own_forward(q, k, v, _alone(layout), scale)
    else:
        (q, k, v), (front_q, front_k, front_v) = _parts(layout, q, k, v)
        front, front_lse = own_forward(front_q, front_k, front_v, _alone(layout.prefixes), scale)
        lent = layout.borrowed
        keys, values = (front_k, front_v) if lent is None else _lend(lent, k, v, front_k, front_v)
        back, back_lse = prefix_forward(q, k, v, keys, values, layout.bounds, scale)
        out, lse = torch.cat([front, back]), torch.cat([front_lse, back_lse])
    return out[None].contiguous(), lse.contiguous()


@torch.library.custom_op("rime_fast::layout_attention_backward", mutates_args=())
def layout_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, handle: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value."""
    layout, (q, k, v), grad, out = _layout(handle), _rows(query, key, value), grad[0].contiguous(), out[0]
    if isinstance(layout, PackedLayout):
        found = own_backward(grad, Pass(q, k, v, out, lse), _alone(layout), scale)
    else:
        found = _prefixed_backward(layout, grad, Pass(q, k, v, out, lse), scale)
    made = [d.transpose(0, 1)[None].to(x.dtype) for d, x in zip(found, (query, key, value), strict=True)]
    return made[0].contiguous(), made[1].contiguous(), made[2].contiguous()


def _prefixed_backward(layout: PrefixLayout, grad: Tensor, done: Pass, scale: float) -> Grads:
    sizes = [layout.prefix_rows, layout.branch_rows]
    (front, back), lent = (Pass(*parts) for parts in zip(*(x.split(sizes) for x in done), strict=True)), layout.borrowed
    front_grad, back_grad = grad.split(sizes)
    d_front = own_backward(front_grad, front, _alone(layout.prefixes), scale)
    keys, values = (front.key, front.value) if lent is None else _lend(lent, back.key, back.value, *front[1:3])
    d_q, d_k, d_v, *d_keys = prefix_backward(back_grad, back, keys, values, layout.bounds, scale)
    found = [torch.cat([d_front[0], d_q])]
    for own, branches, shared in zip(d_front[1:], (d_k, d_v), d_keys, strict=True):
        if lent is not None:
            branches = branches.index_add(0, lent, shared[layout.prefix_rows :])
        found.append(torch.cat([own + shared[: layout.prefix_rows], branches]))
    return found[0], found[1], found[2]


@layout_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, handle: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    _, heads, rows, width = query.shape
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    return value.new_empty(1, rows, heads, width), value.new_empty(rows, heads, dtype=wide)


@layout_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, handle: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    return made[0], made[1], made[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, handle, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output, handle)


def _back(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    found = torch.ops.rime_fast.layout_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *found, None, None, None


layout_attention.register_autograd(_back, setup_context=_keep)


def _layout(handle: Tensor) -> Any:
    layout = _LAYOUTS.get(int(handle))
    if layout is None:
        raise RuntimeError(
            f"more than {KEPT} packed batches were run between a forward and its backward; lower kept_graphs_gib"
        )
    return layout


def _alone(layout: PackedLayout) -> PrefixBounds:
    return PrefixBounds([], [], layout)


def _rows(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """[T, heads, D] of each, in one dtype: rotary embedding may leave queries and keys wider (autocast)."""
    return [x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)]


def _parts(layout: PrefixLayout, *rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The branches' rows, and the prompts'."""
    split = [x.split([layout.prefix_rows, layout.branch_rows]) for x in rows]
    return [back for _, back in split], [front for front, _ in split]


def _lend(lent: Tensor, key: Tensor, value: Tensor, front_key: Tensor, front_value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the prefixes: the prompts', and those that branches lend to others."""
    return torch.cat([front_key, key.index_select(0, lent)]), torch.cat([front_value, value.index_select(0, lent)])
