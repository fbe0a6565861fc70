"""Published checkpoints name their weights the old way; a dual-mode model must find every one of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_checkpoint_loads_whole_and_comes_back_whole(family, tmp_path):
    """stock -> disk -> dual -> disk -> stock: the same tensors, the same names on disk."""
    stock = tiny_model(family, vocab_size=96)
    stock.save_pretrained(tmp_path / "stock")
    dual = DualModeModel.from_pretrained(tmp_path / "stock")
    dual.save_pretrained(tmp_path / "dual")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "dual")
    for name, value in stock.state_dict().items():
        assert torch.equal(value, dual.state_dict()[name]), name
        assert torch.equal(value, again.state_dict()[name]), name
    on_disk = load_file(tmp_path / "dual" / "model.safetensors")
    assert on_disk.keys() <= dual.state_dict().keys()  # Trainer resumes by name
    dual.save_pretrained(tmp_path / "old", save_original_format=True)
    names = [set(load_file(tmp_path / one / "model.safetensors")) for one in ("stock", "old")]
    assert names[0] == names[1]
