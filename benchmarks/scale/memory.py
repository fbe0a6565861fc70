"""Bytes that one rank holds at the peak of a step, by what they are for.

Formulas follow the implementation; the ones of graphs, head and contrast are checked against measured bytes
(tests/bench/test_scale_memory.py). Not counted: the CUDA context, fragmentation, communication buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.network import Contrast
from benchmarks.scale.shapes import ModelShape, TextShape, VisionShape

HEAD, TILE = 2.5 * 2**30, 2**30  # what the head and the contrast allow themselves beside their results on 80 GB


@dataclass(frozen=True)
class Precision:
    """Bytes a parameter: weights, gradient, optimizer (AdamW's two moments, and a master copy of 16-bit weights).

    cast: a 16-bit copy beside fp32 weights. element: of an activation.
    """

    weights: int
    gradient: int
    optimizer: int
    cast: int
    element: int = 2


AUTOCAST = Precision(weights=4, gradient=4, optimizer=8, cast=2)  # DDP and FSDP2: fp32 weights, bf16 products
MASTER = Precision(weights=2, gradient=2, optimizer=12, cast=0)  # DeepSpeed: bf16 weights, fp32 master copy


def precision_of(strategy: str) -> Precision:
    """What the trainers use with each strategy when ``bf16=True``."""
    return MASTER if strategy.startswith("zero") else AUTOCAST


def states(shape: ModelShape, trained: float, strategy: str, gpus: int) -> dict[str, float]:
    """Weights, gradients, optimizer of one rank.

    FSDP2 holds one whole gradient: it is reduced once a step (engine/wrappers.py). FSDP2 and ZeRO-3 also hold the
    layer at work, the next one, and the embedding table, in 16 bits.
    """
    kind = precision_of(strategy)
    shard = 1 / gpus
    weights, gradient, optimizer = kind.weights * shape.parameters, kind.gradient * trained, kind.optimizer * trained
    whole = 2.0 * (2 * shape.text.layer + shape.text.table)
    if strategy == "ddp":
        return {"weights": weights + kind.cast * shape.parameters, "gradients": gradient, "optimizer": optimizer}
    if strategy == "fsdp2":
        return {"weights": weights * shard + whole, "gradients": gradient, "optimizer": optimizer * shard}
    if strategy == "zero3":
        return {"weights": weights * shard + whole, "gradients": gradient * shard, "optimizer": optimizer * shard}
    return {
        "weights": weights,
        "gradients": gradient * (shard if strategy == "zero2" else 1),
        "optimizer": optimizer * shard,
    }


def layer_graph(text: TextShape, element: int) -> float:
    """Bytes a token that one layer keeps for its backward.

    Each of the two norms: its input in fp32, the normalised rows, its output. Attention: q, k, v, output. MLP: gate,
    up, their activation and product. Norms of the heads (Qwen3-VL): input in fp32 and the normalised rows.
    """
    norms = 2 * (4 + 2 * element) * text.hidden
    attention = 2 * element * (text.query + text.key)
    heads = (4 + element) * (text.query + text.key) if text.head_norm else 0
    return norms + attention + heads + 4 * element * text.intermediate


def text_graph(text: TextShape, tokens: float, element: int = 2, checkpointing: bool = False) -> float:
    """Bytes of the language model's graph over ``tokens`` rows; with checkpointing the layers' inputs and one layer."""
    if checkpointing:
        return tokens * (text.layers * element * text.hidden + layer_graph(text, element))
    return tokens * text.layers * layer_graph(text, element)


def merging_graph(vision: VisionShape, patches: float, element: int = 2) -> float:
    """Bytes of the mergers' graph: their input (the frozen tower's features), the widened rows twice."""
    return 3 * element * vision.width * patches * vision.mergers


def features(vision: VisionShape, patches: float, element: int = 2) -> float:
    """What a frozen tower leaves for the second pass, in front of the mergers."""
    return element * vision.width * patches * vision.mergers


def head(text: TextShape, tokens: float, element: int = 2, workspace: float = HEAD) -> float:
    """Peak of scoring with gradients: the buffer of logits, the gradient of the rows and, in fp32, of the table."""
    table = (4 + (element if element < 4 else 0)) * text.table
    return workspace + element * tokens * text.hidden + table


def statistics(call: Contrast, gpus: int) -> float:
    """The contrast's softmax statistics: 40 bytes a term for every own row and every column (fp64 sums, fp32 maxima,
    and what the backward reads of both)."""
    return 40.0 * call.terms * (call.queries / gpus + call.keys)


def contrast(call: Contrast, gpus: int, workspace: float = TILE) -> float:
    """Peak beyond the rank's own embeddings: the keys of all ranks and their gradients, the own queries' gradients.

    Gathered keys are kept as they came and once more by mode; their gradients are packed once for the reduce-scatter.
    """
    own = call.queries / gpus * call.width * call.modes * 4 + statistics(call, gpus) + workspace
    if gpus == 1:
        return own + call.gradient_bytes
    return own + 2 * call.key_bytes + 2 * call.gradient_bytes


def ring_contrast(call: Contrast, gpus: int, workspace: float = TILE) -> float:
    """The same for a ring: a few blocks of keys and gradients instead of all, and the statistics of every key."""
    own = call.queries / gpus * call.width * call.modes * 4 + statistics(call, gpus) + workspace
    return own + (3 * call.key_bytes + 4 * call.gradient_bytes) / gpus


def kv_cache(text: TextShape, tokens: float, element: int = 2) -> float:
    """Keys and values of so many tokens, all layers."""
    return 2.0 * element * text.layers * text.key * tokens
