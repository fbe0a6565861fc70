"""The reward's steps around the Triton kernel, for a GPU without csrc's CUDA build; meanings in cpu.py.

The products over the bank are cuBLAS's, the pass over each tile is Triton's; own similarities, the merge and the
rewards, which touch R rows and never the bank, are plain torch (reference.py) in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops import dispatch
from rime_fast.ops.reward import reference
from rime_fast.ops.reward.weights import NEGATIVES, PLANES, RewardWeights

BLOCK, DEPTH = 256, 8


def why_not(gen: Tensor) -> str | None:
    """The reason Triton cannot serve a call on ``gen``, or None."""
    if gen.dtype == torch.float64:
        return "it works on fp32 products; float64 embeddings need backend='reference'"
    return dispatch.triton_why_not(gen)


class Engine:
    """Runs Triton's pass over each tile, and the rest in torch."""

    ALIGN = 1

    def reads(self, rows: Tensor, anchors: Tensor) -> bool:
        """Rows are fp32 here."""
        return False

    def own_similarities(self, rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Do what cpu.Compiled.own_similarities does."""
        n_items, positives, width = own.shape
        grouped = rows.view(n_items, -1, width).double()
        found = grouped @ own.double().transpose(1, 2)
        return found.view(-1, positives), torch.linalg.vector_norm(rows, dim=1)

    def add_tile(
        self,
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
        slack: float,
        state: Tensor,
    ) -> None:
        """Do what cpu.Compiled.add_tile does."""
        from rime_fast.ops.reward.triton_kernels import rank_tile_kernel

        n_rows, width = rows.shape
        exact = sims.dtype == torch.float64
        band = 0.0 if exact else slack * 1.01 * (width + 16) * 2.0**-24  # csrc/rime/reward.h, similarity_band
        with dispatch.on_device_of(sims):  # Triton launches on the current device
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
                band,
                1.0 / weights.tau,
                NEGATIVE=weights.negative_code,
                MASKED=mask is not None,
                EXACT=exact,
                BLOCK=BLOCK,
                DEPTH=DEPTH,
                num_warps=4,
                enable_fp_fusion=True,
            )

    def merge(self, parts: Tensor, state: Tensor, weights: RewardWeights) -> None:
        """Do what cpu.Compiled.merge does; one step a rank."""
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
                    scale = ((side[:, 1] - peak) / weights.tau).nan_to_num(0.0, neginf=-torch.inf).exp()
                    moved = scale[:, None] * side[:, 2:4]
                    state[:, 2:4] = moved + into * state[:, 2:4]
            state[:, 1] = peak

    def finish(
        self,
        state: Tensor,
        own: Tensor,
        format_ok: Tensor,
        lengths: Tensor | None,
        disc_similarity: Tensor | None,
        weights: RewardWeights,
        rewards: Tensor,
        advantages: Tensor,
    ) -> Tensor:
        """Do what cpu.Compiled.finish does."""
        shape = format_ok.shape
        seen = state[:, 0] > 0
        kind = NEGATIVES[weights.negative_code]
        negative = {"mean": state[:, 1] / state[:, 0], "softmax": state[:, 3] / state[:, 2], "max": state[:, 1]}[kind]
        negative = torch.where(seen, negative, 0.0).view(shape)
        found = reference.Statistics(own.view(*shape, -1), 1 + state[:, 4:].reshape(*shape, -1), negative)
        result = reference.rewards(found, format_ok, lengths, disc_similarity, weights)
        planes = torch.stack([result[name] for name in PLANES]).float()
        rewards.copy_(planes[0])
        advantages.copy_(planes[1])
        return planes
