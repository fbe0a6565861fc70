"""The policy loss against a token-by-token computation in Python, and its behaviour at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from rime_fast.recipe.refine import LOSS_TYPES, policy_loss

LENGTHS = [3, 0, 5, 1]
CAP = 6


def _batch(seed: int = 0, spread: float = 0.4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(CAP)[None] < torch.tensor(LENGTHS)[:, None]
    old = -torch.rand(4, CAP, generator=generator, dtype=torch.float64) * 3
    return {
        "logp": old + spread * torch.randn(4, CAP, generator=generator, dtype=torch.float64),
        "old_logp": old,
        "ref_logp": old + spread * torch.randn(4, CAP, generator=generator, dtype=torch.float64),
        "advantages": torch.tensor([1.3, -0.2, -0.9, 0.6], dtype=torch.float64),
        "mask": mask,
    }


def _by_hand(batch: dict[str, torch.Tensor], loss_type: str, low: float, high: float, beta: float) -> dict[str, float]:
    total = kl = removed = ratios = 0.0
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            logp, old, ref = (float(batch[name][i, t]) for name in ("logp", "old_logp", "ref_logp"))
            advantage, ratio = float(batch["advantages"][i]), math.exp(logp - old)
            inside = min(max(ratio, 1 - low), 1 + high)
            k3 = math.exp(ref - logp) - (ref - logp) - 1
            total += -min(ratio * advantage, inside * advantage) + beta * k3
            removed += inside * advantage < ratio * advantage
            kl, ratios = kl + k3, ratios + ratio
    tokens = sum(LENGTHS)
    denominator = tokens if loss_type == "token_mean" else len(LENGTHS) * CAP
    return {
        "loss": total / denominator,
        "kl": kl / tokens,
        "clip_fraction": removed / tokens,
        "ratio": ratios / tokens,
    }


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_metrics_by_hand(loss_type: str) -> None:
    batch = _batch()
    want = _by_hand(batch, loss_type, 0.2, 0.28, 0.04)
    assert 0 < want["clip_fraction"] < 1  # the data exercises both branches
    loss, metrics = policy_loss(**batch, loss_type=loss_type, max_completion_length=CAP)
    got = {"loss": loss, **metrics}
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(value, rel=1e-12 if name == "loss" else 1e-6), name
        assert got[name].dim() == 0


def test_gradient() -> None:
    batch = _batch()
    logp = batch.pop("logp").requires_grad_()
    # Away from the kinks of min and clip, which random data is.
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, **batch, max_completion_length=CAP, beta=0.3)[0], logp, eps=1e-7, atol=1e-6
    )


def test_on_policy_ratio_is_one_and_its_gradient_the_policy_gradient() -> None:
    batch = _batch()
    logp = batch["logp"].float().requires_grad_()
    loss, metrics = policy_loss(
        logp, None, None, batch["advantages"].float(), batch["mask"], beta=0.0, max_completion_length=CAP
    )
    loss.backward()
    assert float(metrics["ratio"]) == 1.0
    assert float(metrics["clip_fraction"]) == 0.0
    want = -batch["advantages"].float()[:, None] * batch["mask"] / (4 * CAP)
    torch.testing.assert_close(logp.grad, want)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up(loss_type: str) -> None:
    batch = _batch()
    whole, _ = policy_loss(**batch, loss_type=loss_type, max_completion_length=CAP)
    parts = sum(
        policy_loss(
            **{name: value[rows] for name, value in batch.items()},
            loss_type=loss_type,
            max_completion_length=CAP,
            n_rows=4,
            n_tokens=sum(LENGTHS),
        )[0]
        for rows in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(parts, whole)


def test_what_stands_outside_the_mask_is_ignored() -> None:
    batch = _batch()
    want, _ = policy_loss(**batch, max_completion_length=CAP)
    for name in ("logp", "old_logp", "ref_logp"):
        batch[name] = batch[name].masked_fill(~batch["mask"], -torch.inf)
    logp = batch.pop("logp").requires_grad_()
    loss, _ = policy_loss(logp, **batch, max_completion_length=CAP)
    loss.backward()
    assert float(loss) == float(want)
    assert logp.grad is not None
    assert bool(logp.grad.isfinite().all())
    assert not logp.grad[~batch["mask"]].any()


def test_nothing_scored_gives_zero_with_a_gradient() -> None:
    batch = _batch()
    batch["mask"] = torch.zeros_like(batch["mask"])
    logp = batch.pop("logp").requires_grad_()
    for loss_type in LOSS_TYPES:
        loss, metrics = policy_loss(logp, **batch, loss_type=loss_type, max_completion_length=CAP)
        (grad,) = torch.autograd.grad(loss, logp)
        assert float(loss) == 0.0
        assert not grad.any()
        assert all(float(value) == 0.0 for value in metrics.values())


def test_beta_zero_measures_the_kl_but_does_not_train_on_it() -> None:
    batch = _batch()
    with_reference, metrics = policy_loss(**batch, beta=0.0, max_completion_length=CAP)
    without, _ = policy_loss(**{**batch, "ref_logp": None}, beta=0.0, max_completion_length=CAP)
    assert float(with_reference) == float(without)
    assert float(metrics["kl"]) > 0


def test_compiles_without_a_graph_break() -> None:
    batch = _batch()
    compiled = torch.compile(policy_loss, fullgraph=True, backend="eager")
    assert float(compiled(**batch, max_completion_length=CAP)[0]) == float(
        policy_loss(**batch, max_completion_length=CAP)[0]
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_type": "grpo"}, ValueError, "loss_type: .*'grpo'"),
        ({"ref_logp": None}, ValueError, "ref_logp: beta=0.04"),
        ({"max_completion_length": None}, ValueError, "max_completion_length"),
        ({"clip_low": -0.1}, ValueError, "clip_low"),
        ({"mask": torch.ones(4, CAP)}, TypeError, "mask: expected dtype bool"),
        ({"advantages": torch.ones(3)}, ValueError, "logp: expected shape"),
        ({"old_logp": torch.zeros(4, CAP + 1)}, ValueError, "old_logp: expected shape"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        policy_loss(**{**_batch(), "max_completion_length": CAP, **change})
