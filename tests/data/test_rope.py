"""Positions equal the family's own get_rope_index bit for bit, image, video and text in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLModel, Qwen2VLModel, Qwen3VLModel

from rime_fast.data.rope import FAMILIES, RopeIndexer
from rime_fast.model.tiny import tiny_model
from tests.data.builders import config

ITEM = st.one_of(
    st.integers(1, 5).map(lambda n: ("text", n)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda hw: ("image", (1, *hw))),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)).map(lambda g: ("video", g)),
)


def lay_out(sequences, family):
    """Token types with a text token around every image or video, as vision_start and vision_end stand."""
    kinds, lengths, images, videos = [], [], [], []
    for items in sequences:
        row = [0]
        for kind, value in items:
            if kind == "text":
                row += [0] * value
                continue
            t, h, w = value
            (images if kind == "image" else videos).append([t, 2 * h, 2 * w])
            code = 1 if kind == "image" else 2
            steps = [h * w] * t if family == "qwen3_vl" else [t * h * w]
            for count in steps:
                row += [0, *[code] * count, 0]
        kinds += row
        lengths.append(len(row))
    tensors = [torch.tensor(grids) if grids else None for grids in (images, videos)]
    return torch.tensor(kinds), lengths, *tensors


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(ITEM, max_size=5), min_size=1, max_size=4), st.floats(0.05, 3))
def test_fast_equals_stock(family, sequences, seconds):
    rope = RopeIndexer(config(family))
    kinds, lengths, images, videos = lay_out(sequences, family)
    spans = None if videos is None else [seconds * (1 + i) for i in range(len(videos))]
    expected = rope.stock(kinds, lengths, images, videos, spans)
    assert torch.equal(rope.fast(kinds, lengths, images, videos, spans), expected)
    assert torch.equal(rope(kinds, lengths, images, videos, spans), expected)
    unspaced = (kinds, lengths, images, videos, None)
    assert torch.equal(rope.fast(*unspaced), rope.stock(*unspaced))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_is_the_models_own_method(family):
    """The unbound call equals the method of a real model on a padded batch with an attention mask."""
    model = tiny_model(family, vocab_size=64).model
    assert isinstance(model, (Qwen2VLModel, Qwen2_5_VLModel, Qwen3VLModel))
    items = [[("text", 3), ("image", (1, 2, 3)), ("video", (3, 1, 2)), ("text", 2)], [("image", (1, 1, 2))]]
    kinds, lengths, images, videos = lay_out(items, family)
    width = max(lengths)
    padded = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(kinds.split(lengths)):
        padded[i, : len(row)], mask[i, : len(row)] = row, 1
    extra = {"second_per_grid_ts": torch.tensor([0.8])} if family == "qwen2_5_vl" else {}
    positions, _ = model.get_rope_index(padded, padded, images, videos, attention_mask=mask, **extra)
    expected = torch.cat([positions[:, i, :n] for i, n in enumerate(lengths)], dim=1)
    rope = RopeIndexer(model.config)
    assert torch.equal(rope.stock(kinds, lengths, images, videos, [0.8]), expected)
    assert torch.equal(rope(kinds, lengths, images, videos, [0.8]), expected)


def test_text_alone_counts_up_in_each_sequence():
    positions = RopeIndexer(config())(torch.zeros(5, dtype=torch.long), [2, 3])
    assert positions.tolist() == [[0, 1, 0, 1, 2]] * 3
    assert positions.is_contiguous()


def test_other_transformers_versions_are_noticed(monkeypatch):
    rope = RopeIndexer(config())
    monkeypatch.setattr("rime_fast.data.rope._VERIFIED", {})
    truth = rope.stock
    monkeypatch.setattr(RopeIndexer, "stock", lambda self, *a: truth(*a) + 1)
    kinds, lengths, images, videos = lay_out([[("image", (1, 2, 2))]], "qwen2_vl")
    with pytest.warns(UserWarning, match="its own, slower get_rope_index"):
        assert torch.equal(rope(kinds, lengths, images, videos), truth(kinds, lengths, images, videos, None) + 1)


def test_errors():
    rope = RopeIndexer(config())
    with pytest.raises(ValueError, match="4 image tokens; expected 6"):
        rope(torch.tensor([0, 1, 1, 1, 1, 0]), [6], torch.tensor([[1, 4, 6]]))
    with pytest.raises(ValueError, match="lengths add up to 5"):
        rope(torch.tensor([0, 1, 1, 1, 1, 0]), [5], torch.tensor([[1, 4, 4]]))
    text_only = config().get_text_config()
    with pytest.raises(ValueError, match="model_type"):
        RopeIndexer(text_only)
