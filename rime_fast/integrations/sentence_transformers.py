"""sentence-transformers' cached in-batch-negatives loss on rime-fast's engine (needs sentence-transformers 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers.base.losses.gradcache import _minibatch_ranges
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor

from rime_fast.engine.grad_cache import Encoded, GradCache
from rime_fast.engine.wrappers import GradSync, grad_sync
from rime_fast.ops.contrastive import contrastive_loss

# What the operator computes: directions (and how they are normalised) -> contrastive_loss(symmetric=...)
_SYMMETRIC = {
    (frozenset({"query_to_doc"}), "joint"): False,
    (frozenset({"query_to_doc"}), "per_direction"): False,
    (frozenset({"query_to_doc", "doc_to_query"}), "per_direction"): True,
}
Range = tuple[int, int, int]  # column, begin, end


class FusedMultipleNegativesRankingLoss(CachedMultipleNegativesRankingLoss):
    """A loss to use in place of ``CachedMultipleNegativesRankingLoss``: the same arguments, loss and gradients.

    The mini-batches run through ``GradCache``: the last one is encoded once, and so are as many others as
    ``keep_bytes`` of graphs allow; under DDP gradients are exchanged once a step. The similarities run through
    ``contrastive_loss`` (no score matrix) for ``cos_sim`` and ``dot_score``, without hardness weighting, for the
    directions ("query_to_doc",), or with "doc_to_query" as well under partition_mode="per_direction"; for everything
    else that their class accepts, through its own loss, a mini-batch of rows of the score matrix at a time.

    keep_bytes: memory for kept graphs, per process (``math.inf``: all). The rest as in their class.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        *args: Any,
        keep_bytes: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, scale, similarity_fct, mini_batch_size, *args, **kwargs)
        self.keep_bytes = keep_bytes
        self._cache = GradCache(keep_bytes=keep_bytes, cost=lambda part: float(part[2] - part[1]))

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Compute the loss, 0-d; its ``backward`` runs the second pass. labels: unused, the
        positive is the diagonal."""
        features = list(sentence_features)
        if len(features) < 2:
            raise ValueError(f"sentence_features has {len(features)} columns; expected anchors and candidates")
        ranges = [_minibatch_ranges(f, self.mini_batch_size, self.mini_batch_num_tokens) for f in features]
        parts: list[Range] = [(i, a, b) for i, column in enumerate(ranges) for a, b in column]
        counts = [column[-1][1] for column in ranges]

        def encode(part: Range, scored: bool) -> Encoded:
            column, begin, end = part
            rows, _ = self.embed_minibatch(
                features[column], begin, end, with_grad=torch.is_grad_enabled(), copy_random_state=False
            )
            return Encoded({"rows": rows})

        def loss(rows: dict[str, Tensor]) -> Tensor:
            # with gradients it runs the backward itself and returns a number
            columns = [[column] for column in rows["rows"].split(counts)]
            return self.calculate_loss(columns, with_backward=rows["rows"].requires_grad)

        if not torch.is_grad_enabled():
            return loss({"rows": torch.cat([encode(part, False).embeddings["rows"] for part in parts])})
        self._cache.sync = self._sync()
        first = self._cache.first_pass(parts, encode=encode, loss=loss)
        value = first.loss.requires_grad_()

        def second(upstream: Tensor) -> None:
            # inside no_sync (accumulation) DDP's own flag is off
            synchronise = getattr(self._cache.sync.model, "require_backward_grad_sync", True)
            self._cache.second_pass(first, upstream=upstream, synchronise=synchronise)

        value.register_hook(second)
        return value

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the loss of anchors, positives and each column of negatives, given in parts; as in their class.

        with_backward: run its backward, and return the loss detached. What decorates this method (MatryoshkaLoss) or
        overrides it takes effect.
        """
        symmetric = _SYMMETRIC.get((frozenset(self.directions), self.partition_mode))
        weighted = self.hardness_mode is not None and self.hardness_strength > 0
        if symmetric is None or weighted or self.similarity_fct not in (cos_sim, dot_score):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        queries, keys = torch.cat(reps[0]), torch.cat([part for column in reps[1:] for part in column])
        if self.similarity_fct is cos_sim:
            queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
        loss = self._contrast(queries, keys, symmetric)
        if with_backward:
            loss.backward()
            return loss.detach()
        return loss

    def _contrast(self, queries: Tensor, keys: Tensor, symmetric: bool) -> Tensor:
        gathered = self.gather_across_devices and dist.is_initialized() and dist.get_world_size() > 1
        loss = contrastive_loss(
            {"rows": queries},
            {"rows": keys},
            terms=[("rows", "rows", 1.0)],
            temperature=1.0 / self.scale,
            symmetric=symmetric,
            group=dist.group.WORLD if gathered else None,
        ).loss
        if not gathered:
            return loss
        # ranks average gradients, the operator's are to be summed; the value stays that of the global batch
        world = dist.get_world_size()
        return loss * world - loss.detach() * (world - 1)

    def _sync(self) -> GradSync:
        """Made anew each step: their trainer swaps the wrapped model in."""
        return grad_sync(getattr(self.model, "_orig_mod", self.model))
