"""The row kernels of the chunked backend: one block of logits [R, V] -> statistics, and -> its gradient in place.

Logits are fp32, or on a GPU also bf16 or fp16; what is computed from them is fp32.

z = softcap(logits + bias) / temperature (see reference.py). Per row the forward gives
    lse = log sum exp z,   target_logit = z[target],   entropy = -sum_v p_v log p_v   (only when asked for)
lse as two fp32 numbers, of which the second is what the first's rounding lost: at scores of 100 it would show in every
p_v = exp(z_v - lse). The backward, from the upstream gradients g of logp and h of the entropy, overwrites the logits
with
    dlogits_v = dz_v * (1 - tanh^2) / temperature,   dz_v = g ([v = target] - p_v) - h p_v (z_v - lse + entropy)
and returns sum_v dz_v (z_v - z[target]), of which -1/temperature is the row's share of the temperature's gradient: it
equals sum_v dz_v z_v, as sum_v dz_v = 0, and being near z[target] keeps it from cancelling.
A target outside [0, V) hits nothing: that is how a rank without the target's column takes part (vocab_parallel.py).
Compiled: csrc/cpu/logprob.cpp, csrc/cuda/logprob.cu; without them Triton's kernels on a GPU (triton_rows.py), on the
CPU the torch code below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.logprob_pool.problem import Scoring, Statistics, Upstream


def rows_forward(logits: Tensor, targets: Tensor, scoring: Scoring, entropy: bool) -> Statistics:
    """Compute the statistics of the rows [R, V], all fp32."""
    kernels = _kernels(logits)
    if kernels == "torch":
        return _torch_forward(logits, targets, scoring, entropy)
    found = _new(targets, entropy)
    if kernels == "triton":
        _triton_forward(logits, targets, scoring, found)
        return found
    torch.ops.rime_fast_C.row_softmax_forward(
        logits, targets, *scoring, found.lse, found.target_logit, found.entropy if entropy else None
    )
    return found


def rows_backward_(
    logits: Tensor,
    targets: Tensor,
    scoring: Scoring,
    found: Statistics,
    upstream: Upstream,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of a block of logits in their memory: (dlogits [R, V] in ``dtype``, the logits' own unless
    they are fp32; sum_v dz_v (z_v - z[target]) [R])."""
    dlogits = logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]
    kernels = _kernels(logits)
    if kernels == "torch":
        products = _torch_backward_(logits, targets, scoring, found, upstream)
        return logits.to(dtype), products
    products = torch.empty_like(found.target_logit)
    if kernels == "triton":
        _triton_backward_(logits, targets, scoring, found, upstream, dlogits, products)
        return dlogits, products
    entropy = None if upstream.entropy is None else found.entropy
    torch.ops.rime_fast_C.row_softmax_backward(
        logits, targets, *scoring, found.lse, found.target_logit, entropy, *upstream, dlogits, products
    )
    return dlogits, products


def rows_both_(
    logits: Tensor,
    targets: Tensor,
    scoring: Scoring,
    slope: Tensor,
    entropy: bool,
    dtype: torch.dtype,
    with_products: bool,
) -> tuple[Statistics, Tensor, Tensor | None]:
    """Compute what ``rows_forward`` does, and from it what ``rows_backward_`` does for the upstream gradient ``slope``
    [R] of logp alone; csrc's CPU kernel while the row is in the cache. with_products: the sums for the temperature's
    gradient are needed."""
    if logits.is_cuda or _kernels(logits) != "csrc":
        found = rows_forward(logits, targets, scoring, entropy)
        return found, *rows_backward_(logits, targets, scoring, found, Upstream(slope, None), dtype)
    found, products = _new(targets, entropy), torch.empty_like(slope) if with_products else None
    given = logits, targets, *scoring, slope, found.lse, found.target_logit, found.entropy if entropy else None
    torch.ops.rime_fast_C.row_softmax_both(*given, logits, products)
    return found, logits, products


def _new(targets: Tensor, entropy: bool) -> Statistics:
    rows, like = targets.shape[0], targets.new_empty(0, dtype=torch.float32)
    return Statistics(like.new_empty(2, rows), like.new_empty(rows), like.new_empty(rows if entropy else 0))


def _kernels(logits: Tensor) -> str:
    """What serves them: csrc (on the CPU fp32 alone), else Triton on a GPU and torch on the CPU."""
    if native.available(cuda=logits.is_cuda) and (logits.is_cuda or logits.dtype == torch.float32):
        return "csrc"
    return "triton" if logits.is_cuda else "torch"


def _block(vocabulary: int) -> int:
    """Columns of a step: 16 for each thread of 8 warps, fewer only for a small vocabulary."""
    return min(4096, 1 << (vocabulary - 1).bit_length())


def _triton_forward(logits: Tensor, targets: Tensor, scoring: Scoring, out: Statistics) -> None:
    from rime_fast.ops.logprob_pool.triton_rows import row_statistics_kernel

    rows, vocabulary = logits.shape
    if rows:
        row_statistics_kernel[(rows,)](
            *(logits, *scoring, targets, *out, rows, logits.stride(0), vocabulary),
            ENTROPY=out.entropy.numel() > 0,
            BLOCK=_block(vocabulary),
            num_warps=8,
        )


def _triton_backward_(
    logits: Tensor,
    targets: Tensor,
    scoring: Scoring,
    found: Statistics,
    upstream: Upstream,
    dlogits: Tensor,
    products: Tensor,
) -> None:
    from rime_fast.ops.logprob_pool.triton_rows import row_gradient_kernel

    rows, vocabulary = logits.shape
    if rows:
        row_gradient_kernel[(rows,)](
            *(logits, *scoring, targets, *found, *upstream, dlogits, products),
            *(rows, logits.stride(0), dlogits.stride(0), vocabulary),
            BLOCK=_block(vocabulary),
            num_warps=8,
        )


def _torch_forward(logits: Tensor, targets: Tensor, scoring: Scoring, entropy: bool) -> Statistics:
    z = _scores(logits, scoring)
    top = z.amax(dim=1)
    shifted = z - top.unsqueeze(1)
    part = shifted.exp()
    total = part.sum(dim=1)
    log_sum = total.log()
    high = top + log_sum
    lse = torch.stack([high, (top - high) + log_sum])
    inside = (targets >= 0) & (targets < z.shape[1])
    target_logit = z.gather(1, torch.where(inside, targets, 0).unsqueeze(1)).squeeze(1)
    target_logit = torch.where(inside, target_logit, torch.zeros_like(target_logit))
    if not entropy:
        return Statistics(lse, target_logit, lse.new_empty(0))
    # As csrc/rime/logprob.h: where scores are near equal, and the entropy's gradient is almost 0, -sum p log p rounds
    # too much.
    weighted = torch.where(part == 0, part, part * shifted).sum(dim=1)
    return Statistics(lse, target_logit, log_sum - weighted / total)


def _torch_backward_(
    logits: Tensor, targets: Tensor, scoring: Scoring, found: Statistics, upstream: Upstream
) -> Tensor:
    z = _scores(logits, scoring)
    shifted = _log_p(z, found.lse)
    p = shifted.exp()
    dz = -upstream.logp.unsqueeze(1) * p
    if upstream.entropy is not None:
        slope = torch.where(p == 0, p, p * (shifted + found.entropy.unsqueeze(1)))
        dz -= upstream.entropy.unsqueeze(1) * slope
    inside = (targets >= 0) & (targets < z.shape[1])
    at = torch.where(inside, targets, 0).unsqueeze(1)
    dz.scatter_add_(1, at, torch.where(inside, upstream.logp, torch.zeros_like(upstream.logp)).unsqueeze(1))
    products = torch.where(dz == 0, dz, dz * (z - found.target_logit.unsqueeze(1))).sum(dim=1)
    if scoring.softcap is not None:
        dz *= 1.0 - (z * (scoring.temperature / scoring.softcap)) ** 2
    logits.copy_(dz / scoring.temperature)
    return products


def _log_p(z: Tensor, lse: Tensor) -> Tensor:
    return (z - lse[0].unsqueeze(1)) - lse[1].unsqueeze(1)


def _scores(logits: Tensor, scoring: Scoring) -> Tensor:
    s = logits.float() if scoring.bias is None else logits.float() + scoring.bias
    if scoring.softcap is not None:
        s = scoring.softcap * torch.tanh(s / scoring.softcap)
    return s / scoring.temperature
