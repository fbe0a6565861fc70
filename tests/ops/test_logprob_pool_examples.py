"""The examples of docs/logprob_pool.md run and give what plain torch gives: soft cap, mean pooling, a split head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.ops.logprob_cases import relative
from tests.ranks import run_ranks

TEXT = (Path(__file__).parents[2] / "docs" / "logprob_pool.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT.split("## Examples")[1].split("\n## ")[0], re.S)


def run(index: int) -> dict[str, Any]:
    space: dict[str, Any] = {}
    exec(EXAMPLES[index], space)
    return space


def test_soft_cap() -> None:
    space = run(0)
    x, w = (space[name].detach().double().requires_grad_() for name in ("hidden", "head"))
    truth = F.cross_entropy(30 * torch.tanh(x @ w.t() / 30), space["targets"], reduction="sum")
    truth.backward()
    assert relative(space["loss"].detach(), truth.detach()) < 1e-6
    assert relative(space["hidden"].grad, x.grad) < 1e-5
    assert relative(space["head"].grad, w.grad) < 1e-5


def test_mean_pooling() -> None:
    space = run(1)
    means = [F.normalize(part.mean(0), dim=0) for part in space["hidden"].detach().split([20, 30, 14])]
    torch.testing.assert_close(space["out"].embeddings["mean"], torch.stack(means))
    assert space["similarity"].shape == (3, 3)


def _split_head(rank: int, world: int) -> None:
    space = run(2)
    torch.manual_seed(0)
    hidden, targets = torch.randn(64, 32, requires_grad=True), torch.randint(0, 1000, (64,))
    head = torch.randn(1000, 32, requires_grad=True)
    loss = F.cross_entropy(hidden @ head.t(), targets, reduction="sum")
    loss.backward()
    assert relative(space["loss"].detach(), loss.detach()) < 1e-5
    assert relative(space["hidden"].grad, hidden.grad) < 1e-5
    assert relative(space["part"].grad, head.grad.chunk(world)[rank]) < 1e-5


@pytest.mark.dist
def test_split_head() -> None:
    run_ranks(_split_head, 2)
