"""Distillation against its formula query by query in fp64; two ranks against one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rime_fast.recipe import distill
from rime_fast.recipe.distill import bank_distillation, score_distillation
from tests.ranks import run_ranks

NAN = float("nan")


def unit(rows: int, size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rows_ = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows_, dim=1).to(dtype).requires_grad_()


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")


def by_hand(q: Tensor, k: Tensor, scores: Tensor, owners: Tensor, tau: float, tau_t: float) -> Tensor:
    terms = []
    for i in range(len(q)):
        mine = torch.tensor([i, *(len(q) + j for j, owner in enumerate(owners.tolist()) if owner == i)])
        if not bool(scores[mine].isnan().any()):
            terms.append(kl(scores[mine] / tau_t, k[mine] @ q[i] / tau))
    return torch.stack(terms).mean()


def test_scores_by_hand():
    q, k, owners = unit(5, 8, 0), unit(12, 8, 1), torch.tensor([0, 0, 1, 3, 3, 3, 4])
    scores = torch.randn(12, generator=torch.Generator().manual_seed(2)).double() * 3
    scores[[1, 7]] = NAN  # query 1 has no scores; query 2 no hard negative
    got = score_distillation(q, k, scores, owners, temperature=0.05, teacher_temperature=2.0)
    want = by_hand(q, k, scores, owners, 0.05, 2.0)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    for mine, theirs in zip(torch.autograd.grad(got, (q, k)), torch.autograd.grad(want, (q, k)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    agreeing = score_distillation(
        q, k, (q[torch.cat([torch.arange(5), owners])] * k).sum(1) / 0.05, owners, temperature=0.05
    )
    assert abs(agreeing.item()) < 1e-9
    assert score_distillation(q, k, torch.full((12,), NAN), owners, temperature=0.05) == 0
    assert score_distillation(q, k[:5], scores[:5], None, temperature=0.05) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_obey_the_rule(dtype: torch.dtype):
    owners, scores = torch.arange(3).repeat_interleave(7), torch.randn(24, generator=torch.Generator().manual_seed(3))
    q, k = unit(3, 64, 0, dtype), unit(24, 64, 1, dtype)
    found = score_distillation(q, k, scores, owners, temperature=0.02)
    exact = score_distillation(q.double(), k.double(), scores.double(), owners, temperature=0.02)
    assert found.dtype == torch.float32
    assert abs(found.double() - exact) <= (1e-5 if dtype == torch.float32 else 2e-2) * abs(exact)


def test_a_bank_by_hand(monkeypatch: pytest.MonkeyPatch):
    q, k, tq, tk = unit(9, 8, 0), unit(9, 8, 1), unit(9, 24, 2), unit(9, 24, 3)
    want = kl(tq @ tk.T / 0.1, q @ k.T / 0.05) / 9
    for rows in (4, 1024):
        monkeypatch.setattr(distill, "ROWS", rows)
        got = bank_distillation(q, k, tq, tk, temperature=0.05, teacher_temperature=0.1)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
        for mine, theirs in zip(
            torch.autograd.grad(got, (q, k)), torch.autograd.grad(want, (q, k), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert abs(bank_distillation(q, k, q, k, temperature=0.1, teacher_temperature=0.1).item()) < 1e-9


def two_ranks(rank: int, _: int) -> None:
    q, k, owners = unit(5, 8, 0), unit(9, 8, 1), torch.tensor([0, 1, 3, 4])
    scores = torch.randn(9, generator=torch.Generator().manual_seed(2)).double()
    scores[[1, 6]] = NAN
    whole = score_distillation(q, k, scores, owners, temperature=0.05)
    own = (torch.tensor([0, 1, 5, 6]), torch.tensor([2, 3, 4, 7, 8]))[rank]
    pairs = own[own < 5]
    mine = owners[own[own >= 5] - 5] - pairs[0]
    got = score_distillation(q[pairs], k[own], scores[own], mine, temperature=0.05, group=dist.group.WORLD)
    mean = got.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, whole, rtol=1e-6, atol=0)
    gradient = torch.autograd.grad(got, q)[0]
    dist.all_reduce(gradient)
    torch.testing.assert_close(gradient / 2, torch.autograd.grad(whole, q)[0], rtol=1e-5, atol=1e-8)


def test_two_ranks_are_one():
    run_ranks(two_ranks, 2)
