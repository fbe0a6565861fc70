"""What a dual-mode forward returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class DualModeOutput(ModelOutput):
    """Read-outs of one causal pass over a packed batch of T rows and N sequences.

    loss: 0-d fp32, sum of token_weight * -logp; only where ``token_weight`` was given.
    logp [T] fp32: log-probability of ``targets`` at each row, 0 where ignored; only where ``targets`` was given.
    entropy [T] fp32: of the next-token distribution at the scored rows; only on request.
    embeddings: name -> [N, H] fp32, unit norm unless asked otherwise; a zero row where the index was -1.
    hidden [T, H]: last hidden states after the final norm; only where neither targets nor pools were given.
    """

    loss: Tensor | None = None
    logp: Tensor | None = None
    entropy: Tensor | None = None
    embeddings: dict[str, Tensor] | None = None
    hidden: Tensor | None = None
