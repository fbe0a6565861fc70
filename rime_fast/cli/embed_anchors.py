"""``rime-fast embed --anchors``: the anchor banks of a training set, for ``rime-fast refine --anchor_bank``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rime_fast.cli.loading import EmbedderOptions, load_embedder
from rime_fast.cli.options import UsageError

if TYPE_CHECKING:
    import torch

SIDES = {"query": ("query",), "target": ("target",), "both": ("query", "target")}


def embed_anchors(model: str, data: str, output_dir: str, anchors: str, loading: EmbedderOptions) -> int:
    """One bank a side: the discriminative embedding of that side of every pair of ``data``, in the file's order."""
    if anchors not in SIDES:
        raise UsageError(f"--anchors is {anchors!r}; expected {', '.join(SIDES)}")
    from rime_fast.cli.bars import bars
    from rime_fast.data.check import CheckRules
    from rime_fast.data.datasets import open_pairs
    from rime_fast.engine.anchor_bank import AnchorBank, model_fingerprint
    from rime_fast.engine.checkpoint import check_writable
    from rime_fast.trainers.anchors import bank_file, item_ids, set_fingerprint

    check_writable(output_dir)
    embedder = load_embedder(model, loading)
    rules = CheckRules(
        rewrites=False,
        max_length=loading.max_length,
        measure=embedder.collator.measure,
        max_pixels=loading.max_image_pixels,
    )
    pairs, _ = open_pairs(data, rules=rules, image_root=loading.image_root, allow_outside=loading.allow_outside)
    name = model_fingerprint(embedder.model)
    with bars() as progress:
        for side in SIDES[anchors]:
            ids = item_ids(pairs, side)

            def encode(batch: Sequence[int], side: str = side) -> torch.Tensor:
                rows = embedder.encode([getattr(pairs[i], side) for i in batch])
                progress(side, batch[-1] + 1, len(pairs))
                return rows

            path, indices = bank_file(output_dir, side), range(len(pairs))
            made: Any = AnchorBank.make(
                path,
                indices,
                encode,
                ids,
                model=name,
                data=set_fingerprint(ids, side, embedder.collator),
                side=side,
                batch_size=4096,
            )
            print(f"{side}: {made.total} x {made.anchors.shape[1]} fp32: {path}")
    print(f"use them by: rime-fast refine --model {model} --train_data {data} --anchor_bank {Path(output_dir)}")
    return 0
