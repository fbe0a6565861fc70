"""Read-outs of operator A: mean over a span of rows, normalised; and their gradient, added in place.

Forward: m = mean(hidden[start:end]) in fp32, e = m * inv_norm, inv_norm = 1 / max(|m|, 1e-12) (1 without
normalisation). Backward, with g the gradient of e: dm = inv_norm * (g - e (e . g)), and every row of the span gets
dm / (end - start). Compiled: csrc/cpu/pool.cpp, csrc/cuda/pool.cu; on CUDA without csrc triton_pool.py; otherwise the
torch code below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.logprob_pool import triton_backend
from rime_fast.ops.logprob_pool.reference import EPSILON


def pool_forward(hidden: Tensor, starts: Tensor, ends: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """(embeddings [K, H] fp32, inv_norm [K] fp32) of hidden [T, H]."""
    compiled = native.available(cuda=hidden.is_cuda)
    if compiled or _on_triton(hidden):
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        pooled = torch.empty(starts.shape[0], hidden.shape[1], dtype=torch.float32, device=hidden.device)
        inv_norm = pooled.new_empty(starts.shape[0])
        if compiled:
            torch.ops.rime_fast_C.pool_forward(hidden, starts, ends, normalize, pooled, inv_norm)
        else:
            from rime_fast.ops.logprob_pool import triton_pool

            triton_pool.pool_forward(hidden, starts, ends, normalize, pooled, inv_norm, EPSILON)
        return pooled, inv_norm
    owner, rows, counts = _members(starts, ends)
    sums = torch.zeros(starts.shape[0], hidden.shape[1], dtype=torch.float32, device=hidden.device)
    sums.index_add_(0, owner, hidden.index_select(0, rows).float())
    mean = sums.div_(counts.unsqueeze(1))
    if not normalize:
        return mean, torch.ones(starts.shape[0], dtype=torch.float32, device=hidden.device)
    inv_norm = mean.norm(dim=1).clamp_min(EPSILON).reciprocal()
    return mean.mul_(inv_norm.unsqueeze(1)), inv_norm


def pool_backward_(
    grad_hidden: Tensor, grad: Tensor, pooled: Tensor, inv_norm: Tensor, starts: Tensor, ends: Tensor, normalize: bool
) -> None:
    """Add the read-outs' gradients [K, H] into ``grad_hidden`` [T, H] in place."""
    grad = grad.float()
    if native.available(cuda=grad_hidden.is_cuda):
        torch.ops.rime_fast_C.pool_backward(grad_hidden, grad.contiguous(), pooled, inv_norm, starts, ends, normalize)
        return
    if _on_triton(grad_hidden):
        from rime_fast.ops.logprob_pool import triton_pool

        triton_pool.pool_backward(grad_hidden, grad.contiguous(), pooled, inv_norm, starts, ends, normalize, EPSILON)
        return
    if normalize:
        # At |m| < 1e-12 the norm is a constant, so e's own direction is not taken out.
        along = (pooled * grad).sum(dim=1, keepdim=True) * (inv_norm < 1.0 / EPSILON).unsqueeze(1)
        grad = (grad - pooled * along) * inv_norm.unsqueeze(1)
    owner, rows, counts = _members(starts, ends)
    grad = grad / counts.unsqueeze(1)
    grad_hidden.index_add_(0, rows, grad.index_select(0, owner).to(grad_hidden.dtype))


def _on_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and triton_backend.why_not(tensor) is None


def _members(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every (read-out, row) pair of the spans, and the spans' lengths."""
    counts = ends - starts
    owner = torch.repeat_interleave(torch.arange(starts.shape[0], device=starts.device), counts)
    first = counts.cumsum(0) - counts
    rows = torch.arange(owner.shape[0], device=starts.device) - first[owner] + starts[owner]
    return owner, rows, counts
