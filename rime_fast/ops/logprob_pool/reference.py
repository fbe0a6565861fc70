"""The log-prob operator in plain torch: the truth for tests, the fallback for fp64, differentiable twice and more.

Row t with hidden state x, head W, bias b, soft cap c and temperature tau:
    s = W x + b;   s <- c tanh(s / c) if c;   z = s / tau;   lse = log sum_v exp z_v
    logp = z[target] - lse;   entropy = -sum_v p_v log p_v, p = exp(z - lse)
A read-out over rows [start, end): e = mean of the rows, divided by max(|e|, 1e-12) when normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool.problem import Options

EPSILON = 1e-12  # the smallest norm divided by; torch.nn.functional.normalize uses the same


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype a computation on ``dtype`` runs in: fp64 stays, all else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scores(x: Tensor, lm_head: Tensor, bias: Tensor | None, temperature: Tensor, softcap: Tensor | None) -> Tensor:
    """Compute the scores z [M, V] of the rows x [M, H]."""
    dtype = wide(x.dtype)
    s = x.to(dtype) @ lm_head.to(dtype).t()
    if bias is not None:
        s = s + bias.to(dtype)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    banned = s == -torch.inf  # by the bias; left out of the division, whose gradient would be 0 * inf
    return (s.masked_fill(banned, 0.0) / temperature.to(dtype)).masked_fill(banned, -torch.inf)


def reference_rows(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Compute logp [T] and entropy [T] (or None), 0 where ignored. Only the scored rows meet the head."""
    scored = (targets != options.ignore_index).nonzero().squeeze(1)
    z = scores(hidden[scored], lm_head, bias, temperature, softcap)
    lse = z.logsumexp(dim=1)
    logp = z.gather(1, targets[scored].long().unsqueeze(1)).squeeze(1) - lse
    zeros = hidden.new_zeros(hidden.shape[0], dtype=z.dtype)
    if not options.entropy:
        return zeros.index_put((scored,), logp), None
    log_p = z - lse.unsqueeze(1)
    p = log_p.exp()
    # A score of -inf has p = 0 and adds nothing; the fill keeps 0 * inf out of the gradient as well.
    terms = p * log_p.masked_fill(log_p == -torch.inf, 0.0)
    return zeros.index_put((scored,), logp), zeros.index_put((scored,), -terms.sum(dim=1))


def reference_pools(hidden: Tensor, starts: Tensor, ends: Tensor, normalize: bool) -> Tensor:
    """Compute the read-outs [K, H]: mean of hidden[starts[k] : ends[k]], unit norm if asked. One gather of the rows
    read, one segment sum."""
    x = hidden.to(wide(hidden.dtype))
    counts = ends - starts
    owner = torch.repeat_interleave(torch.arange(starts.shape[0], device=x.device), counts)
    first = counts.cumsum(0) - counts
    rows = torch.arange(owner.shape[0], device=x.device) - first[owner] + starts[owner]
    e = x.new_zeros(starts.shape[0], x.shape[1]).index_add(0, owner, x[rows]) / counts.unsqueeze(1)
    if normalize:
        e = e / e.norm(dim=1, keepdim=True).clamp_min(EPSILON)
    return e


def reference(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    starts: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute all of the operator: (logp [T], entropy [T] | None, embeddings [K, H]) in fp32 (fp64 for fp64 inputs)."""
    with torch.autocast(hidden.device.type, enabled=False):  # it would make the logits in 16 bits
        logp, row_entropy = reference_rows(hidden, lm_head, targets, bias, temperature, softcap, options)
    return logp, row_entropy, reference_pools(hidden, starts, ends, options.normalize)
