"""Rewards and advantages in place, against the bare similarity product and eager torch.

The floor is the product rollouts x bank with an fp32 result, into a ready buffer. "ours_*" differ in the negatives'
statistic and in the bank's mask. Errors: largest difference of an advantage from the fp64 reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.bench.harness import FLOOR, Results, Row, compare, dtype_name, fast_fp64, library_product, max_error
from rime_fast.ops.reward import RewardWeights, score_rewrites_
from rime_fast.ops.reward.stream import norm_bound

# similarities up to which fp64 is run for the errors (its reference makes the whole matrix); GPUs with fast fp64
EXACT, EXACT_FAST = 1 << 24, 1 << 27


@dataclass(frozen=True)
class Shape:
    """One batch of rollouts and one anchor bank."""

    items: int = field(default=64, metadata={"help": "Items (prompts) of the batch."})
    group: int = field(default=8, metadata={"help": "Rollouts of each item."})
    anchors: int = field(default=65_536, metadata={"help": "Anchors in the bank."})
    width: int = field(default=1536, metadata={"help": "Width of the embeddings."})

    def __post_init__(self) -> None:
        if min(self.items, self.width) < 1 or self.group < 2 or self.anchors < self.items:
            raise ValueError("expected --items, --width >= 1, --group >= 2 and --anchors >= --items")

    @property
    def rows(self) -> int:
        return self.items * self.group

    def __str__(self) -> str:
        return f"{self.rows}x{self.anchors}x{self.width}" + ("" if self.group == 8 else f"-G{self.group}")


KINDS = {
    "ours_mean": RewardWeights(),
    "ours_softmax": RewardWeights(negative="softmax"),
    "ours_max": RewardWeights(negative="max"),
}
Inputs = dict[str, Tensor]


def make(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """Make the inputs: groups of in-group cosine 0.95 near their positive (peaked data), the other
    anchors at random."""
    random = torch.Generator(device).manual_seed(0)

    def unit(*size: int) -> Tensor:
        return F.normalize(torch.randn(*size, shape.width, generator=random, device=device), dim=-1)

    item, noise, anchors = unit(shape.items, 1), unit(shape.items, shape.group), unit(shape.anchors)
    anchors[: shape.items] = F.normalize(item[:, 0] + 0.8 * anchors[: shape.items], dim=-1)
    return {
        "gen": F.normalize(item + 0.23 * noise, dim=-1).to(dtype),
        "anchors": anchors.to(dtype),
        "positive": torch.arange(shape.items, device=device),
        "format_ok": torch.ones(shape.items, shape.group, dtype=torch.bool, device=device),
    }


def floor(inputs: Inputs) -> Callable[[], Tensor]:
    """Make the floor of the comparison: the similarities alone, in fp32 (on a GPU from operands of their own dtype)."""
    rows, bank = inputs["gen"].flatten(0, 1), inputs["anchors"]
    out = torch.empty(rows.shape[0], bank.shape[0], device=rows.device)
    if rows.is_cuda and rows.dtype != torch.float32:
        return lambda: torch.mm(rows, bank.T, out_dtype=torch.float32, out=out)
    rows, bank = rows.float(), bank.float()
    return lambda: library_product(rows, bank.T, out)


def ours(inputs: Inputs, weights: RewardWeights, mask: Tensor | None = None, **options: Any) -> Callable[[], Tensor]:
    """Make a call of score_rewrites_ with ``options``, which returns the advantages."""
    shape = inputs["format_ok"].shape
    rewards, advantages = (torch.empty(shape, device=inputs["gen"].device) for _ in range(2))
    given: dict[str, Any] = {"weights": weights, "negatives_mask": mask, **inputs, **options}

    def call() -> Tensor:
        score_rewrites_(rewards, advantages, **given)
        return advantages

    return call


def eager(inputs: Inputs) -> Callable[[], Tensor]:
    """The default reward as vectorised torch over the whole [B, G, A] matrix."""

    def call() -> Tensor:
        gen, anchors, positive = inputs["gen"].float(), inputs["anchors"].float(), inputs["positive"]
        sims = gen @ anchors.T
        column = positive[:, None, None].expand(-1, gen.shape[1], 1)
        own = sims.gather(2, column)
        negative = torch.ones_like(sims, dtype=torch.bool).scatter_(2, column, False)
        rank = 1 + ((sims > own) & negative).sum(2) + 0.5 * ((sims == own) & negative).sum(2)
        mean = (sims * negative).sum(2) / (sims.shape[2] - 1)
        reward = inputs["format_ok"] + (own[..., 0] - mean) / torch.log2(1 + rank)
        return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)

    return call


# --- the measurement -------------------------------------------------------------------------------------------------


def measure(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 9,
) -> dict[str, Row]:
    """Rows of the floor, ours and the eager form."""
    inputs = make(shape, device, dtype)
    known = {"largest_norm": norm_bound(inputs["anchors"])}  # as the trainer's bank keeps it
    impls = {FLOOR: floor(inputs), **{name: ours(inputs, weights, **known) for name, weights in KINDS.items()}}
    mask = torch.ones(shape.items, shape.anchors, dtype=torch.bool, device=device)
    impls["ours_masked"] = ours(inputs, RewardWeights(), mask, **known)
    impls["eager"] = eager(inputs)
    truth = {}
    if shape.rows * shape.anchors <= (EXACT_FAST if fast_fp64(device) else EXACT):
        exact = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
        truth = {name: ours(exact, weights, backend="reference")() for name, weights in KINDS.items()}
        truth |= {"ours_masked": truth["ours_mean"], "eager": truth["ours_mean"]}
    return compare_rewards("reward", shape, dtype, impls, truth, device, results, rounds)


def compare_rewards(
    bench: str,
    shape: Shape,
    dtype: torch.dtype,
    impls: dict[str, Callable[[], Tensor]],
    truth: dict[str, Tensor],
    device: str,
    results: Results | None,
    rounds: int,
) -> dict[str, Row]:
    """Run ``harness.compare`` with the facts of a reward's shape."""
    sizes = {"rows": shape.rows, "group": shape.group, "anchors": shape.anchors, "width": shape.width}
    return compare(
        bench,
        str(shape) if dtype == torch.float32 else f"{shape}-{dtype_name(dtype)}",
        impls,
        shape=sizes | {"dtype": dtype_name(dtype)},
        device=device,
        rounds=rounds,
        results=results,
        truth=truth,
        error=max_error,
        flops=2.0 * shape.rows * shape.anchors * shape.width,
        nbytes=float(dtype.itemsize) * (shape.rows + shape.anchors) * shape.width,
    )
