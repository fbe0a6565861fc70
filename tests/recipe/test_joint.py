"""The joint loss against recipe.md 3 written out with full matrices; then two ranks against one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rime_fast.recipe.joint import JointLoss, JointWeights, joint_loss, scored_tokens, side_cross_entropy, token_weights
from tests.ranks import run_ranks

MODES = ("disc", "gen")


def contrast(a: Tensor, b: Tensor, tau: float | Tensor, symmetric: bool = True, drop: Tensor | None = None) -> Tensor:
    """C(a, b) with the whole similarity matrix. drop [n, k]: candidates left out."""
    s = a @ b.T / tau
    if drop is not None:
        s = s.masked_fill(drop, -torch.inf)
    own = torch.arange(len(a))
    rows = F.cross_entropy(s, own)
    return (rows + F.cross_entropy(s[:, : len(a)].T, own)) / 2 if symmetric else rows


def sides(n: int, h: int = 0, d: int = 16, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, generator=g, dtype=torch.float64), dim=1).requires_grad_()

    return {m: unit(n) for m in MODES}, {m: unit(n + h) for m in MODES}


def rime(
    q: dict[str, Tensor],
    k: dict[str, Tensor],
    w: JointWeights,
    tau: float | Tensor,
    symmetric: bool = True,
    drop: Tensor | None = None,
    detach: bool = False,
) -> Tensor:
    """The contrastive part of recipe.md 3, term by term."""
    fix = (lambda t: t.detach()) if detach else (lambda t: t)
    n = len(q["gen"])
    same_q = None if drop is None else torch.zeros(n, n, dtype=torch.bool)
    return (
        w.disc * contrast(q["disc"], k["disc"], tau, symmetric, drop)
        + w.gen * contrast(q["gen"], k["gen"], tau, symmetric, drop)
        + w.cross / 2 * contrast(q["gen"], fix(k["disc"]), tau, symmetric, drop)
        + w.cross / 2 * contrast(fix(q["disc"]), k["gen"], tau, symmetric, drop)
        + w.same_item / 2 * contrast(q["gen"], q["disc"], tau, symmetric, same_q)
        + w.same_item / 2 * contrast(k["gen"], k["disc"], tau, symmetric)
    )


def gradients(loss: Tensor, *groups: dict[str, Tensor]) -> list[Tensor]:
    leaves = [side[m] for side in groups for m in MODES]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def check(got: Tensor, want: Tensor, *groups: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(got, *groups), gradients(want, *groups), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


ZERO = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(
    "weights",
    [
        JointWeights(),
        JointWeights(cross=0),
        JointWeights(disc=0.3, gen=0.7, cross=1.9, same_item=0.6),
        JointWeights(disc=0, gen=0, cross=0, same_item=1),
    ],
)
@pytest.mark.parametrize(("symmetric", "hard"), [(True, 0), (False, 0), (True, 3), (False, 3)])
def test_terms_are_the_recipe(weights: JointWeights, symmetric: bool, hard: int):
    q, k = sides(7, hard)
    got = joint_loss(ZERO, q, k, weights=weights, temperature=0.05, symmetric=symmetric)
    check(got.total, rime(q, k, weights, 0.05, symmetric), q, k)
    assert {"disc-disc", "gen-gen", "gen-disc", "disc-gen", "same-query", "same-target"} >= set(got.terms)
    assert ("gen-disc" in got.terms) == (weights.cross > 0)
    assert set(got.terms) == set(got.accuracy)


def test_stop_gradient_keeps_d_out_of_the_cross_terms():
    q, k = sides(6)
    weights = JointWeights(disc=0, gen=0)
    got = joint_loss(ZERO, q, k, weights=weights, detach_disc=True)
    check(got.total, rime(q, k, weights, 0.02, detach=True), q, k)
    d_q, g_q, d_k, g_k = gradients(got.total, q, k)
    assert not d_q.any()
    assert not d_k.any()
    assert g_q.any()
    assert g_k.any()
    both = joint_loss(ZERO, q, k, detach_disc=True)
    check(both.total, rime(q, k, JointWeights(), 0.02, detach=True), q, k)


def test_equal_ids_are_no_negatives():
    q, k = sides(6, 2)
    ids, key_ids = torch.tensor([5, 6, 5, 8, 9, 6]), torch.tensor([5, 6, 5, 8, 9, 6, 5, 11])
    drop = (ids[:, None] == key_ids) & ~torch.eye(6, 8, dtype=torch.bool)
    got = joint_loss(ZERO, q, k, weights=JointWeights(), temperature=0.1, query_ids=ids, key_ids=key_ids)
    check(got.total, rime(q, k, JointWeights(), 0.1, drop=drop), q, k)


def test_margin_drops_keys_far_above_the_positive():
    q, k = sides(6)
    margin = 0.2
    weights = JointWeights(disc=0, cross=0)
    got = joint_loss(ZERO, q, k, weights=weights, temperature=0.1, margin=margin, symmetric=False)
    s = q["gen"] @ k["gen"].T
    drop = s > s.diagonal()[:, None] + margin
    assert drop.any()
    check(got.total, contrast(q["gen"], k["gen"], 0.1, False, drop), q, k)


def test_temperature_gets_its_gradient():
    q, k = sides(5)
    tau = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    got = joint_loss(ZERO, q, k, temperature=tau).total
    want = rime(q, k, JointWeights(), tau)
    a, b = (torch.autograd.grad(loss, tau, retain_graph=True)[0] for loss in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=0)


def test_hit_rate_is_the_share_of_queries_whose_positive_is_first():
    q, k = sides(40, seed=3)
    got = joint_loss(ZERO, q, k)
    for a, b in itertools.product(MODES, MODES):
        s = q[a] @ k[b].T
        want = (s.argmax(dim=1) == torch.arange(40)).double().mean()
        torch.testing.assert_close(got.accuracy[f"{a}-{b}"].double(), want)


def test_cross_entropy_is_a_token_mean_per_side():
    targets = torch.tensor([-100, 3, 4, -100, 5, -100, -100, 7])
    logp = torch.tensor([0.0, -1.0, -2.0, 0.0, -6.0, 0.0, 0.0, -8.0])
    counts = scored_tokens(targets, 4)
    assert counts.tolist() == [2, 2]
    ce = side_cross_entropy(logp, 4, counts)
    assert ce["ce_query"] == 1.5
    assert ce["ce_target"] == 7
    weight = token_weights(targets, 4, counts, JointWeights(ce_query=2, ce_target=0.5))
    assert (weight * -logp).sum() == 2 * 1.5 + 0.5 * 7
    assert not weight[targets == -100].any()


def test_a_side_without_scored_tokens_costs_nothing():
    targets = torch.tensor([-100, -100, 4, -100])
    weight = token_weights(targets, 2, scored_tokens(targets, 2), JointWeights())
    assert weight.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "1"])
def test_bad_weight_is_named(bad):
    with pytest.raises(ValueError, match=r"JointWeights\.gen is .*expected a finite number >= 0"):
        JointWeights(gen=bad)


def test_missing_mode_is_named():
    q, k = sides(3)
    with pytest.raises(ValueError, match=r"keys has modes .*also need 'gen'"):
        joint_loss(ZERO, q, {"disc": k["disc"]})


# --- several ranks ---------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Tokens to two embeddings of a sequence and a log-probability of each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.disc, self.gen = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.tanh(self.table(ids))
        logp = -F.cross_entropy(hidden.flatten(0, 1) @ self.table.weight.T, targets.flatten(), reduction="none")
        pooled = hidden.mean(dim=1)
        return F.normalize(self.disc(pooled), dim=1), F.normalize(self.gen(pooled), dim=1), logp


def batch(n: int = 7, h: int = 3, length: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(20, (2 * n + h, length), generator=g)
    targets = torch.randint(20, (2 * n + h, length), generator=g)
    targets[torch.rand(targets.shape, generator=g) < 0.4] = -100
    return ids[:n], ids[n:], targets[:n], targets[n:]


WEIGHTS = JointWeights(ce_query=0.8, ce_target=1.3, same_item=0.4)


def step(
    model: nn.Module,
    q_ids: Tensor,
    k_ids: Tensor,
    q_targets: Tensor,
    k_targets: Tensor,
    tau: Tensor,
    group: object = None,
    world: int = 1,
) -> Tensor:
    n = len(q_ids)
    disc, gen, logp = model(torch.cat([q_ids, k_ids]), torch.cat([q_targets, k_targets]))
    targets, rows = torch.cat([q_targets, k_targets]).flatten(), q_targets.numel()
    counts = scored_tokens(targets, rows, group)
    ce = (token_weights(targets, rows, counts, WEIGHTS, world) * -logp).sum()
    ids = torch.arange(n) % 3 + 100  # repeated ids, also across ranks
    key_ids = torch.cat([ids, torch.arange(len(k_ids) - n)])
    return joint_loss(
        ce,
        {"disc": disc[:n], "gen": gen[:n]},
        {"disc": disc[n:], "gen": gen[n:]},
        weights=WEIGHTS,
        temperature=tau,
        query_ids=ids,
        key_ids=key_ids,
        group=group,
    ).total


def reference(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One process, all ranks' rows; ids as each rank makes them. Positives first, hard negatives last."""
    model, tau = Encoder(), torch.tensor(0.1, requires_grad=True)
    sizes = [len(p[0]) for p in parts]
    q_ids, q_t = torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])
    k_ids = torch.cat([p[1][: len(p[0])] for p in parts] + [p[1][len(p[0]) :] for p in parts])
    k_t = torch.cat([p[3][: len(p[0])] for p in parts] + [p[3][len(p[0]) :] for p in parts])
    n = len(q_ids)
    disc, gen, logp = model(torch.cat([q_ids, k_ids]), torch.cat([q_t, k_t]))
    mask = torch.cat([q_t, k_t]).flatten() != -100
    ce_q = -logp[: q_t.numel()].sum() / mask[: q_t.numel()].sum()
    ce_p = -logp[q_t.numel() :].sum() / mask[q_t.numel() :].sum()
    ids = torch.cat([torch.arange(s) % 3 + 100 for s in sizes])
    key_ids = torch.cat([ids] + [torch.arange(len(p[1]) - len(p[0])) for p in parts])
    total = joint_loss(
        0.8 * ce_q + 1.3 * ce_p,
        {"disc": disc[:n], "gen": gen[:n]},
        {"disc": disc[n:], "gen": gen[n:]},
        weights=WEIGHTS,
        temperature=tau,
        query_ids=ids,
        key_ids=key_ids,
    ).total
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters()}, tau.grad


def split(world: int) -> list[tuple[Tensor, ...]]:
    """Rank 0 gets more pairs and all but one of the hard negatives."""
    q, k, qt, kt = batch()
    cut, hard = 4, 9
    first = (q[:cut], torch.cat([k[:cut], k[7:hard]]), qt[:cut], torch.cat([kt[:cut], kt[7:hard]]))
    second = (q[cut:], torch.cat([k[cut:7], k[hard:]]), qt[cut:], torch.cat([kt[cut:7], kt[hard:]]))
    return [first, second][:world]


def rank_main(rank: int, world: int, folder: str) -> None:
    model, tau = DistributedDataParallel(Encoder()), torch.tensor(0.1, requires_grad=True)
    loss = step(model, *split(world)[rank], tau, dist.group.WORLD, world)
    loss.backward()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    dist.all_reduce(tau.grad)
    if rank == 0:
        grads = {name: p.grad for name, p in model.module.named_parameters()}
        torch.save((mean, grads, tau.grad / world), f"{folder}/out.pt")


@pytest.mark.dist
def test_two_ranks_under_ddp_give_the_gradients_of_one(tmp_path):
    run_ranks(rank_main, 2, str(tmp_path))
    loss, grads, tau_grad = torch.load(tmp_path / "out.pt")
    want_loss, want_grads, want_tau = reference(split(2))
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(tau_grad, want_tau, rtol=1e-4, atol=1e-5)
    for name, want in want_grads.items():
        error = (grads[name] - want).norm() / want.norm()
        assert error < 1e-5, (name, error)


def test_widths_are_the_weighted_sum_of_the_terms_at_each():
    q, k = sides(7, 3)
    weights = JointWeights(disc=0.3, gen=0.7, cross=1.9, same_item=0.6)
    got = joint_loss(ZERO, q, k, weights=weights, temperature=0.05, dims=[3, 16], dim_weights=[0.5, 2.0])

    def at(width: int) -> JointLoss:
        rows = [{m: F.normalize(x[:, :width], dim=1) for m, x in side.items()} for side in (q, k)]
        return joint_loss(ZERO, *rows, weights=weights, temperature=0.05)

    narrow, whole = at(3), at(16)
    check(got.total, 0.5 * narrow.total + 2 * whole.total, q, k)
    assert got.per_dim[3] == pytest.approx(narrow.total.item())
    assert got.accuracy["gen-disc@3"] == narrow.accuracy["gen-disc"]
    assert got.accuracy["gen-disc"] == got.accuracy["gen-disc@16"] == whole.accuracy["gen-disc"]
