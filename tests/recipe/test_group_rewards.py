"""Rewards of a step's rollouts against the recipe's formulas computed item by item in fp64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.ops.reward import RewardWeights
from rime_fast.recipe.group_rewards import RewardBuffers, Rewarder, SideAnchors, negatives_mask

B, G, D, A = 4, 3, 16, 9
SIDES = ("query", "target")


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Step:
    """Both sides' rollouts, B items each, scored against banks of A anchors; two anchors of a bank are one item."""

    def __init__(self) -> None:
        n = len(SIDES) * B
        self.gen, self.disc = unit(n * G, D, seed=1), unit(n, D, seed=2)
        self.format_ok = torch.arange(n * G) % 5 != 0
        self.lengths = torch.arange(n * G) % 7 + 1
        self.banks = {name: unit(A, D, seed=3 + i) for i, name in enumerate(SIDES)}
        self.positive = torch.tensor([5, 0, 3, 8])
        ids = torch.stack([torch.arange(A), 100 + torch.arange(A)], dim=1)
        ids[2, 1] = ids[5, 1]  # another id, the same text
        self.ids = ids
        self.anchors = {
            name: SideAnchors(bank, self.positive, bank[self.positive], negatives_mask(ids[self.positive], ids))
            for name, bank in self.banks.items()
        }
        self.weights = RewardWeights(w_len=0.3, length_limit=2.0)

    def score(self, parts: tuple[int, ...] = (8,)) -> RewardBuffers:
        buffers = RewardBuffers.make(2 * B, G, torch.device("cpu"))
        rewarder, first = Rewarder(self.weights, SIDES, G), 0
        for count in parts:
            rows = slice(first * G, (first + count) * G)
            rewarder(
                buffers,
                self.anchors,
                self.gen[rows],
                self.disc[first : first + count],
                self.format_ok[rows],
                self.lengths[rows],
                first,
            )
            first += count
        return buffers

    def by_hand(self, prompt: int) -> tuple[list[float], list[int]]:
        """(rewards, ranks) of one prompt's group."""
        bank, item = self.banks[SIDES[prompt // B]].double(), prompt % B
        own = int(self.positive[item])
        others = [j for j in range(A) if j != own and not (own == 5 and j == 2)]
        rewards, ranks = [], []
        for row in range(prompt * G, (prompt + 1) * G):
            sims = bank @ self.gen[row].double()
            rank = 1 + sum(bool(sims[j] > sims[own]) for j in others)
            score = (float(sims[own]) - statistics.fmean(float(sims[j]) for j in others)) / math.log2(1 + rank)
            refine = float(sims[own] - bank[own] @ self.disc[prompt].double())
            over = max(0, int(self.lengths[row]) - 2) / 2.0
            rewards.append(float(self.format_ok[row]) + score + refine - 0.3 * over)
            ranks.append(rank)
        return rewards, ranks


def test_every_reward_and_advantage_by_hand() -> None:
    step = Step()
    found = step.score()
    for prompt in range(2 * B):
        rewards, ranks = step.by_hand(prompt)
        mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
        assert found.terms["rank"][prompt].tolist() == ranks
        for g in range(G):
            assert float(found.rewards[prompt, g]) == pytest.approx(rewards[g], abs=1e-6)
            want = (rewards[g] - mean) / (spread + 1e-4)
            assert float(found.advantages[prompt, g]) == pytest.approx(want, abs=2e-5)
    metrics = found.metrics()
    everyone = [step.by_hand(prompt) for prompt in range(2 * B)]
    total = statistics.fmean(r for rs, _ in everyone for r in rs)
    assert float(metrics["reward/total"]) == pytest.approx(total, abs=1e-6)
    assert float(metrics["reward/rank"]) == pytest.approx(statistics.fmean(k for _, ks in everyone for k in ks))
    spreads = [statistics.stdev(rewards) for rewards, _ in everyone]
    assert float(metrics["group_std"]) == pytest.approx(statistics.fmean(spreads), abs=1e-6)


@pytest.mark.parametrize("parts", [(1,) * 8, (3, 5), (6, 2)], ids=str)
def test_parts_of_a_step_write_their_own_rows(parts: tuple[int, ...]) -> None:
    whole, cut = Step().score(), Step().score(parts)
    torch.testing.assert_close(cut.rewards, whole.rewards, rtol=0, atol=1e-6)
    torch.testing.assert_close(cut.advantages, whole.advantages, rtol=0, atol=1e-5)
    for name, buffer in whole.terms.items():
        torch.testing.assert_close(cut.terms[name], buffer, rtol=0, atol=1e-6)


def test_missing_embeddings_are_counted_and_left_out_of_the_means() -> None:
    step = Step()
    ranks = torch.tensor([step.by_hand(prompt)[1] for prompt in range(2 * B)]).float()
    step.gen[0, 3] = torch.nan
    step.gen[4] = torch.inf
    step.disc[2, 0] = torch.nan  # the whole third prompt
    step.format_ok[:] = True
    found = step.score()
    gone = torch.zeros(2 * B, G, dtype=torch.bool)
    gone.view(-1)[[0, 4, 6, 7, 8]] = True
    assert torch.equal(found.terms["nan"] == 1, gone)
    assert bool(found.rewards.isfinite().all())
    assert bool(found.advantages.isfinite().all())
    assert not found.terms["format"][gone].any()
    metrics = found.metrics()
    assert float(metrics["reward/nan"]) == pytest.approx(5 / 24)
    assert float(metrics["reward/rank"]) == pytest.approx(float(ranks[~gone].mean()))
    assert float(metrics["reward/positive"]) == pytest.approx(float(found.terms["positive"][~gone].mean()))
    assert all(bool(value.isfinite()) for value in metrics.values())
    step.gen[:] = torch.nan
    assert float(step.score().metrics()["reward/rank"]) == 0.0


def test_equal_rewards_are_a_degenerate_group() -> None:
    step = Step()
    step.gen[3:6] = step.gen[3]
    step.format_ok[:] = True
    step.lengths[:] = 1
    found = step.score()
    assert found.degenerate().tolist() == [False, True] + [False] * 6
    assert found.advantages[1].abs().max() < 1e-2
    assert float(found.metrics()["degenerate_groups"]) == 1 / 8


def test_a_positive_outside_the_bank_is_named() -> None:
    step = Step()
    step.positive[1] = A
    step.anchors = {name: SideAnchors(bank, step.positive) for name, bank in step.banks.items()}
    with pytest.raises(ValueError, match="positive"):
        step.score()


def test_rows_that_fit_no_prompts_are_named() -> None:
    step = Step()
    step.gen = step.gen[:-1]
    with pytest.raises(ValueError, match="gen has 23 rows and disc 8; expected 3 and 1"):
        step.score()


def test_a_width_scores_what_was_cut_before():
    """Rewards of whole rows at a width are those of the rows' first columns, normalised."""
    step = Step()
    step.banks = {name: F.normalize(bank[:, :5], dim=1) for name, bank in step.banks.items()}
    step.anchors = {
        name: SideAnchors(bank, step.positive, bank[step.positive], step.anchors[name].mask)
        for name, bank in step.banks.items()
    }
    found = RewardBuffers.make(2 * B, G, torch.device("cpu"))
    whole = step.gen, step.disc
    Rewarder(step.weights, SIDES, G, 5)(found, step.anchors, *whole, step.format_ok, step.lengths)
    step.gen, step.disc = (F.normalize(rows[:, :5], dim=1) for rows in whole)
    assert torch.equal(found.rewards, step.score().rewards)
