"""The flash-attention route, with a stand-in that keeps flash-attention's interface and runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.packing import PackedLayout
from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.tiny_batch import tiny_batch

MIXED = [[3, ("image", 4, 6), 8], [2, ("image", 4, 4), 3, ("image", 8, 4), 6], [4, ("video", 2, 4, 4), 9], [5]]
CALLS = []


def stand_in(module, query, key, value, attention_mask, **kwargs):
    """One packed row and its boundaries, as ``flash_attn_varlen_func`` sees them."""
    assert attention_mask is None
    bounds = kwargs["cu_seq_lens_q"]
    assert bounds.dtype == torch.int32
    assert torch.equal(bounds, kwargs["cu_seq_lens_k"])
    lengths = bounds.diff().tolist()
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(lengths)
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
    CALLS.append(causal)
    layout = PackedLayout(lengths, query.device, causal=causal)
    return layout.attention(module, query, key, value, scale=kwargs["scaling"], dropout=0.0), None


@pytest.mark.parametrize("family", FAMILIES)
def test_boundaries_reach_flash_attention(family):
    model = DualModeModel.from_model(tiny_model(family, init_std=0.12))
    batch = tiny_batch(model.config, MIXED, seed=1)
    expected = model(**batch)
    AttentionInterface.register("flash_stand_in", stand_in)
    for config in (model.model.language_model.config, model.model.visual.config):
        config._attn_implementation = "flash_stand_in"
    CALLS.clear()
    out = model(**batch)
    assert CALLS.count(True) == CALLS.count(False) == 2  # two layers of text, two of vision
    torch.testing.assert_close(out.logp, expected.logp)
    torch.testing.assert_close(out.embeddings["gen"], expected.embeddings["gen"])
