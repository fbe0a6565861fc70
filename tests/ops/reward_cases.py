"""Inputs and calls shared by the tests of score_rewrites_."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.ops.reward import TERM_NAMES, RewardWeights, score_rewrites_

Case = dict[str, Any]


def make_case(
    n_items: int = 6,
    group_size: int = 4,
    width: int = 32,
    n_anchors: int = 400,
    *,
    positives: int = 1,
    spread: float = 0.3,
    ties: bool = False,
    masked: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Arguments of score_rewrites_: rollouts ``spread`` around their item, positives near the item.

    ties: a third of the bank repeats the items' own anchors, and D is cut to entries that multiply exactly.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    item = normal(n_items, 1, width)
    gen = F.normalize(item + spread * normal(n_items, group_size, width), dim=-1)
    anchors = F.normalize(normal(n_anchors, width), dim=-1)
    positive = torch.randint(0, n_anchors - positives + 1, (n_items,), generator=random)
    anchors[positive] = F.normalize(item[:, 0] + 0.5 * normal(n_items, width), dim=-1)
    if ties:
        gen, anchors = ((8 * x).round() / 8 for x in (gen, anchors))
        copies = torch.randint(0, n_anchors, (n_anchors // 3,), generator=random)
        anchors[copies] = anchors[positive[torch.randint(0, n_items, copies.shape, generator=random)]]
    return {
        "gen": gen.to(dtype),
        "anchors": anchors.to(dtype),
        "positive": positive,
        "format_ok": torch.rand(n_items, group_size, generator=random) < 0.8,
        "lengths": torch.randint(0, 300, (n_items, group_size), generator=random),
        "disc_similarity": torch.rand(n_items, generator=random),
        "negatives_mask": torch.rand(n_items, n_anchors, generator=random) < 0.9 if masked else None,
    }


def score(case: Case, weights: RewardWeights | None = None, **options: Any) -> dict[str, Tensor]:
    """Everything score_rewrites_ writes, by name; buffers start as NaN, so that nothing may stay unwritten."""
    shape = case["gen"].shape[:2]
    out = {
        name: torch.full(shape, torch.nan, device=case["gen"].device, dtype=torch.float32)
        for name in ("reward", "advantage", *TERM_NAMES)
    }
    score_rewrites_(
        out["reward"],
        out["advantage"],
        terms={name: out[name] for name in TERM_NAMES},
        weights=RewardWeights() if weights is None else weights,
        **case,
        **options,
    )
    return out


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Rank, hit, format, length and the count of missing ones exactly, everything else to ``tolerance``."""
    for name, expected in want.items():
        exact = name in ("rank", "hit", "format", "length", "nan")
        bound = 0.0 if exact else tolerance
        torch.testing.assert_close(
            got[name].cpu(), expected.cpu(), rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )
