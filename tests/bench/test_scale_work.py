"""The counts of the scale model against what torch counts: parameters and FLOP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from benchmarks.scale import work
from benchmarks.scale.shapes import CHECKPOINTS, checkpoint_config, checkpoint_shape, shape_of
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import FAMILIES, tiny_config, tiny_model
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.ops.contrastive import contrastive_loss
from rime_fast.ops.logprob_pool import fused_linear_ce, fused_logprob_pool

CLASSES = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
# Billions of parameters by which the checkpoints are known (their model cards).
PUBLISHED = {
    "qwen2-vl-2b": 2.21,
    "qwen2-vl-7b": 8.29,
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "qwen3-vl-2b": 2.13,
    "qwen3-vl-8b": 8.77,
}


def counted(call: Callable[[], Any]) -> float:
    """FLOP of the matrix products in ``call``; attention as plain products, since torch has no count for the CPU's."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_of_the_checkpoints(name: str) -> None:
    config, shape = checkpoint_config(name), checkpoint_shape(name)
    with torch.device("meta"):
        model = CLASSES[config.model_type](config)
    model.tie_weights()
    sizes = {id(p): p.numel() for p in model.parameters()}
    visual = {key: p.numel() for key, p in model.model.visual.named_parameters()}
    merging = sum(n for key, n in visual.items() if key.startswith(("merger", "deepstack")))
    assert shape.vision.merging == merging
    assert shape.vision.trunk == sum(visual.values()) - merging
    assert shape.parameters == sum(sizes.values())
    assert shape.parameters / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_tiny_models(family: str, tied: bool) -> None:
    config = tiny_config(family, vocab_size=256, tie_word_embeddings=tied)
    model = CLASSES[family](config)
    assert shape_of(config).parameters == sum(p.numel() for p in model.parameters())


def test_an_unknown_family_is_refused() -> None:
    config = tiny_config("qwen2_vl", vocab_size=256)
    config.model_type = "llava"
    with pytest.raises(ValueError, match="model_type is 'llava'"):
        shape_of(config)
    with pytest.raises(ValueError, match="expected one of qwen2-vl-2b"):
        checkpoint_shape("qwen2-vl-3b")


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward(family: str) -> None:
    """What torch counts, to the product: everything is trained, images and text. What torch's count leaves out (norms,
    softmax, rotary embedding, activations) the model leaves out too."""
    model = DualModeModel.from_model(tiny_model(family, vocab_size=512, layers=3, vision_layers=3))
    config = model.config
    images, texts = 3, 40
    batch = tiny_batch(config, [[texts, ("image", 8, 8), texts]] * images)
    shape = shape_of(config)
    patches, length = 64 * images, batch["lengths"][0]
    # as torch counts attention without a causal kernel: whole squares
    scores = float(images * length**2)
    text = work.text_linear(shape.text, images * length) + work.text_attention(shape.text, scores)
    vision = work.vision_linear(shape.vision, patches) + work.vision_attention(shape.vision, [64] * images)
    vision += work.merging(shape.vision, patches)
    pools = {"disc": batch.pop("disc_index"), "gen": batch.pop("gen_index")}
    batch.pop("targets")
    total = torch.zeros(())

    def forward() -> None:
        nonlocal total
        total = sum(model(**batch, pools=pools).embeddings.values()).sum()

    assert counted(forward) == pytest.approx(text + vision, rel=1e-6)
    # The pixels need no gradient: one of the patch embedding's two backward products is not made.
    backward = 2 * (text + vision) - 2.0 * patches * shape.vision.width * shape.vision.volume
    assert counted(lambda: total.backward()) == pytest.approx(backward, rel=1e-6)


def test_causal_attention_is_half_a_square() -> None:
    assert work.causal_scores([1, 3]) == 1 + 6
    # a prompt of 2 with two rollouts of one row each: 1 + 2, then twice (2 + 1)
    assert work.shared_prefix_scores(2, 2, 1) == 9
    assert work.shared_prefix_scores(7, 1, 5) == work.causal_scores([12])


def products(call: Callable[[], Any]) -> float:
    """FLOP of the matrix products inside ``call``, those inside our operators too (where no dispatch mode can look)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    total = 0.0
    for event in profile.events():
        operands = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}.get(event.name)
        if operands is not None:
            (m, k), (_, n) = (event.input_shapes[i] for i in operands)
            total += 2.0 * m * k * n
        elif event.name == "mkldnn::_linear_pointwise":
            (m, k), (n, _) = event.input_shapes[:2]
            total += 2.0 * m * k * n
    return total


@pytest.mark.parametrize("kind", ["forward", "linear_ce", "recompute"])
def test_head_products(kind: str) -> None:
    text = shape_of(tiny_config("qwen2_vl", vocab_size=640, hidden=32)).text
    hidden, table = torch.randn(96, 32, requires_grad=True), torch.randn(640, 32, requires_grad=True)
    targets = torch.full((96,), -100)
    targets[16:64] = torch.arange(48)

    def call() -> None:
        if kind == "linear_ce":
            fused_linear_ce(hidden, table, targets, backend="chunked")[0].backward()
            return
        with torch.set_grad_enabled(kind == "recompute"):
            total = fused_logprob_pool(hidden, table, targets, backend="chunked").logp.sum()
        if kind == "recompute":
            total.backward()

    call()  # the first of a process also tries the product out
    assert products(call) == work.head(text, 48, kind)


def test_contrast_products() -> None:
    queries = {mode: torch.randn(60, 24, requires_grad=True) for mode in "ab"}
    keys = {mode: torch.randn(75, 24, requires_grad=True) for mode in "ab"}
    terms = [("a", "a", 1.0), ("b", "b", 1.0), ("a", "b", 0.5)]

    def call() -> None:
        contrastive_loss(queries, keys, terms=terms, temperature=0.5, backend="chunked").loss.backward()

    assert products(call) == work.contrast(60, 75, 24, 3)
