"""A dual-mode model over a packed batch, cut into the gradient cache's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.engine.grad_cache import Encoded
from rime_fast.engine.micro_batch import Batch, PackedBatch, plan_micro_batches
from rime_fast.model.vision_cache import VisionCache

# metrics(output of the model, sequences of the part, its batch) -> name -> 0-d
PartMetrics = Callable[[Any, "Part", Batch], dict[str, Tensor]]


@dataclass
class Part:
    """One micro-batch: which sequences of the batch, their tokens together, the tower's features between the passes."""

    sequences: list[int]
    tokens: int
    vision: VisionCache

    def __copy__(self) -> Part:
        """The same sequences with features of its own."""
        return replace(self, vision=VisionCache(host=self.vision.host))


class PackedEncoder:
    """``encode`` and micro-batches for ``GradCache``, of one packed batch (rime_fast/data/collate.py).

        encoder = PackedEncoder(model, batch, max_tokens=16384)
        cache.step(encoder.parts, encode=encoder, loss=lambda rows: my_loss(encoder.in_order(rows)))

    model: a DualModeModel, wrapped or not. batch: with disc_index / gen_index; with targets AND token_weight the
        cross-entropy sum(w_t * -logp_t) is the micro-batches' own loss, scored in the graph pass only.
    max_tokens: of a micro-batch. modes: the embeddings to read out. metrics: see ``PartMetrics``; where it is scored.
    host_features: keep a frozen vision tower's features in host memory between the passes.
    """

    def __init__(
        self,
        model: Any,
        batch: Batch,
        max_tokens: int,
        *,
        modes: Sequence[str] = ("disc", "gen"),
        metrics: PartMetrics | None = None,
        merge_size: int = 2,
        host_features: bool = False,
        logprob_backend: str = "auto",
    ) -> None:
        self.model, self.modes, self.metrics = model, tuple(modes), metrics
        self.packed = PackedBatch(batch, merge_size)
        self.scored = batch.get("targets") is not None and batch.get("token_weight") is not None
        self.logprob_backend = logprob_backend
        lengths = self.packed.lengths
        groups = plan_micro_batches(lengths, max_tokens)
        self.parts = [Part(g, sum(lengths[i] for i in g), VisionCache(host=host_features)) for g in groups]
        places = torch.empty(len(lengths), dtype=torch.int64)
        places[torch.tensor([i for group in groups for i in group])] = torch.arange(len(lengths))
        self._places = places.to(batch["input_ids"].device, non_blocking=True)

    def __call__(self, part: Part, scored: bool) -> Encoded:
        """The part's embeddings, and with ``scored`` its cross-entropy."""
        batch = self.packed.take(part.sequences)
        pools = {mode: batch.pop(f"{mode}_index") for mode in ("disc", "gen") if f"{mode}_index" in batch}
        scoring: dict[str, Any] = {key: batch.pop(key) for key in ("targets", "token_weight") if key in batch}
        if scored and self.scored:
            batch |= scoring
        # A kept graph needs no features later: only a pass without graph fills the cache, only its repetition uses it.
        keep = not torch.is_grad_enabled() or part.vision.filled
        out = self.model(
            **batch,
            pools={mode: pools[mode] for mode in self.modes},
            vision_cache=part.vision if keep else None,
            normalize=False,
            logprob_backend=self.logprob_backend,
        )
        found = self.metrics(out, part, batch) if self.metrics is not None and out.loss is not None else {}
        # Here, not in the model: with scored tokens its operator normalises, without torch does, an ulp apart. So the
        # embeddings of both passes are the same bits.
        embeddings = {mode: F.normalize(rows, dim=-1) for mode, rows in out.embeddings.items()}
        return Encoded(embeddings, out.loss, found)

    def in_order(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings as ``GradCache`` concatenates them, back in the order of the batch's sequences."""
        return {name: x.index_select(0, self._places) for name, x in rows.items()}


def part_tokens(part: Part) -> float:
    """``GradCache``'s cost of a part."""
    return float(part.tokens)
