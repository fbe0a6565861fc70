"""Operator C: rewards and advantages in place, against its bare similarity product, eager torch and a row loop.

The floor is the fp32 product rollouts x bank into a ready buffer. "ours_*" differ in the negatives' statistic and in
the bank's mask; "ume_r1 loop" is UME-R1's reward as its paper describes it, row by row with a top-k, written anew, and
"ours_ume_r1" the same reward here. Errors: largest difference of an advantage from the fp64 reference.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from torch import Tensor

from rime_fast.ops.reward import RewardWeights, score_rewrites_

GROUP = 8
# rows (items x GROUP), anchors, width
SHAPES = {
    "tiny": [(32, 32, 16)],
    "cpu": [(1024, 1024, 256), (64, 4096, 1536), (256, 16_384, 256), (256, 65_536, 256)],
    "cuda": [(1024, 1024, 256), (512, 65_536, 1536), (8192, 16_384, 2048), (512, 1_000_000, 1536)],
}
KINDS = {
    "ours_mean": RewardWeights(),
    "ours_softmax": RewardWeights(negative="softmax"),
    "ours_max": RewardWeights(negative="max"),
}
Inputs = dict[str, Tensor]


def make(rows: int, n_anchors: int, width: int, device: str) -> Inputs:
    """Groups of in-group cosine 0.95 near their positive (peaked data), the other anchors at random."""
    random = torch.Generator().manual_seed(0)
    n_items = rows // GROUP
    item = F.normalize(torch.randn(n_items, 1, width, generator=random), dim=-1)
    noise = F.normalize(torch.randn(n_items, GROUP, width, generator=random), dim=-1)
    anchors = F.normalize(torch.randn(n_anchors, width, generator=random), dim=-1)
    anchors[:n_items] = F.normalize(item[:, 0] + 0.8 * anchors[:n_items], dim=-1)
    return {
        "gen": F.normalize(item + 0.23 * noise, dim=-1).to(device),
        "anchors": anchors.to(device),
        "positive": torch.arange(n_items, device=device),
        "format_ok": torch.ones(n_items, GROUP, dtype=torch.bool, device=device),
    }


def others_generations(inputs: Inputs) -> Inputs:
    """UME-R1's bank: the other side's G generations of every item."""
    n_items, group, width = inputs["gen"].shape
    noise = F.normalize(torch.randn(n_items, group, width, generator=torch.Generator().manual_seed(1)), dim=-1)
    bank = F.normalize(inputs["gen"][:, :1] + 0.5 * noise.to(inputs["gen"]), dim=-1).view(-1, width)
    first = group * torch.arange(n_items, device=bank.device)
    return inputs | {"anchors": bank, "positive": first}


def ours(inputs: Inputs, weights: RewardWeights, mask: Tensor | None = None, **options: str) -> Callable[[], Tensor]:
    shape = inputs["format_ok"].shape
    rewards, advantages = (torch.empty(shape, device=inputs["gen"].device) for _ in range(2))

    def call() -> Tensor:
        score_rewrites_(rewards, advantages, weights=weights, negatives_mask=mask, **inputs, **options)
        return advantages

    return call


def eager(inputs: Inputs) -> Callable[[], Tensor]:
    """The default reward as vectorised torch over the whole [B, G, A] matrix."""

    def call() -> Tensor:
        gen, anchors, positive = inputs["gen"], inputs["anchors"], inputs["positive"]
        sims = gen @ anchors.T
        column = positive[:, None, None].expand(-1, gen.shape[1], 1)
        own = sims.gather(2, column)
        negative = torch.ones_like(sims, dtype=torch.bool).scatter_(2, column, False)
        rank = 1 + ((sims > own) & negative).sum(2) + 0.5 * ((sims == own) & negative).sum(2)
        mean = (sims * negative).sum(2) / (sims.shape[2] - 1)
        reward = inputs["format_ok"] + (own[..., 0] - mean) / torch.log2(1 + rank)
        return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)

    return call


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


def floor(inputs: Inputs) -> Callable[[], Tensor]:
    rows, bank = inputs["gen"].flatten(0, 1), inputs["anchors"]
    out = torch.empty(rows.shape[0], bank.shape[0], device=rows.device)
    return lambda: torch.mm(rows, bank.T, out=out)


def shapes(config: pytest.Config) -> list[tuple[int, int, int]]:
    return SHAPES["tiny" if config.getoption("--rime-tiny") else config.getoption("--rime-device")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", shapes(metafunc.config), ids=lambda s: "x".join(map(str, s)))


def test_reward(shape: tuple[int, int, int], results, device: str, tiny: bool) -> None:
    rows, n_anchors, width = shape
    inputs = make(rows, n_anchors, width, device)
    impls = {"floor": floor(inputs), **{name: ours(inputs, weights) for name, weights in KINDS.items()}}
    mask = torch.ones(rows // GROUP, n_anchors, dtype=torch.bool, device=device)
    impls["ours_masked"] = ours(inputs, RewardWeights(), mask)
    impls["eager"] = eager(inputs)
    truth = {"eager": "ours_mean", "ours_masked": "ours_mean"}
    exact = rows * n_anchors <= 1 << 24  # the fp64 reference makes the whole matrix
    errors = {}
    for name in impls if exact else ():
        if name == "floor":
            continue
        wanted = ours(inputs, KINDS[truth.get(name, name)], backend="reference")()
        errors[name] = float((impls[name]().double() - wanted.double()).abs().max())
        assert errors[name] < (1e-6 if name.startswith("ours") else 1e-2)
    found = compare(
        "reward", "x".join(map(str, shape)), impls, device=device, results=results, rounds=1 if tiny else 9,
        shape={"rows": rows, "group": GROUP, "anchors": n_anchors, "width": width},
        flops=2.0 * rows * n_anchors * width, nbytes=4.0 * (rows + n_anchors) * width, errors=errors,
    )  # fmt: skip
    assert found["ours_mean"].peak_mib is not None


def test_ume_r1(shape: tuple[int, int, int], results, device: str, tiny: bool) -> None:
    rows, n_anchors, width = shape
    if rows != n_anchors:
        pytest.skip("its bank is the other side's rollouts, as many as rows")
    inputs = others_generations(make(rows, n_anchors, width, device))
    weights = RewardWeights.ume_r1(GROUP)
    impls = {"floor": floor(inputs), "ours_ume_r1": ours(inputs, weights), "ume_r1 loop": ume_loop(inputs)}
    wanted = ours(inputs, weights, backend="reference")().double().cpu()
    errors = {name: float((impls[name]().double().cpu() - wanted).abs().max()) for name in list(impls)[1:]}
    assert errors["ours_ume_r1"] < 1e-6
    assert errors["ume_r1 loop"] < 1e-2  # the same reward, in fp32
    compare(
        "reward_ume_r1", "x".join(map(str, shape)), impls, device=device, results=results, rounds=1 if tiny else 5,
        shape={"rows": rows, "group": GROUP, "anchors": n_anchors, "width": width},
        flops=2.0 * rows * n_anchors * width, errors=errors,
    )  # fmt: skip
