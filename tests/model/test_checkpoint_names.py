"""Published checkpoints name their weights the old way; a dual-mode model must find every one of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
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


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_that_lacks_weights_is_refused_by_name(tied, tmp_path):
    """Weights left at random values are an error; a tied head, which no checkpoint holds, is not."""
    tiny_model("qwen2_vl", vocab_size=96, tie_word_embeddings=tied).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    assert ("lm_head.weight" in whole) != tied
    model, info = DualModeModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, DualModeModel)
    assert not info["missing_keys"]
    lost = {name for name in whole if name == "lm_head.weight" or "layers.1.mlp.up_proj" in name}
    assert len(lost) == 2 - tied
    save_file({name: x for name, x in whole.items() if name not in lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of Qwen2VLFor.*: .*layers\.1\.mlp\.up_proj") as raised:
        DualModeModel.from_pretrained(tmp_path)
    assert ("lm_head.weight" in str(raised.value)) != tied
