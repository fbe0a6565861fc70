"""The switches of the Refine-RL reward (recipe section 4) and the names of its terms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from rime_fast.ops.checks import check_flag, check_int, check_number, check_positive

MODES = ("anchor", "ume_r1")
RANK_REWARDS = ("hit", "1/rank", "1/log2(1+rank)")
NEGATIVES = ("mean", "softmax", "max")

REWARD_TERMS = ("format", "score", "refine", "length")
DIAGNOSTICS = ("rank", "hit", "positive", "negative", "group_std", "nan")
TERM_NAMES = REWARD_TERMS + DIAGNOSTICS
"""What ``terms`` of ``score_rewrites_`` may hold, each a [B, G] fp32 buffer.

The reward is the sum of the first four, each with its weight and sign applied:
format: w_fmt where the format is right; score: w_rank f(rank) (s+ - neg); refine: w_refine (s+ - disc_similarity);
length: -w_len max(0, length - L0) / L0.
rank: 1-based rank of the positive among the negatives, ties counted half; hit: 1 where rank <= hit_k (mode "ume_r1":
the share of the own group inside the top ``positives``); positive: s+; negative: neg; group_std: the group's unbiased
standard deviation of the reward; nan: 1 where the embedding, or the anchor it is scored against, is missing.
"""
STATE = 4  # numbers of a rollout's state before its ranks (csrc/rime/reward.h)
PLANES = ("reward", "advantage", *TERM_NAMES)  # what is computed, in the order of the kernels


@dataclass(frozen=True)
class RewardWeights:
    """Weights and switches of the reward R and of the advantage.

        score = w_rank f(rank) (s+ - neg)
        R     = w_fmt [format ok] + score + w_refine (s+ - cos(d, a+)) - w_len max(0, length - L0) / L0
        A     = (R - mean of the group) / (std of the group + eps)

    The score's shape, the refine and length terms and every default are this project's reconstruction, not the RIME
    authors' published setting; ``RewardWeights.ume_r1`` gives the reward that the UME-R1 paper describes.

    mode: "anchor" (one positive anchor per item, the formula above) or "ume_r1" (the item's own group of ``positives``
        consecutive anchors: score = w_rank (share of them inside the top ``positives``) (mean own - mean others)).
    rank_reward: f, one of "hit" (1 if rank <= hit_k else 0), "1/rank", "1/log2(1+rank)". Not used in mode "ume_r1".
    negative: neg, the "mean" of the negatives' similarities, their "softmax"-weighted mean at temperature
        ``softmax_temperature``, or their "max". Mode "ume_r1" always takes the mean. Without negatives neg is 0.
    length_limit: L0, in the unit of ``lengths`` (tokens).
    normalize_std: divide by the group's unbiased standard deviation plus ``eps``. A group of one has no standard
        deviation: it counts as 0 there, and the advantage is 0.

    Raises ValueError or TypeError for a value outside these.
    """

    w_fmt: float = 1.0
    w_rank: float = 1.0
    w_refine: float = 1.0
    w_len: float = 0.1
    mode: str = "anchor"
    positives: int = 1
    rank_reward: str = "1/log2(1+rank)"
    hit_k: int = 1
    negative: str = "mean"
    softmax_temperature: float = 0.5
    length_limit: float = 128.0
    normalize_std: bool = True
    eps: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("w_fmt", "w_rank", "w_refine", "w_len"):
            check_number(f"RewardWeights.{name}", getattr(self, name))
        for name in ("softmax_temperature", "length_limit", "eps"):
            check_positive(f"RewardWeights.{name}", getattr(self, name))
        for name, allowed in (("mode", MODES), ("rank_reward", RANK_REWARDS), ("negative", NEGATIVES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"RewardWeights.{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("positives", "hit_k"):
            check_int(f"RewardWeights.{name}", getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"RewardWeights.{name}: expected at least 1, got {getattr(self, name)}")
        check_flag("RewardWeights.normalize_std", self.normalize_std)
        if self.mode == "anchor" and self.positives != 1:
            raise ValueError(f"RewardWeights.positives: mode 'anchor' has one positive, got {self.positives}")

    @classmethod
    def ume_r1(cls, group_size: int, w_fmt: float = 1.0) -> RewardWeights:
        """Make UME-R1's reward (arXiv 2511.00405): anchors are the ``group_size`` generated embeddings per item of the
        other side, laid out group by group, and ``positive`` points at the first of the item's own group."""
        return cls(w_fmt=w_fmt, w_refine=0.0, w_len=0.0, mode="ume_r1", positives=group_size)

    @property
    def negative_code(self) -> int:
        """The index into ``NEGATIVES`` of the kind that is computed, as the kernels take it."""
        return 0 if self.mode == "ume_r1" else NEGATIVES.index(self.negative)

    @property
    def tau(self) -> float:
        """Give ``softmax_temperature`` as the kernels take it: it and its inverse are normal fp32 numbers. Beyond these
        the softmax is the max, or the mean, already."""
        return min(max(self.softmax_temperature, 2.0**-126), 2.0**126)

    def encode(self) -> list[float]:
        """Write all fields as numbers (choices as their index), the form that passes through an operator's schema."""
        return [
            self.w_fmt,
            self.w_rank,
            self.w_refine,
            self.w_len,
            MODES.index(self.mode),
            self.positives,
            RANK_REWARDS.index(self.rank_reward),
            self.hit_k,
            NEGATIVES.index(self.negative),
            self.softmax_temperature,
            self.length_limit,
            self.normalize_std,
            self.eps,
        ]

    @classmethod
    @lru_cache(maxsize=64)
    def decode(cls, numbers: tuple[float, ...]) -> RewardWeights:
        """Read what ``encode`` wrote."""
        w_fmt, w_rank, w_refine, w_len, mode, positives, rank, hit_k, negative, tau, limit, std, eps = numbers
        return cls(
            w_fmt,
            w_rank,
            w_refine,
            w_len,
            MODES[int(mode)],
            int(positives),
            RANK_REWARDS[int(rank)],
            int(hit_k),
            NEGATIVES[int(negative)],
            tau,
            limit,
            bool(std),
            eps,
        )
