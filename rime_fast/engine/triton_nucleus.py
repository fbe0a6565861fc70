"""The kernel of nucleus sampling: the smallest logit that stays in, found without sorting a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rime_fast.ops.dispatch import on_device_of


@triton.jit
def ordered(x):
    """The bits of fp32 as integers in the order of the numbers; its own inverse up to the type."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def nucleus_kernel(logits, lowest, top_p, columns, BLOCK: tl.constexpr):
    """Bisect one row: the smallest number above which less than ``top_p`` of its probability lies."""
    row = logits + tl.program_id(0).to(tl.int64) * columns
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(row + at, mask=at < columns, other=float("-inf")).to(tl.float32))
    top = tl.max(most, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(row + at, mask=at < columns, other=float("-inf")).to(tl.float32) - top)
    enough = tl.sum(total, 0) * top_p
    high = ordered(top.to(tl.int32, bitcast=True))  # nothing lies above the largest
    low = tl.full([], -0x7F800000, tl.int32) - 1  # of -inf
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # rounded down, without overflow
        above = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(row + at, mask=at < columns, other=float("-inf")).to(tl.float32)
            above += tl.where(ordered(x.to(tl.int32, bitcast=True)) > middle, tl.exp(x - top), 0.0)
        fits = tl.sum(above, 0) < enough
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    tl.store(lowest + tl.program_id(0), ordered(high).to(tl.float32, bitcast=True))


def nucleus_floor(logits: Tensor, top_p: float) -> Tensor:
    """Find the smallest logit of the smallest set of probability ``top_p`` of each row: [N, V] -> [N] fp32.

    Two reads of a row, then one for each step of a bisection over the fp32 numbers: at most 32, from the L2 cache
    where the rows that run at a time fit there (a sort of N 64 x 151,936 is 20 launches and writes them several times).
    """
    logits = logits.contiguous()
    lowest = logits.new_empty(len(logits), dtype=torch.float32)
    with on_device_of(logits):
        nucleus_kernel[(len(logits),)](logits, lowest, top_p, logits.shape[1], BLOCK=4096, num_warps=16)
    return lowest
