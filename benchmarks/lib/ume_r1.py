"""UME-R1's reward, row by row with a top-k as its paper describes it (written anew), and the same reward here."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.bench.harness import FLOOR, Results, Row
from rime_fast.bench.reward import Inputs, Shape, compare_rewards, floor, make, ours
from rime_fast.ops.reward import RewardWeights


def others_generations(inputs: Inputs) -> Inputs:
    """UME-R1's bank: the other side's G generations of every item."""
    n_items, group, width = inputs["gen"].shape
    noise = F.normalize(torch.randn(n_items, group, width, generator=torch.Generator().manual_seed(1)), dim=-1)
    bank = F.normalize(inputs["gen"][:, :1] + 0.5 * noise.to(inputs["gen"]), dim=-1).view(-1, width)
    first = group * torch.arange(n_items, device=bank.device)
    return inputs | {"anchors": bank, "positive": first}


def ume_loop(inputs: Inputs) -> Callable[[], Tensor]:
    """For every rollout: its similarities, the top G of them, how many are its own group's, the two means."""

    def call() -> Tensor:
        n_items, group, width = inputs["gen"].shape
        rows, bank = inputs["gen"].reshape(-1, width), inputs["anchors"]
        rewards = []
        for i, row in enumerate(rows):
            first = i // group * group
            sims = bank @ row
            own = set(range(first, first + group))
            hits = len(own.intersection(sims.topk(group).indices.tolist()))
            positive = sims[first : first + group].mean().item()
            negative = torch.cat([sims[:first], sims[first + group :]]).mean().item()
            rewards.append(1.0 + hits / group * (positive - negative))
        reward = torch.tensor(rewards).view(n_items, group)
        return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)

    return call


def measure_ume_r1(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 5,
) -> dict[str, Row]:
    """UME-R1's reward, whose bank is as long as the batch (``anchors`` must equal items * group)."""
    inputs = others_generations(make(shape, device, dtype))
    weights = RewardWeights.ume_r1(shape.group)
    impls = {FLOOR: floor(inputs), "ours_ume_r1": ours(inputs, weights), "ume_r1 loop": ume_loop(inputs)}
    wanted = ours(inputs, weights, backend="reference")()
    return compare_rewards("reward_ume_r1", shape, dtype, impls, dict.fromkeys(impls, wanted), device, results, rounds)
