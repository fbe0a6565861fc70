"""What a step through the gradient cache costs beside the plain step: (1 + re-encoded share x forward share) at most.

    pytest benchmarks/bench_grad_cache.py

One dual-mode model, one batch of pairs with images: the plain step (one graph of everything, the floor), and the cache
with all graphs kept, half of them, and only the last. ``forward`` is pass 1 alone, which gives the forward's share.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rime_fast.bench.harness import FLOOR, compare
from rime_fast.engine.grad_cache import GradCache
from rime_fast.engine.grad_sync import GradSync
from rime_fast.engine.packed_encoder import PackedEncoder, part_tokens
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import tiny_model
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.ops.contrastive import contrastive_loss

TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]


def contrast(rows: dict[str, Tensor]) -> Tensor:
    n = rows["disc"].shape[0] // 2
    queries, keys = ({m: x[part] for m, x in rows.items()} for part in (slice(n), slice(n, None)))
    return contrastive_loss(queries, keys, terms=TERMS, temperature=0.02).loss


def steps(device: str, tiny: bool) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    pairs, size = (4, 32) if tiny else (32, 256) if device == "cpu" else (256, 1024)
    model = tiny_model(
        "qwen2_vl", vocab_size=512 if tiny else 8192, hidden=size, layers=2 if tiny else 6, heads=size // 16,
        kv_heads=size // 32, vision_hidden=size // 2, intermediate=3 * size,
    )  # fmt: skip
    model = DualModeModel.from_model(model).to(device).train()
    tower = model.model.visual
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("merger" in name)  # as in UME-R1's training
    sequences = [[20, ("image", 8, 8), 24]] * pairs + [[48]] * pairs
    batch = tiny_batch(model.config, sequences, scored=0.2)
    batch = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}
    batch["token_weight"] = torch.full(batch["targets"].shape, 1e-3, device=device)
    tokens = sum(batch["lengths"])

    def plain() -> None:
        out = model(**batch)
        (out.loss + contrast(out.embeddings)).backward()
        model.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    def cached(keep: float) -> Callable[[], None]:
        cache = GradCache(sync=GradSync(model), keep_bytes=keep, cost=part_tokens)

        def call() -> None:
            encoder = PackedEncoder(model, batch, -(-tokens // 8) + 48)
            done = cache.step(encoder.parts, encode=encoder, loss=lambda rows: contrast(encoder.in_order(rows)))
            call.share = 1 - done.kept / len(encoder.parts)  # type: ignore[attr-defined]
            model.zero_grad()

        # in bytes a token of graph, so that "half" is half of the parts beside the last
        if 0 < keep < math.inf:
            cache.keep_bytes, cache.bytes_per_cost = keep * tokens, 1.0
            cache._encode_kept = lambda encode, data, last: encode(data, True)  # type: ignore[method-assign]
        return call

    impls = {FLOOR: plain, "forward": forward, "ours, all kept": cached(math.inf), "ours, half kept": cached(0.45),
             "ours, last kept": cached(0.0)}  # fmt: skip
    return impls, {"pairs": pairs, "tokens": tokens, "hidden": size}


@pytest.mark.benchmark
def test_cached_step(results, device, tiny):
    impls, shape = steps(device, tiny)
    rows = compare(
        "grad_cache", "step", impls, shape=shape, device=device, rounds=1 if tiny else 9, results=results
    )  # fmt: skip
    plain, share = rows[FLOOR].median_ms, rows["forward"].median_ms / rows[FLOOR].median_ms
    for name, row in rows.items():
        if name.startswith("ours"):
            bound = 1 + impls[name].share * share  # type: ignore[attr-defined]
            row.note = f"bound {bound:.2f} (forward share {share:.2f}, re-encoded {impls[name].share:.2f})"
            print(f"{name}: {row.median_ms / plain:.3f} of the plain step, {row.note}; {row.peak_mib:.0f} MiB")
            assert tiny or row.median_ms / plain <= 1.1 * bound
