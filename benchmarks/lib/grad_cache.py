"""What a step through the gradient cache costs beside the plain step: 1 + (share encoded twice) x (forward's share).

One dual-mode model and one batch of pairs, an image on one side. The floor is the plain step: one forward of the whole
batch, one loss, one backward. The cache runs it in micro-batches with all graphs kept, with half of them, and with the
last one only. ``forward`` is a whole forward without a graph: its time over the plain step's is the forward's share, of
the same run. All of them give the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rime_fast.bench.harness import FLOOR, Results, Row, compare, dtype_name
from rime_fast.engine.grad_cache import GradCache
from rime_fast.engine.packed_batch import PackedEncoder
from rime_fast.engine.wrappers import GradSync
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import tiny_model
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.ops.contrastive import contrastive_loss

BENCH = "grad_cache"
FORWARD = "forward"
TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]


@dataclass(frozen=True)
class Shape:
    """The model (random weights) and the batch.

    A micro-batch wants some 800 tokens on a CPU: below, its smaller matrix products take longer in themselves.
    """

    pairs: int
    micro_batches: int
    hidden: int
    layers: int
    vocab: int
    text: int  # tokens a side, a third of them scored
    image: int  # patches along an edge of the query's image
    freeze_vision: bool = True  # its trunk; the merger is trained, as in UME-R1

    def __str__(self) -> str:
        vision = "frozen" if self.freeze_vision else "trained"
        return f"n{self.pairs}-h{self.hidden}-l{self.layers}-vision-{vision}"


SHAPES = {
    "tiny": [Shape(4, 3, 32, 2, 256, 12, 4)],
    "cpu": [Shape(12, 4, 256, 3, 4096, 128, 8), Shape(12, 4, 256, 3, 4096, 128, 8, freeze_vision=False)],
    "cuda": [Shape(256, 16, 1024, 12, 32_768, 240, 16), Shape(256, 16, 1024, 12, 32_768, 240, 16, freeze_vision=False)],
}


class Share(GradCache):
    """Keeps this share of the micro-batches' graphs, in place of what fits into a budget of memory."""

    def __init__(self, share: float, sync: GradSync) -> None:
        super().__init__(sync=sync, keep_bytes=math.inf)
        self.share, self.kept = share, 0.0

    def _affordable(self, costs: list[float]) -> int:
        kept = max(1, round(self.share * len(costs)))
        self.kept = kept / len(costs)
        return kept


class Setting:
    """The model, its batch, and the steps to be timed."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        size = shape.hidden
        model: Any = tiny_model(
            "qwen2_vl",
            vocab_size=shape.vocab,
            hidden=size,
            layers=shape.layers,
            heads=max(2, size // 64),
            kv_heads=max(2, size // 128),
            vision_hidden=size // 2,
            vision_layers=max(2, shape.layers // 3),
            intermediate=3 * size,
            max_positions=1024,
            dtype=dtype,
        )
        DualModeModel.from_model(model)  # in place
        self.model: Any = model.to(device).train()
        for name, parameter in self.model.model.visual.named_parameters():
            parameter.requires_grad_("merger" in name or not shape.freeze_vision)
        image = ("image", shape.image, shape.image)
        sequences: list[list[Any]] = [[4, image, shape.text - 4] for _ in range(shape.pairs)]
        batch = tiny_batch(self.model.config, sequences + [[shape.text]] * shape.pairs, scored=1 / 3)
        self.batch = {
            key: (x.to(device, dtype) if x.is_floating_point() else x.to(device)) if isinstance(x, Tensor) else x
            for key, x in batch.items()
        }
        self.batch["token_weight"] = torch.full(batch["targets"].shape, 1e-3, device=device)
        self.batch["image_grids"] = batch["image_grid_thw"].tolist()
        self.batch["image_counts"] = [1] * shape.pairs + [0] * shape.pairs
        self.pairs, self.tokens = shape.pairs, sum(batch["lengths"])
        self.micro_tokens = -(-self.tokens // shape.micro_batches) + shape.text

    def contrast(self, rows: dict[str, Tensor]) -> Tensor:
        queries, keys = ({m: x[part] for m, x in rows.items()} for part in (slice(self.pairs), slice(self.pairs, None)))
        return contrastive_loss(queries, keys, terms=TERMS, temperature=0.02).loss

    def gradient(self) -> Tensor:
        """All gradients in one row, which are cleared."""
        row = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad()
        return row

    def plain(self) -> Tensor:
        """One graph of the whole batch."""
        out = self.model(**self.batch)
        (out.loss + self.contrast(out.embeddings)).backward()
        return self.gradient()

    @torch.no_grad()
    def forward(self) -> None:
        self.model(**self.batch)

    def cached(self, cache: GradCache) -> Tensor:
        encoder = PackedEncoder(self.model, self.batch, self.micro_tokens)
        cache.step(encoder.parts, encode=encoder, loss=lambda rows: self.contrast(encoder.in_order(rows)))
        return self.gradient()


def measure(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 7,
) -> dict[str, Row]:
    """Rows of the plain step, a forward, and the cache with each share kept; each of ours has its ``shape["bound"]``.

    error_fp64 is the relative difference of the whole gradient from the plain step's, in the same dtype.
    """
    s = Setting(shape, device, dtype)
    shares = {"all kept": 1.0, "half kept": 0.5, "last kept": 0.0}
    caches = {f"ours, {name}": Share(share, GradSync(s.model)) for name, share in shares.items()}
    steps: dict[str, Callable[[], Any]] = {FLOOR: s.plain, FORWARD: s.forward}
    steps |= {name: partial(s.cached, cache) for name, cache in caches.items()}
    sizes = {"pairs": s.pairs, "tokens": s.tokens, "hidden": shape.hidden, "dtype": dtype_name(dtype)}
    truth = s.plain().double()
    rows = compare(
        BENCH,
        str(shape),
        steps,
        shape=sizes,
        device=device,
        rounds=rounds,
        truth=dict.fromkeys(caches, truth),
        results=results,
        step=True,
    )
    share = rows[FORWARD].median_ms / rows[FLOOR].median_ms
    for name, cache in caches.items():
        bound = 1 + (1 - cache.kept) * share
        rows[name].shape |= {"bound": round(bound, 3)}
        rows[name].note = f"at most {bound:.2f} ({1 - cache.kept:.2f} encoded twice, forward {share:.2f} of a step)"
    return rows
