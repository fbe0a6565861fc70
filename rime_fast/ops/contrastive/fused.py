"""What is O(N) of the contrast by csrc's CUDA kernels: some ten launches where the torch of softmax.py makes sixty.

They serve calls of one process whose queries have one positive each, known without a look at labels; the formulas, and
what all other calls run, are softmax.py's. On a GPU each launch costs the host 5 to 20 us, and at N 4,096 the products
of a term take 300.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.contrastive.softmax import Positives, Slopes, Solved, Statistics

BLOCK = 256  # queries or keys of a block whose sums meet (csrc/cuda/contrastive_kernels.cuh)
NARROW = (torch.bfloat16, torch.float16)


def serves(tensor: Tensor) -> bool:
    """Whether the kernels take such rows."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and native.available(cuda=True)


def begin(queries: list[Tensor], keys: list[Tensor], temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the temperature (NaN where it is not above 0), its reciprocal, and the flag that every logit is small."""
    norms = torch.zeros(2, dtype=torch.int32, device=temperature.device)
    for side, tensors in enumerate((queries, keys)):
        for rows in tensors:
            torch.ops.rime_fast_C.contrast_norm(rows, norms, side)
    positive, scale, flag = temperature.new_empty(()), temperature.new_empty(()), norms.new_empty(())
    torch.ops.rime_fast_C.contrast_begin(temperature, norms, positive, scale, flag)
    return positive, scale, flag


def solve(state: Statistics, positives: Positives, symmetric: bool) -> tuple[Tensor, Tensor, Solved]:
    """Compute the mean losses, hit@1 (both [L]) and ``Solved.of``."""
    losses, queries = state.row_max.shape
    keys = state.col_max.shape[1]
    rows, cols = state.row_sum.new_empty(losses, 3, queries), state.row_sum.new_empty(losses, 3, keys)
    parts = state.row_sum.new_empty(losses * 2 * -(-max(queries, keys) // BLOCK))
    loss, hit = state.row_max.new_empty(losses), state.row_max.new_empty(losses)
    torch.ops.rime_fast_C.contrast_solve(
        *(state.row_max, state.row_sum, state.col_max, state.col_sum, state.positive, state.rival),
        *(positives.first, symmetric, rows, cols, parts, loss, hit),
    )
    return loss, hit, Solved(rows, cols)


def slopes(
    solved: Solved,
    positives: Positives,
    grad: Tensor,
    temperature: Tensor,
    n_queries: int,
    symmetric: bool,
    narrow: bool,
) -> tuple[Slopes, Tensor | None]:
    """Compute ``Slopes.of`` for the gradient ``grad`` [L] to the losses, and with ``narrow`` the unit of 16-bit
    gradients (tiles.unit_of), which the factors are relative to."""
    (losses, _, queries), keys = solved.rows.shape, solved.cols.shape[2]
    row_shift, row_coef, slope = temperature.new_empty(3, losses, queries).unbind()
    col_shift, col_coef = temperature.new_empty(2, losses, keys).unbind()
    factor, unit = temperature.new_empty(losses), temperature.new_empty(()) if narrow else None
    torch.ops.rime_fast_C.contrast_slopes(
        *(solved.rows, solved.cols, positives.first, symmetric, grad.to(factor.dtype).contiguous(), temperature),
        *(n_queries, row_shift, row_coef, col_shift, col_coef, slope, factor, unit),
    )
    return Slopes(False, row_shift, row_coef, col_shift, col_coef, slope[:, :, None], factor), unit


def sized(gradient: Tensor, rows: Tensor, unit: Tensor | None, with_products: bool) -> tuple[Tensor, Tensor | None]:
    """Give a gradient [N, D] its size, in the dtype of the rows that it belongs to; with_products: also the sum of
    gradient x rows, before it is sized, 0-d fp64."""
    out = gradient if unit is None and gradient.dtype == rows.dtype else torch.empty_like(rows)
    if out is gradient and not with_products:
        return out, None
    products = rows.new_empty(len(rows), dtype=torch.float64) if with_products else None
    torch.ops.rime_fast_C.contrast_sized(gradient, rows, unit, out, products)
    return out, None if products is None else products.sum()
