"""Think-Then-Embed by two models: one says what it thinks of an item, another embeds the item with it (TTE_s; with
traces that are data TTE_t)."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rime_fast.eval.embedder import Encoded, RimeEmbedder

if TYPE_CHECKING:
    from rime_fast.eval.embedder import Items


def given_rewrites(rewrites: list[str]) -> Encoded:
    """Take rewrites that nobody decodes in the form in which a reasoner's ``encode_items`` gives its own."""
    n = len(rewrites)
    return Encoded(torch.empty(n, 0), rewrites, [0] * n, [True] * n, [True] * n, 0.0)


def embed_thought(embedder: RimeEmbedder, items: Items, thought: Encoded) -> Encoded:
    """Embed items, mode gen, with what a reasoner said of them.

    thought: the reasoner's ``encode_items`` in mode gen, or ``given_rewrites``. Its rewrites and counts come back with
    ``embedder``'s embeddings and the seconds of both. Raises ValueError for another number of rewrites.
    """
    begin = time.perf_counter()
    rows = embedder.encode_rewritten(items, thought.rewrites or [])
    return replace(thought, embeddings=rows, seconds=thought.seconds + time.perf_counter() - begin)
