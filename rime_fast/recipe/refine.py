"""The policy loss of Refine-RL (recipe section 4): a clipped policy gradient per token plus a KL to a reference.

Per scored token t of rollout i, with ratio r = exp(logp - old_logp):

    l_t = -min(r A_i, clip(r, 1 - clip_low, 1 + clip_high) A_i) + beta k3,    k3 = exp(d) - d - 1,  d = ref_logp - logp

The clipping is PPO's with the asymmetric bounds of DAPO, k3 is Schulman's non-negative estimator of the KL. What
differs between the published losses is the denominator of the sum over tokens, see ``policy_loss``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops.checks import FLOATS, check_number, check_positive, check_tensor

LOSS_TYPES = ("ume_r1", "token_mean", "dr_grpo")


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    n_rows: float | None = None,
    n_tokens: float | Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta: float = 0.04,
    loss_type: str = "ume_r1",
    max_completion_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the scalar policy loss and its metrics.

    logp: [rows, R], log-probability of each sampled token under the policy, with gradient.
    old_logp: the same under the policy that sampled; None means on-policy: the ratio is exactly 1, its gradient is
        that of logp. ref_logp: the same under the reference; None needs ``beta=0``. Both like logp.
    advantages: [rows]. mask: bool like logp, True on the tokens that count (whatever stands elsewhere is ignored).
    loss_type, the denominator of the sum over tokens:
        "ume_r1": n_rows * max_completion_length (each rollout's token sum over the cap, then the mean over rollouts).
        "dr_grpo": the same denominator; Dr.GRPO differs in its advantages, which are not divided by the group's std
            (``RewardWeights(normalize_std=False)``).
        "token_mean": the number of scored tokens (DAPO).
    n_rows, n_tokens: the whole batch's rollouts and scored tokens when this call sees only a micro-batch of it, so
        that the micro-batches' losses add up; defaults: the rows of ``advantages``, the True entries of ``mask``.

    Metrics, 0-d tensors without gradient, means over the scored tokens: "kl" (k3), "clip_fraction" (tokens whose
    gradient the clipping removed), "ratio"; and "policy", the loss without its KL term. Nothing here reads a tensor
    on the host.

    Raises ValueError or TypeError naming the argument.
    """
    _check(logp, old_logp, ref_logp, advantages, mask, clip_low, clip_high, beta, loss_type, max_completion_length)
    rows = advantages.shape[0]
    per_token = advantages[:, None].expand_as(logp)

    logp = _only(logp, mask)  # masked before exp: a -inf outside the mask may not turn into a NaN gradient
    old = logp.detach() if old_logp is None else _only(old_logp, mask)
    ratio = torch.exp(logp - old)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = _only(-torch.minimum(ratio * per_token, clipped * per_token), mask)

    scored = mask.sum().clamp(min=1)
    if loss_type == "token_mean":
        denominator = scored if n_tokens is None else n_tokens
    else:
        assert max_completion_length is not None
        denominator = (rows if n_rows is None else n_rows) * max_completion_length
    policy_term = policy.sum() / denominator

    loss, kl = policy_term, logp.new_zeros(())
    if ref_logp is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and beta != 0):
            k3 = _k3(_only(ref_logp, mask) - logp)
            kl = k3.sum()
        if beta != 0:
            loss = policy_term + beta * (kl / denominator)

    with torch.no_grad():
        removed = ((ratio < 1 - clip_low) & (per_token < 0)) | ((ratio > 1 + clip_high) & (per_token > 0))
        metrics = {
            "policy": policy_term.detach(),
            "kl": kl.detach() / scored,
            "clip_fraction": (removed & mask).sum() / scored,
            "ratio": _only(ratio, mask).sum() / scored,
        }
    return loss, metrics


def _only(values: Tensor, mask: Tensor) -> Tensor:
    """fp32 (or fp64) values, 0 outside the mask and without gradient there."""
    wide = values if values.dtype == torch.float64 else values.float()
    return torch.where(mask, wide, 0.0)


def _k3(difference: Tensor) -> Tensor:
    return torch.expm1(difference) - difference


def _check(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    beta: float,
    loss_type: str,
    max_completion_length: int | None,
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: expected one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("beta", beta)):
        check_number(name, value)
        if value < 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}")
    if beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp: beta={beta} needs the reference's log-probabilities; pass them or beta=0")
    if loss_type != "token_mean":
        if max_completion_length is None:
            raise ValueError(f"max_completion_length: loss_type {loss_type!r} needs it")
        check_positive("max_completion_length", max_completion_length)
    check_tensor("advantages", advantages, shape=("rows",), dtypes=FLOATS, device=logp.device)
    check_tensor("logp", logp, shape=(advantages.shape[0], "R"), dtypes=FLOATS)
    check_tensor("mask", mask, shape=tuple(logp.shape), dtypes=(torch.bool,), device=logp.device)
    for name, other in (("old_logp", old_logp), ("ref_logp", ref_logp)):
        if other is not None:
            check_tensor(name, other, shape=tuple(logp.shape), dtypes=FLOATS, device=logp.device)
