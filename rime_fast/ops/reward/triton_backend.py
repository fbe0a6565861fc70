"""The steps of score_rewrites_ around the Triton kernel, for a GPU without csrc's CUDA build; see compiled.py.

The products over the bank are cuBLAS's, the pass over each tile is Triton's; own similarities, the merge and the
rewards, which touch R rows and never the bank, are plain torch (reference.py) in fp64.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rime_fast.ops.reward import reference
from rime_fast.ops.reward.compiled import PLANES
from rime_fast.ops.reward.weights import NEGATIVES, RewardWeights

BLOCK, DEPTH = 256, 8


def why_not(gen: Tensor) -> str | None:
    """The reason Triton cannot serve a call on ``gen``, or None."""
    if gen.dtype == torch.float64:
        return "it works on fp32 products; float64 embeddings need backend='reference'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not gen.is_cuda and not (interpreted and gen.device.type == "cpu"):
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1 for the CPU), got {gen.device.type}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def own_similarities(rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Like compiled.own_similarities."""
    n_items, positives, width = own.shape
    grouped = rows.view(n_items, -1, width).double()
    found = grouped @ own.double().transpose(1, 2)
    return found.view(-1, positives), torch.linalg.vector_norm(rows, dim=1)


def scans(rows: Tensor) -> bool:
    """Like compiled.scans: there is no such kernel here."""
    return False


def add_tile(
    sims: Tensor,
    rows: Tensor,
    tile: Tensor,
    tile_norm: Tensor,
    norms: Tensor,
    own: Tensor,
    positive: Tensor,
    mask: Tensor | None,
    first: int,
    weights: RewardWeights,
    state: Tensor,
) -> None:
    """Like compiled.add_tile."""
    from rime_fast.ops.reward.triton_kernels import rank_tile_kernel

    n_rows, width = rows.shape
    exact = sims.dtype == torch.float64
    slack = 0.0 if exact else 1.01 * (width + 16) * 2.0**-24  # rank_reward.h, similarity_band
    rank_tile_kernel[(n_rows,)](
        sims,
        rows,
        tile,
        tile_norm,
        norms,
        own,
        positive,
        state if mask is None else mask.view(torch.uint8),
        state,
        sims.shape[1],
        width,
        n_rows // positive.shape[0],
        weights.positives,
        first,
        0 if mask is None else mask.stride(0),
        slack,
        1.0 / weights.softmax_temperature,
        NEGATIVE=weights.negative_code,
        MASKED=mask is not None,
        EXACT=exact,
        BLOCK=BLOCK,
        DEPTH=DEPTH,
        num_warps=4,
        enable_fp_fusion=True,
    )


def merge(parts: Tensor, state: Tensor, weights: RewardWeights) -> None:
    """Like compiled.merge; one step a rank."""
    kind = NEGATIVES[weights.negative_code]
    for part in parts:
        state[:, 0] += part[:, 0]
        state[:, 4:] += part[:, 4:]
        if kind == "mean":
            state[:, 1] += part[:, 1]
            continue
        peak = torch.maximum(state[:, 1], part[:, 1])
        if kind == "softmax":
            # A part that has met nothing has weight 0 at -inf; where both have, the factor may be anything finite.
            for side, into in ((state, 0.0), (part, 1.0)):
                scale = ((side[:, 1] - peak) / weights.softmax_temperature).nan_to_num(0.0, neginf=-torch.inf).exp()
                moved = scale[:, None] * side[:, 2:4]
                state[:, 2:4] = moved + into * state[:, 2:4]
        state[:, 1] = peak


def finish(
    state: Tensor,
    own: Tensor,
    format_ok: Tensor,
    lengths: Tensor | None,
    disc_similarity: Tensor | None,
    weights: RewardWeights,
) -> Tensor:
    """Like compiled.finish."""
    shape = format_ok.shape
    seen = state[:, 0] > 0
    kind = NEGATIVES[weights.negative_code]
    negative = {"mean": state[:, 1] / state[:, 0], "softmax": state[:, 3] / state[:, 2], "max": state[:, 1]}[kind]
    negative = torch.where(seen, negative, 0.0).view(shape)
    found = reference.Statistics(own.view(*shape, -1), 1 + state[:, 4:].reshape(*shape, -1), negative)
    result = reference.rewards(found, format_ok, lengths, disc_similarity, weights)
    return torch.stack([result[name] for name in PLANES]).float()
