"""Rewards and advantages of generated rewrites against an anchor bank, written in place."""

from rime_fast.ops.reward.op import score_rewrites_
from rime_fast.ops.reward.weights import TERM_NAMES, RewardWeights

__all__ = ["TERM_NAMES", "RewardWeights", "score_rewrites_"]
