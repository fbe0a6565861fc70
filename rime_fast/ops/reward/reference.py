"""The reward in plain torch: the truth for tests, the fallback for fp64 inputs and installations without a compiler.

Similarities are exact to fp64. Ranks compare them rounded to fp32, so that a tie means "equal as fp32 numbers" and
does not depend on the order in which a product was summed: every backend has to give exactly these ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rime_fast.ops.reward.weights import RewardWeights


@dataclass
class Statistics:
    """What the reward needs to know of the similarities of one rollout.

    own: [B, G, P] fp64 similarities to the item's own P anchors (NaN where one is missing).
    rank: [B, G, P] fp64, 1 + #greater + 1/2 #equal over the negatives.
    negative: [B, G] fp64 mean, softmax mean or maximum of the negatives' similarities, 0 without negatives.
    """

    own: Tensor
    rank: Tensor
    negative: Tensor


def statistics(
    gen: Tensor, anchors: Tensor, positive: Tensor, negatives_mask: Tensor | None, weights: RewardWeights
) -> Statistics:
    """Compute the similarities of gen [B, G, D] to anchors [A, D] as ``Statistics``.

    positive: [B] first own anchor of the item; out of the bank counts as missing. negatives_mask: [B, A] bool, True
    where an anchor may be a negative. Own anchors are never negatives, nor are anchors whose similarity is not finite.
    """
    n_anchors = anchors.shape[0]
    columns = positive[:, None] + torch.arange(weights.positives, device=gen.device)  # [B, P]
    inside = (columns >= 0) & (columns < n_anchors)
    similarity = gen.double() @ anchors.double().T  # [B, G, A]
    safe = columns.clamp(0, n_anchors - 1)[:, None, :].expand(-1, gen.shape[1], -1)
    own = similarity.gather(2, safe).masked_fill(~inside[:, None, :], torch.nan)

    is_own = torch.zeros(positive.shape[0], n_anchors + 1, dtype=torch.bool, device=gen.device)
    is_own.scatter_(1, torch.where(inside, columns, n_anchors), True)
    is_negative = ~is_own[:, :n_anchors] if negatives_mask is None else negatives_mask & ~is_own[:, :n_anchors]
    rounded = similarity.float()
    is_negative = is_negative[:, None, :] & rounded.isfinite()

    rank = torch.ones_like(own)
    for p in range(weights.positives):
        threshold = own[:, :, p : p + 1].float()
        greater = ((rounded > threshold) & is_negative).sum(2, dtype=torch.float64)
        equal = ((rounded == threshold) & is_negative).sum(2, dtype=torch.float64)
        rank[:, :, p] += greater + 0.5 * equal
    return Statistics(own, rank, _negative(similarity, is_negative, weights))


def _negative(similarity: Tensor, is_negative: Tensor, weights: RewardWeights) -> Tensor:
    kind = "mean" if weights.mode == "ume_r1" else weights.negative
    any_negative = is_negative.any(2)
    values = similarity.masked_fill(~is_negative, 0.0)
    if kind == "mean":
        return values.sum(2) / is_negative.sum(2).clamp(min=1)
    lowest = similarity.masked_fill(~is_negative, -torch.inf)
    if kind == "max":
        return lowest.amax(2).masked_fill(~any_negative, 0.0)
    share = torch.softmax(lowest / weights.tau, dim=2).masked_fill(~is_negative, 0.0)
    return (share * values).sum(2)


def rewards(
    found: Statistics,
    format_ok: Tensor,
    lengths: Tensor | None,
    disc_similarity: Tensor | None,
    weights: RewardWeights,
) -> dict[str, Tensor]:
    """Compute "reward", "advantage" and every term of ``TERM_NAMES`` as [B, G] fp64.

    A rollout with a missing own similarity gets the format-failed reward: no format, score or refine term (its
    length term stays), counts 1 in "nan", and 0 in every other diagnostic, so that sums over a log window stay finite.
    """
    missing = ~found.own.isfinite().all(2)
    own = found.own.masked_fill(missing[:, :, None], 0.0)
    if weights.mode == "ume_r1":
        hit = (_rank_in_group(own, found.rank) <= weights.positives).double().mean(2)
        factor = hit
    else:
        hit = (found.rank[:, :, 0] <= weights.hit_k).double()
        rank = found.rank[:, :, 0]
        factor = {"hit": hit, "1/rank": 1 / rank, "1/log2(1+rank)": 1 / torch.log2(1 + rank)}[weights.rank_reward]
    positive = own.mean(2)
    negative = found.negative.masked_fill(missing, 0.0)
    zero = torch.zeros_like(positive)

    terms = {
        "format": weights.w_fmt * (format_ok & ~missing),
        "score": weights.w_rank * factor * (positive - negative),
        "refine": zero if disc_similarity is None else weights.w_refine * (positive - disc_similarity.double()),
        "length": zero,
    }
    if lengths is not None:
        over = (lengths.double() - weights.length_limit).clamp(min=0) / weights.length_limit
        terms["length"] = -weights.w_len * over
    for name in ("score", "refine"):
        terms[name] = terms[name].masked_fill(missing, 0.0)
    reward = terms["format"] + terms["score"] + terms["refine"] + terms["length"]
    advantage, group_std = advantages(reward, weights)
    return terms | {
        "reward": reward,
        "advantage": advantage,
        "rank": found.rank.mean(2).masked_fill(missing, 0.0),
        "hit": hit.masked_fill(missing, 0.0),
        "positive": positive.masked_fill(missing, 0.0),
        "negative": negative,
        "group_std": group_std.expand_as(reward),
        "nan": missing.double(),
    }


def _rank_in_group(own: Tensor, rank: Tensor) -> Tensor:
    """Rank of each own anchor among all anchors, its own group included; ties again at fp32, half each."""
    rounded = own.float()
    greater = (rounded[..., None, :] > rounded[..., :, None]).sum(-1, dtype=torch.float64)
    equal = (rounded[..., None, :] == rounded[..., :, None]).sum(-1, dtype=torch.float64) - 1  # not with itself
    return rank + greater + 0.5 * equal


def advantages(reward: Tensor, weights: RewardWeights) -> tuple[Tensor, Tensor]:
    """Compute the advantages (R - mean) / (std + eps) over the last dimension, and the unbiased std [.., 1] (0 for a
    group of one)."""
    centred = reward - reward.mean(-1, keepdim=True)
    group_size = reward.shape[-1]
    group_std = (centred.square().sum(-1, keepdim=True) / max(group_size - 1, 1)).sqrt()
    return (centred / (group_std + weights.eps) if weights.normalize_std else centred), group_std
