"""Third-party and published forms of the operators' work, each one small function behind our benchmarks' signature.

``logprob`` and ``contrastive`` take a shape and return name -> peer for ``measure(..., peers=)`` of the module of that
name in rime_fast/bench. A peer imports its package inside and raises ImportError or RuntimeError with the reason where
it cannot run; the harness makes that a skipped row. UME-R1's reward, written anew, has a bench of its own: ume_r1.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.bench import contrastive as contrast
from rime_fast.bench import logprob as head
from rime_fast.bench.contrastive import TAU, Peer, Sides, Terms, own_rows, require_matrices
from rime_fast.bench.logprob import ENTROPY, Loss


def logprob(shape: head.Shape) -> dict[str, Loss]:
    """TRL's chunked log-probs, Liger's fused head and its sm_90 kernel, cut-cross-entropy."""
    if shape.entropy:
        return {"liger_sm90": liger_sm90(True)}
    return {"trl_chunked": trl_chunked, "liger": liger, "liger_sm90": liger_sm90(False), "cce": cut_cross_entropy}


def contrastive(_: contrast.Shape) -> dict[str, Peer]:
    """ClipLoss's form; a loop with a backward per row block; cached, GradCache's and Inf-CL's packages."""
    return {
        "open_clip": open_clip,
        "cached loop": cached_loop,
        "sentence-transformers": sentence_transformers,
        "gradcache": gradcache,
        "inf_cl": inf_cl,
    }


# --- the head --------------------------------------------------------------------------------------------------------


def trl_chunked(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    scored = targets != -100
    logp = ChunkedLogProbFunction.apply(hidden, lm_head, None, targets.clamp_min(0), 1.0, 8192, None, 1.0, ())[0]
    return -(logp * scored).sum()


def liger(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    if not hidden.is_cuda:
        raise RuntimeError("Liger's kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(lm_head, hidden, targets)


def liger_sm90(entropy: bool) -> Loss:
    """Liger's kernel for Hopper: per-token losses (and entropies) without logits."""

    def loss(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
        if not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device) != (9, 0):
            raise RuntimeError("Liger's sm_90 kernel needs a GPU of compute capability 9.0")
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, lm_head, targets, 1.0, -100, 1, entropy)
        return found[0].sum() - ENTROPY * found[1].sum() if entropy else found.sum()

    return loss


def cut_cross_entropy(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    if not hidden.is_cuda:
        raise RuntimeError("cut-cross-entropy's kernels need a GPU")
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, lm_head, targets, reduction="sum", filter_eps=None)


# --- the contrastive loss --------------------------------------------------------------------------------------------


def open_clip(sides: Sides, terms: Terms) -> None:
    require_matrices(sides, 2 * len(terms))
    own, total = own_rows(sides), torch.zeros((), device=sides[0]["disc"].device)
    for q, k, weight in terms:
        there, back = (sides[0][q] @ sides[1][k].T) / TAU, (sides[1][k] @ sides[0][q].T) / TAU
        total = total + weight * 0.5 * (F.cross_entropy(there.float(), own) + F.cross_entropy(back.float(), own))
    total.backward()


def cached_loop(sides: Sides, terms: Terms, rows: int = 512) -> None:
    own = own_rows(sides)
    for q, k, weight in terms:
        for a, b in ((sides[0][q], sides[1][k]), (sides[1][k], sides[0][q])):
            for start in range(0, len(own), rows):
                logits = (a[start : start + rows] @ b.T).float() / TAU
                loss = F.cross_entropy(logits, own[start : start + rows], reduction="sum")
                (0.5 * weight / len(own) * loss).backward()


def sentence_transformers(sides: Sides, terms: Terms, rows: int = 512) -> None:
    """Their cached loss, both directions, without the encoder: embeddings in, gradients of embeddings out."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    nothing: Any = torch.nn.Sequential(torch.nn.Identity())  # stands where the encoder would
    loss = CachedMultipleNegativesRankingLoss(
        nothing,
        1 / TAU,
        dot_score,
        rows,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    for q, k, weight in terms:
        pair = [rows.detach().requires_grad_() for rows in (sides[0][q], sides[1][k])]
        loss.calculate_loss([[pair[0]], [pair[1]]], with_backward=True)
        for leaf, own in zip((sides[0][q], sides[1][k]), pair, strict=True):
            assert own.grad is not None
            leaf.grad = weight * own.grad if leaf.grad is None else leaf.grad.add_(own.grad, alpha=weight)


def gradcache(sides: Sides, terms: Terms) -> None:
    from grad_cache.loss import SimpleContrastiveLoss

    require_matrices(sides, 2 * len(terms))
    loss, total = SimpleContrastiveLoss(), torch.zeros((), device=sides[0]["disc"].device)
    for q, k, weight in terms:
        a, b = sides[0][q], sides[1][k]
        total = total + weight * 0.5 * (loss(a / TAU, b) + loss(b / TAU, a))
    total.backward()


def inf_cl(sides: Sides, terms: Terms) -> None:
    from inf_cl import cal_inf_loss

    scale = torch.tensor(1 / TAU, device=sides[0]["disc"].device)
    total = torch.zeros((), device=scale.device)
    for q, k, weight in terms:
        there, back = cal_inf_loss(sides[0][q], sides[1][k], scale), cal_inf_loss(sides[1][k], sides[0][q], scale)
        total = total + weight * 0.5 * (there + back)
    total.backward()
