"""Attention over packed rows: the sequences of a batch lie end to end, only the attention knows where they end.

Everything in a transformer but its attention works on rows, so a packed row of T tokens pays for no padding in any
matrix product. Attention itself takes one of two ways:

- varlen, on CUDA in fp16 and bf16: torch's flash kernel reads the packed row itself and the boundaries, one call a
  layer whatever the lengths are. An installed flash-attention does the same (``PackedLayout.flash_kwargs``).
- grouped, elsewhere: the rows of sequences of similar length are laid out as right-padded [n, S] blocks and go through
  ``scaled_dot_product_attention`` with ``is_causal``, which needs no mask: the padding lies to the right of every
  real row. Sequences of one length that follow each other are a plain view, nothing is copied.

Both give one forward through the modules whatever the lengths are, so that ranks with different batches make the same
collective calls under ZeRO-3 and FSDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

# The name under which ``packed_attention`` is known to transformers.
PACKED_SDPA = "rime_sdpa"

# A further block costs about as much as this many score entries.
_BLOCK_COST = {"cpu": 96 * 96, "cuda": 1024 * 1024}

# Without cuDNN's, which makes a plan on the host for every new shape of a block (20-40 ms each; PyTorch issue 187770).
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class AttentionLayout(Protocol):
    """What decides who sees whom; passed down to ``packed_attention`` as ``rime_layout``."""

    longest: int  # tokens of the longest sequence

    def attention(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float
    ) -> Tensor:
        """Attend in one layer: query [N, heads, Q, D], key and value [N, kv heads, Q, D] -> [N, Q, heads, D]."""


class PackedLayout:
    """Where the sequences of one packed row lie, and how they are grouped into blocks for attention.

    ``lengths``: tokens of each sequence, in packed order, all positive. ``causal``: whether a row sees only itself
    and the rows before it. Non-causal sequences are grouped by equal length only, since padding would need a mask.
    Use ``packed_layout``: it keeps the recent ones.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, *, causal: bool) -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths is {list(lengths)[:8]}; expected at least one length, all positive")
        self.lengths = tuple(lengths)
        self.device = device
        self.causal = causal
        self.total = sum(self.lengths)
        self.longest = max(self.lengths)

    @cached_property
    def bounds(self) -> Tensor:
        """Where the sequences begin and end, int32 [N + 1] on the device."""
        return torch.tensor((0, *self.lengths)).cumsum(0).to(self.device, torch.int32, non_blocking=True)

    @cached_property
    def groups(self) -> list[list[int]]:
        """The sequences of each block."""
        return group_by_length(self.lengths, _BLOCK_COST.get(self.device.type, 0) if self.causal else 0)

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """The sequences of each block, and its rows for each of them."""
        return [(len(g), max(self.lengths[i] for i in g)) for g in self.groups]

    @property
    def take(self) -> Tensor | None:
        """The packed row of each block slot, [padded]; None where blocks and packed rows are the same thing."""
        return self._index[0]

    @property
    def slot(self) -> Tensor | None:
        """The block slot of each packed row, [T]; None as above."""
        return self._index[1]

    @cached_property
    def padded(self) -> int:
        """The slots of all blocks."""
        return sum(n * s for n, s in self.blocks)

    @cached_property
    def _index(self) -> tuple[Tensor | None, Tensor | None]:
        """(take, slot).

        Both None when blocks and packed rows are the same thing. Padding repeats its sequence's last row: any finite
        value would do, no real row ever sees it.
        """
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        ordered = torch.tensor([i for g in self.groups for i in g])
        width = torch.tensor([s for n, s in self.blocks for _ in range(n)])
        base = width.cumsum(0) - width
        within = torch.arange(self.padded) - base.repeat_interleave(width)
        real = lengths[ordered].repeat_interleave(width)
        take = starts[ordered].repeat_interleave(width) + torch.minimum(within, real - 1)
        if self.padded == self.total and torch.equal(take, torch.arange(self.total)):
            return None, None
        slot = torch.empty(self.total, dtype=torch.int64)
        kept = within < real
        slot[take[kept]] = torch.arange(self.padded)[kept]
        return take.to(self.device, non_blocking=True), slot.to(self.device, non_blocking=True)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Attend inside each sequence. query [T, heads, D], key and value [T, kv heads, D] -> [T, heads, D]."""
        if query.shape[0] != self.total:
            raise ValueError(f"query has {query.shape[0]} rows; expected {self.total}, the sum of lengths")
        if serves_varlen(query) and not dropout:
            rows, *_ = torch.ops.aten._flash_attention_forward(
                *(query, key, value, self.bounds, self.bounds, self.longest, self.longest),
                *(0.0, self.causal, False),
                scale=scale,
            )
            return rows
        take, slot = self.take, self.slot
        if take is not None:
            query, key, value = (_ToBlocks.apply(x, take, slot) for x in (query, key, value))
        shared = query.shape[1] != key.shape[1]
        sizes = [n * s for n, s in self.blocks]
        parts = []
        split = zip(self.blocks, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        with sdpa_kernel(_KERNELS, set_priority=True) if query.is_cuda else nullcontext():
            for (n, s), q, k, v in split:
                q, k, v = (x.unflatten(0, (n, s)).transpose(1, 2) for x in (q, k, v))
                out = F.scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout, is_causal=self.causal and s > 1, scale=scale, enable_gqa=shared
                )
                parts.append(out.transpose(1, 2).flatten(0, 1))
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows if take is None else _FromBlocks.apply(rows, take, slot)

    def attention(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float
    ) -> Tensor:
        """Do what ``attend`` does, on transformers' shapes with one packed row: [1, heads, T, D] ->
        [1, T, heads, D]."""
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.attend(*rows, scale=scale, dropout=dropout)[None]

    def flash_kwargs(self) -> dict[str, Any]:
        """Give the boundaries as transformers' flash-attention functions take them: no host synchronisation follows."""
        return {
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def serves_varlen(rows: Tensor) -> bool:
    """Whether torch's varlen flash kernel takes such rows [T, heads, D]."""
    half = rows.dtype in (torch.float16, torch.bfloat16)
    return rows.is_cuda and half and rows.shape[-1] % 8 == 0 and rows.shape[-1] <= 256


@lru_cache(maxsize=64)
def _cached_layout(lengths: tuple[int, ...], device: torch.device, causal: bool) -> PackedLayout:
    return PackedLayout(lengths, device, causal=causal)


def packed_layout(lengths: Sequence[int], device: torch.device, *, causal: bool = True) -> PackedLayout:
    """The layout of ``lengths`` on ``device``; a batch seen before (gradient caching, epochs) costs a look-up."""
    return _cached_layout(tuple(lengths), device, causal)


def group_by_length(lengths: Sequence[int], block_cost: int, max_widths: int = 64) -> list[list[int]]:
    """Split sequences into groups of similar length: the split with the least sum of n * S^2 + block_cost.

    n sequences padded to S cost n * S^2 score entries; a block costs ``block_cost`` more. Returned are positions in
    ``lengths``; inside a group in their own order, groups in the order of their first member. ``block_cost`` 0 gives
    groups of equal length. Exact by dynamic programming over the distinct lengths (over ``max_widths`` of them, the
    nearby ones are taken together first).
    """
    step = 1 if block_cost == 0 else max(1, -(-(max(lengths) - min(lengths)) // max_widths))
    members: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        members.setdefault(-(-length // step), []).append(i)
    keys = sorted(members)
    if block_cost == 0:
        groups = [members[k] for k in keys]
    else:
        widths = [max(lengths[i] for i in members[k]) for k in keys]
        counts = [len(members[k]) for k in keys]
        best, cut = [0.0], [0]
        for end in range(1, len(keys) + 1):
            costs, n = [], 0
            for start in range(end - 1, -1, -1):
                n += counts[start]
                costs.append((best[start] + n * widths[end - 1] ** 2 + block_cost, start))
            cost, start = min(costs)
            best.append(cost)
            cut.append(start)
        groups, end = [], len(keys)
        while end:
            groups.append(sorted(i for k in keys[cut[end] : end] for i in members[k]))
            end = cut[end]
    return sorted(groups, key=lambda g: g[0])


class _ToBlocks(torch.autograd.Function):
    """Packed rows to block slots; a gather both ways (autograd's own backward would be a scatter-add)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, take: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return rows.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Padding gets no gradient: no real row sees its key, and its own output is dropped.
        (slot,) = ctx.saved_tensors
        return grads[0].index_select(0, slot), None, None


class _FromBlocks(torch.autograd.Function):
    """Block slots back to packed rows; the backward leaves zeros in the padding."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, take: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.padded = take.shape[0]
        return slots.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        out = grads[0].new_zeros((ctx.padded, *grads[0].shape[1:]))
        return out.index_copy_(0, slot, grads[0]), None, None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rime_layout: AttentionLayout | None = None,
    rime_handle: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Serve transformers as its attention function: the layout's own when one is passed down, plain SDPA otherwise.

    query [N, heads, Q, D], key and value [N, kv heads, Q, D] -> [N, Q, heads, D]; packed rows have N = 1, Q = T.
    rime_handle: the layout's in compiled layers (rime_fast/model/compiled.py).
    """
    if rime_handle is not None:
        if dropout:
            raise ValueError(f"attention_dropout is {dropout}; compiled layers attend without dropout")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = sliding_window or 0
        return torch.ops.rime_fast.layout_attention(query, key, value, rime_handle, scale, window)[0], None
    if rime_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    check_window(rime_layout, sliding_window)
    return rime_layout.attention(module, query, key, value, scale=scaling, dropout=dropout), None


def check_window(layout: AttentionLayout, window: int | None) -> None:
    """Raise ValueError where a sequence is longer than the sliding window that the model attends in."""
    if window is not None and layout.longest > window:
        raise ValueError(
            f"a sequence of {layout.longest} tokens exceeds sliding_window {window}; packed SDPA "
            "has no window: load the model with attn_implementation='flash_attention_2' or shorten max_length"
        )


AttentionInterface.register(PACKED_SDPA, packed_attention)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
