"""The Triton backend: what a launch is cut into, fixed per dtype, generation and options, never per batch."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

SPLIT_COLUMNS = 1024  # of one unit of the forward; part of what fixes a row's bits
FORWARD_ROWS = 8192  # scored rows of one launch of the forward, which bounds its partial results
GROUP = 16  # row blocks of a band (triton_kernels.py, order)
INTERPRETER_PROGRAMS = 3


class Tiles(NamedTuple):
    """The tile of a launch: BM x BN results, BK deep, by ``warps`` warps with ``stages`` tiles of the operands in
    flight."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


# 85 FLOP for a byte out of L2, where 128 x 128 does 64. Their 128 accumulators a thread leave room for the softmax of
# logits without a bias, and for their plain gradient.
FORWARD_WIDE = Tiles(128, 256, 64, 8, 3)
DLOGITS_WIDE = Tiles(256, 128, 64, 8, 3)


class Plan(NamedTuple):
    """How the backward is cut: rows of a group, columns of a panel, bytes in use at most."""

    rows: int
    columns: int
    workspace: int


def interpreted() -> bool:
    """Whether Triton's CPU interpreter runs the kernels (the variable is read when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability_of(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's device, (0, 0) in the interpreter."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0)


def processors(tensor: Tensor) -> int:
    """How many programs a persistent kernel has at most: one a multiprocessor."""
    if not tensor.is_cuda:
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def score_tiles(
    dtype: torch.dtype, capability: tuple[int, int], heavy: bool, tma: bool, wide: Tiles | None = None
) -> Tiles:
    """Choose the tiles where logits are made. heavy: the kernel makes more of a tile than its softmax (soft cap, the
    gradient of the entropy or temperature); half the columns then keep it in registers. wide: what it takes where both
    operands come by descriptors on sm_90, if it is not heavy.

    Chosen as the largest that tests/ops/test_logprob_pool_triton.py compiles without a spill in the products' loop;
    8.6, 8.9 and 12.0, whose shared memory is 100 KB, take the sizes of 8.0. The forward is heavy by its soft cap only,
    not by its entropy: logp is the same bits without it.
    """
    if capability == (0, 0):
        return Tiles(32, 32, 16, 4, 1)
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2)
    columns = 64 if heavy else 128
    if capability[0] in (9, 10):
        if capability[0] == 9 and tma and wide is not None and not heavy:
            return wide
        return Tiles(128, columns, 64, 8, 4) if tma else Tiles(128, columns, 32, 8, 4)
    return Tiles(128, columns, 64, 8, 3)


def head_tiles(dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Choose the tiles of dW: columns of the panel x columns of H, deep in rows."""
    if capability == (0, 0) or dtype == torch.float32:
        return score_tiles(dtype, capability, heavy=False, tma=False)
    return Tiles(128, 256, 64, 8, 3) if capability[0] in (9, 10) else Tiles(128, 128, 64, 8, 3)


def hidden_tiles(dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Choose the tiles of dX: rows x columns of H, deep in columns of the panel."""
    if capability == (0, 0) or dtype == torch.float32:
        return score_tiles(dtype, capability, heavy=False, tma=False)
    return Tiles(128, 128, 64, 8, 4) if capability[0] in (9, 10) else Tiles(128, 128, 64, 8, 3)


def plan(capacity: int, width: int, vocabulary: int, itemsize: int, low: bool, needs_rest: bool, limit: int) -> Plan:
    """Plan the backward's panel: its rows and columns in ``limit`` bytes.

    low: dX is summed in bf16 pairs, whose second half [rows, H] is workspace; it takes at most half. If the rows do not
    fit they go in groups, and what is not dX (``needs_rest``) is made in a second sweep over all rows.
    """
    a_row = 2 * width if low else 0
    rows = min(capacity, max(128, limit // 2 // a_row // 128 * 128)) if a_row else capacity
    # A panel's column: its dlogits, and the sums over tiles of 64 columns for the temperature's gradient.
    step, deepest = 256, max(rows, capacity if needs_rest else 0)
    columns = max(step, (limit - rows * a_row) // (deepest * itemsize + deepest // 16) // step * step)
    columns = min(columns, -(-vocabulary // step) * step)
    return Plan(rows, columns, rows * a_row + columns * (deepest * itemsize + deepest // 16))
