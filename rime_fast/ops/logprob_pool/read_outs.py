"""Read-outs: means over spans of rows, normalised; and their gradient.

Forward: m = mean(hidden[start:end]) in fp32, e = m * inv_norm, inv_norm = 1 / max(|m|, 1e-12) (1 without
normalisation). Backward, with g the gradient of e: dm = inv_norm (g - e (e . g)), and every row of the span gets
dm / (end - start). That is what a gradient of ``hidden`` starts from, before the products of the head add to it.

On the CPU the torch code here; on CUDA triton_rows.py, whose forward runs in the launch of the log-probs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool.problem import Spans
from rime_fast.ops.logprob_pool.reference import EPSILON


class ReadOuts(NamedTuple):
    """What the forward gives: the embeddings [K, H] and the factors [K] that made them, fp32."""

    embeddings: Tensor
    inv_norm: Tensor


def read_outs_forward(hidden: Tensor, spans: Spans, normalize: bool) -> ReadOuts:
    """Compute the read-outs on the CPU, which may look at the spans: rows are gathered, longer
    spans summed one by one."""
    if bool((spans.ends - spans.starts == 1).all()):
        mean = hidden.index_select(0, spans.starts).float()
    else:
        edges = zip(spans.starts.tolist(), spans.ends.tolist(), strict=True)
        mean = torch.stack([hidden[a:b].sum(dim=0, dtype=torch.float32) / (b - a) for a, b in edges])
    if not normalize:
        return ReadOuts(mean, mean.new_ones(mean.shape[0]))
    inv_norm = mean.norm(dim=1).clamp_min(EPSILON).reciprocal()
    return ReadOuts(mean.mul_(inv_norm.unsqueeze(1)), inv_norm)


def row_gradients(grad: Tensor, found: ReadOuts, spans: Spans, normalize: bool) -> Tensor:
    """Compute what each row of a span gets from the gradient [K, H] of its embedding, [K, H] fp32. On any device."""
    grad = grad.float()
    if normalize:
        # At |m| < 1e-12 the norm is a constant, so e's own direction is not taken out.
        along = (found.embeddings * grad).sum(dim=1, keepdim=True) * (found.inv_norm < 1.0 / EPSILON).unsqueeze(1)
        grad = (grad - found.embeddings * along) * found.inv_norm.unsqueeze(1)
    return grad / (spans.ends - spans.starts).unsqueeze(1)


def start_gradient_(out: Tensor, factor: Tensor | None, rows: Tensor | None, spans: Spans) -> None:
    """Start the gradient of hidden on the CPU: out [T, H] <- factor out (None: 0, whatever it held) + every span's
    ``rows`` [K, H] on its rows."""
    scale_(out, factor)
    if rows is None:
        return
    if bool((spans.ends - spans.starts == 1).all()):
        out.index_add_(0, spans.starts, rows.to(out.dtype))
        return
    for row, first, last in zip(rows.to(out.dtype), spans.starts.tolist(), spans.ends.tolist(), strict=True):
        out[first:last] += row


def scale_(out: Tensor, factor: Tensor | None) -> None:
    """Scale a gradient on the CPU, where reading the factor is free: out <- factor out (None: 0, whatever it held)."""
    if factor is None:
        out.zero_()
    elif float(factor) != 1.0:
        out.mul_(float(factor))
