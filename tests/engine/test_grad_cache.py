"""The gradient cache for any encoder: the same gradients as one whole graph, dropout replayed to the bit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rime_fast.engine.grad_cache import Encoded, GradCache, RngState
from rime_fast.engine.wrappers import GradSync
from rime_fast.ops.contrastive import contrastive_loss

# what Tower keeps for its backward, a row, in fp64
GRAPH_BYTES = 1944
TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]


class Tower(nn.Module):
    """Two read-outs and a loss of its own, with dropout."""

    def __init__(self, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 32), nn.Tanh())
        self.disc, self.gen, self.words = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 7)
        self.to(dtype)

    def forward(self, x: Tensor, scored: bool = True) -> Encoded:
        hidden = self.body(x)
        unit = nn.functional.normalize
        rows = {"disc": unit(self.disc(hidden), dim=-1), "gen": unit(self.gen(hidden), dim=-1)}
        loss = self.words(hidden).log_softmax(-1)[:, 0].neg().sum() if scored else None
        return Encoded(rows, loss, {} if loss is None else {"ce": loss.detach()})


def contrast(rows: dict[str, Tensor], tau: Tensor | float = 0.1) -> Tensor:
    n = rows["disc"].shape[0] // 2
    queries, keys = ({m: x[part] for m, x in rows.items()} for part in (slice(n), slice(n, None)))
    return contrastive_loss(queries, keys, terms=TERMS, temperature=tau, backend="reference").loss


def whole_graph(model: Tower, parts: list[Tensor], tau: Tensor | float = 0.1) -> Tensor:
    """All micro-batches in one graph, drawing the random numbers in the same order."""
    outs = [model(x) for x in parts]
    rows = {name: torch.cat([out.embeddings[name] for out in outs]) for name in outs[0].embeddings}
    return contrast(rows, tau) + sum(out.loss for out in outs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def worst(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert ours.keys() == truth.keys()
    return max(float((ours[k] - truth[k]).norm() / truth[k].norm()) for k in truth)


@pytest.mark.parametrize("keep", [0, 1, math.inf], ids=["none", "some", "all"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_gradients_equal_one_graph_with_dropout(dtype, bound, keep):
    model, x = Tower(0.3, dtype), torch.randn(48, 12, dtype=dtype)
    parts = list(x.split([7, 20, 1, 12, 8]))
    # "some": room for 20 of the 40 rows that are not in the last micro-batch: those with 12 and 1
    row = GRAPH_BYTES * torch.finfo(dtype).bits // 64
    cache = GradCache(model, contrast, sync=GradSync(model), keep_bytes=20 * row * keep if keep else 0, cost=len)
    kept = set()
    for turn in range(3):  # the first step measures a graph, later ones use the budget
        torch.manual_seed(turn)
        truth_loss = whole_graph(model, parts)
        truth_loss.backward()
        drawn = torch.rand(1)
        truth = gradients(model)
        torch.manual_seed(turn)
        step = cache.step(parts)
        assert torch.equal(torch.rand(1), drawn)  # the replay leaves the generator where one run leaves it
        assert worst(gradients(model), truth) <= bound
        assert torch.allclose(step.loss, truth_loss.detach(), rtol=1e-6)
        assert step.encoded == 2 * len(parts) - step.kept
        kept.add(step.kept)
    assert kept == {0: {1}, 1: {1, 3}, math.inf: {5}}[keep]


def test_replayed_dropout_is_bitwise_the_same():
    layer, x = nn.Dropout(0.5), torch.randn(1000)
    state = RngState()
    first, after = layer(x), torch.rand(3)
    with state.replayed():
        assert torch.equal(layer(x), first)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), first)
    with state.replayed():
        layer(x)
        assert torch.equal(torch.rand(3), after)


def test_embeddings_of_both_passes_are_the_same_bits():
    model, seen = Tower(0.4, torch.float32), []

    def encode(x: Tensor, scored: bool) -> Encoded:
        out = model(x, scored)
        seen.append((len(x), scored, out.embeddings["gen"].detach().clone()))
        return out

    GradCache(encode, contrast).step(list(torch.randn(30, 12).split([9, 11, 10])))
    assert [(n, scored) for n, scored, _ in seen] == [(9, False), (11, False), (10, True), (11, True), (9, True)]
    for first, again in ((0, 4), (1, 3)):
        assert torch.equal(seen[first][2], seen[again][2])


def test_accumulation_and_a_learnable_temperature():
    model, data = Tower(0.0, torch.float64), torch.randn(2, 24, 12, dtype=torch.float64)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    (sum(whole_graph(model, [x], tau) for x in data) / 2).backward()
    truth, truth_tau = gradients(model), tau.grad.clone()
    tau.grad = None
    cache = GradCache(model)
    for x in data:
        cache.step(x.split(5), loss=lambda rows: contrast(rows, tau), scale=0.5)
    assert worst(gradients(model), truth) < 1e-10
    assert torch.allclose(tau.grad, truth_tau, rtol=1e-10)


def test_checkpointed_layers_with_dropout():
    from torch.utils.checkpoint import checkpoint

    model, x = Tower(0.3, torch.float64), torch.randn(20, 12, dtype=torch.float64)
    plain = model.body

    class Body(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(plain, x, use_reentrant=False)

    parts = list(x.split(6))
    torch.manual_seed(3)
    whole_graph(model, parts).backward()
    truth = gradients(model)
    model.body = Body()
    model.body.add_module("inner", plain)
    torch.manual_seed(3)
    GradCache(model, contrast, keep_bytes=0).step(parts)
    ours = {name.replace("body.inner", "body"): g for name, g in gradients(model).items()}
    assert worst(ours, truth) < 1e-10


def test_autocast_weights_cast_in_the_first_pass_do_not_lose_the_gradient():
    model, x = Tower(0.0, torch.float32), torch.randn(24, 12)
    with torch.autocast("cpu", torch.bfloat16):
        whole_graph(model, list(x.split(6))).backward()
    truth = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        GradCache(model, contrast).step(x.split(6))
    assert worst(gradients(model), truth) < 2e-2


def test_frozen_micro_batches_and_encoders_without_loss():
    model, x = Tower(0.0, torch.float64), torch.randn(16, 12, dtype=torch.float64)

    def encode(x: Tensor, scored: bool) -> Encoded:
        return Encoded(model(x, False).embeddings)

    rows = encode(x, True).embeddings
    contrast(rows).backward()
    truth = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    GradCache(encode, contrast).step(x.split(4))
    assert worst({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, truth) < 1e-10
    assert model.words.weight.grad is None


def test_errors_name_the_argument():
    model = Tower(0.0, torch.float32)
    with pytest.raises(ValueError, match="keep_bytes is -1"):
        GradCache(model, contrast, keep_bytes=-1)
    with pytest.raises(ValueError, match="micro_batches is empty"):
        GradCache(model, contrast).step([])
    with pytest.raises(ValueError, match="loss is None"):
        GradCache(model).step([torch.randn(4, 12)])
    with pytest.raises(ValueError, match=r"shape \[4, 16\]; expected a scalar"):
        GradCache(model, lambda rows: rows["disc"]).step([torch.randn(4, 12)])


def test_the_documentation_s_example_runs_as_written():
    text = (Path(__file__).parents[2] / "docs" / "grad_cache.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/grad_cache.md", "exec"), names)
    assert names["step"].kept == 1
    assert names["step"].encoded == 7
    torch.manual_seed(0)
    names["model"].eval().zero_grad()
    names["cache"].step(names["micro_batches"])
    cached = gradients(names["model"])
    rows = [names["encode"](micro_batch, True).embeddings for micro_batch in names["micro_batches"]]
    names["contrast"]({key: torch.cat([one[key] for one in rows]) for key in rows[0]}).backward()
    assert worst(cached, gradients(names["model"])) < 1e-5
