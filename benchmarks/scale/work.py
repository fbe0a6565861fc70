"""FLOP of each part of a step, a multiply-add counted as two.

Matrix products and attention are counted; norms, activations, rotary embedding, softmax and the optimizer's arithmetic
are not (their cost is memory traffic; together below 1 % of the FLOP at the published sizes).
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.scale.shapes import ModelShape, TextShape, VisionShape

# Products over the scored rows, 2 M H V each: of a forward alone, and of the two ways to score with gradients.
HEAD_PRODUCTS = {"forward": 1, "linear_ce": 3, "recompute": 4}


def causal_scores(lengths: Iterable[int]) -> float:
    """Query-key pairs of causal attention inside each sequence."""
    return sum(n * (n + 1) / 2 for n in lengths)


def shared_prefix_scores(prompt: int, rollouts: int, rows: int) -> float:
    """Of one prompt's rows and its rollouts' (``rows`` each), which see the prompt and themselves."""
    return prompt * (prompt + 1) / 2 + rollouts * (rows * prompt + rows * (rows + 1) / 2)


def text_linear(text: TextShape, tokens: float) -> float:
    """Forward of the language model's matrix products (the head apart)."""
    return 2.0 * tokens * text.layers * text.layer_matrix


def text_attention(text: TextShape, scores: float) -> float:
    """Forward of its attention over ``scores`` query-key pairs."""
    return 4.0 * scores * text.layers * text.query


def vision_linear(vision: VisionShape, patches: float) -> float:
    """Forward of the tower's matrix products without the mergers."""
    return 2.0 * patches * (vision.layers * vision.layer_matrix + vision.width * vision.volume)


def vision_attention(vision: VisionShape, images: Iterable[int]) -> float:
    """Forward of its attention; images: patches of each."""
    sizes = list(images)
    whole = sum(n * n for n in sizes)
    windows = sum(n * min(n, vision.window) for n in sizes)
    return 4.0 * vision.width * (vision.full * whole + (vision.layers - vision.full) * windows)


def merging(vision: VisionShape, patches: float) -> float:
    """Forward of all mergers."""
    return 2.0 * patches / vision.merge**2 * vision.mergers * vision.merger_matrix


def head(text: TextShape, scored: float, kind: str) -> float:
    """Scoring ``scored`` rows: kind "forward", "linear_ce" (with gradients) or "recompute" (forward and backward)."""
    return 2.0 * HEAD_PRODUCTS[kind] * scored * text.table


def contrast(queries: float, keys: float, width: int, terms: int) -> float:
    """Forward and backward of the contrastive loss: four products of [queries, keys] a term, symmetric or not."""
    return 8.0 * queries * keys * width * terms


def reward(rows: float, anchors: float, width: int) -> float:
    """The similarities of generated embeddings with the anchors."""
    return 2.0 * rows * anchors * width


def decode_token(shape: ModelShape, context: float) -> float:
    """One token of one rollout at ``context`` tokens, its logits included."""
    text = shape.text
    return text_linear(text, 1) + text_attention(text, context) + head(text, 1, "forward")
