"""The row kernels of the chunked backend: one block of logits [R, V] fp32 -> statistics, and -> its gradient in place.

z = softcap(logits + bias) / temperature (see reference.py). Per row the forward gives
    lse = log sum exp z,   hit = z[target],   entropy = -sum_v p_v log p_v   (only when asked for)
lse as two fp32 numbers, of which the second is what the first's rounding lost: at scores of 100 it would show in every
p_v = exp(z_v - lse). The backward, from the upstream gradients g of logp and h of the entropy, overwrites the logits
with
    dlogits_v = dz_v * (1 - tanh^2) / temperature,   dz_v = g ([v = target] - p_v) - h p_v (z_v - lse + entropy)
and returns sum_v dz_v (z_v - centre), of which -1/temperature is the row's share of the temperature's gradient: it
equals sum_v dz_v z_v, as sum_v dz_v = 0, and a centre near z[target] keeps it from cancelling.
A target outside [0, V) hits nothing: that is how a rank without the target's column takes part (vocab_parallel.py).
Compiled: csrc/cpu/row_softmax.cpp, csrc/cuda/row_softmax.cu; without them the torch code below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops import native


def rows_forward(
    logits: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor, softcap: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse [2, R], hit [R], entropy [R] or [0]) in fp32. bias [V] is fp32 and contiguous."""
    if not native.available(cuda=logits.is_cuda):
        return _torch_forward(logits, targets, bias, temperature, softcap, entropy)
    rows = logits.shape[0]
    lse, hit = logits.new_empty(2, rows), logits.new_empty(rows)
    row_entropy = logits.new_empty(rows) if entropy else None
    torch.ops.rime_fast_C.row_softmax_forward(logits, targets, bias, temperature, softcap, lse, hit, row_entropy)
    return lse, hit, logits.new_empty(0) if row_entropy is None else row_entropy


def rows_backward_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    centre: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(dlogits [R, V] in ``dtype``, sum_v dz_v (z_v - centre) [R]); dlogits takes the logits' memory."""
    dlogits = logits if dtype == torch.float32 else logits.view(dtype)[:, : logits.shape[1]]
    args = (targets, lse, entropy, centre, grad_logp, grad_entropy, bias, temperature, softcap)
    if not native.available(cuda=logits.is_cuda):
        products = _torch_backward_(logits, *args)
        return logits if dtype == torch.float32 else logits.to(dtype), products
    products = torch.empty_like(centre)
    torch.ops.rime_fast_C.row_softmax_backward(logits, *args, dlogits, products)
    return dlogits, products


def _torch_forward(
    logits: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor, softcap: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    z = _scores(logits, bias, temperature, softcap)
    top = z.amax(dim=1)
    log_sum = (z - top.unsqueeze(1)).exp().sum(dim=1).log()
    high = top + log_sum
    lse = torch.stack([high, (top - high) + log_sum])
    inside = (targets >= 0) & (targets < z.shape[1])
    hit = z.gather(1, torch.where(inside, targets, 0).unsqueeze(1)).squeeze(1)
    hit = torch.where(inside, hit, torch.zeros_like(hit))
    if not entropy:
        return lse, hit, lse.new_empty(0)
    log_p = _log_p(z, lse)
    p = log_p.exp()
    return lse, hit, -torch.where(p == 0, p, p * log_p).sum(dim=1)


def _torch_backward_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    centre: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
) -> Tensor:
    z = _scores(logits, bias, temperature, softcap)
    shifted = _log_p(z, lse)
    p = shifted.exp()
    dz = -grad_logp.unsqueeze(1) * p
    if grad_entropy is not None and entropy is not None:
        slope = torch.where(p == 0, p, p * (shifted + entropy.unsqueeze(1)))
        dz -= grad_entropy.unsqueeze(1) * slope
    inside = (targets >= 0) & (targets < z.shape[1])
    at = torch.where(inside, targets, 0).unsqueeze(1)
    dz.scatter_add_(1, at, torch.where(inside, grad_logp, torch.zeros_like(grad_logp)).unsqueeze(1))
    products = torch.where(dz == 0, dz, dz * (z - centre.unsqueeze(1))).sum(dim=1)
    if softcap:
        dz *= 1.0 - (z * (temperature / softcap)) ** 2
    logits.copy_(dz / temperature)
    return products


def _log_p(z: Tensor, lse: Tensor) -> Tensor:
    return (z - lse[0].unsqueeze(1)) - lse[1].unsqueeze(1)


def _scores(logits: Tensor, bias: Tensor | None, temperature: Tensor, softcap: float) -> Tensor:
    s = logits if bias is None else logits + bias
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    return s / temperature
