"""Log-probabilities, entropy, loss and pooled embeddings from one pass over the hidden states."""

from rime_fast.ops.logprob_pool.op import LogprobPool, fused_linear_ce, fused_logprob_pool

__all__ = ["LogprobPool", "fused_linear_ce", "fused_logprob_pool"]
