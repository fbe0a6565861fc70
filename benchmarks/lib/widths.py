"""Matryoshka: six widths in one sweep of the contrast, beside the widest alone and what others do for the same loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.bench.contrastive import EXACT, TAU, TERMS, Shape, Sides, floor, make, ours, truth
from rime_fast.bench.harness import FLOOR, Results, Row, compare, dtype_name
from rime_fast.ops.contrastive import contrastive_loss


def measure_widths(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 5,
) -> dict[str, Row]:
    """Compare six widths, each half of the next, with ours of the widest alone, ours once a width, and
    sentence-transformers' MatryoshkaLoss over its cached loss; the floor is the widest's bare products."""
    sides, terms = make(shape, device, dtype), TERMS[:1]
    dims = [shape.width >> step for step in (5, 4, 3, 2, 1, 0) if shape.width >> step]
    impls: dict[str, Callable[[], Any]] = {
        FLOOR: floor(sides, terms),
        "ours": ours(sides, terms, dims=dims),
        "ours_widest": ours(sides, terms, dims=dims[-1:]),
        "a loss a width": cleared(sides, lambda: one_by_one(sides, dims)),
        "sentence-transformers": cleared(sides, lambda: sentence_transformers(sides, dims)),
    }
    wanted = None
    if shape.pairs**2 <= EXACT:
        wanted = dict.fromkeys(impls, truth(sides, terms, dims=dims)) | {
            "ours_widest": truth(sides, terms, dims=dims[-1:])
        }
    return compare(
        "contrastive_widths",
        str(shape),
        impls,
        device=device,
        rounds=rounds,
        results=results,
        shape={"pairs": shape.pairs, "width": shape.width, "dims": len(dims), "dtype": dtype_name(dtype)},
        truth=wanted,
        flops=6.0 * shape.pairs**2 * shape.width,
    )


def cleared(sides: Sides, backward: Callable[[], None]) -> Callable[[], Tensor]:
    """Make a step that begins without gradients and returns that of the queries."""
    q, k = sides[0]["disc"], sides[1]["disc"]

    def call() -> Tensor:
        q.grad = k.grad = None
        backward()
        assert q.grad is not None
        return q.grad

    return call


def one_by_one(sides: Sides, dims: list[int]) -> None:
    """Add up a loss of ours for each width, of rows cut and normalised again."""
    for width in dims:
        cut = [{"disc": F.normalize(side["disc"][:, :width], dim=1)} for side in sides]
        contrastive_loss(*cut, terms=TERMS[:1], temperature=TAU).loss.backward()


def sentence_transformers(sides: Sides, dims: list[int], rows: int = 512) -> None:
    """Run MatryoshkaLoss's wrapper around the cached loss, without the encoder."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
    from sentence_transformers.util import dot_score

    nothing: Any = torch.nn.Sequential(torch.nn.Identity())
    loss = CachedMultipleNegativesRankingLoss(
        nothing,
        1 / TAU,
        dot_score,
        rows,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    nothing.get_embedding_dimension = lambda: dims[-1]
    MatryoshkaLoss(nothing, loss, dims)  # wraps calculate_loss
    loss.calculate_loss([[sides[0]["disc"]], [sides[1]["disc"]]], with_backward=True)
