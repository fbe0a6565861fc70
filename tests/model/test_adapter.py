"""A LoRA's folder loads as the whole model: its base, the embedding tokens as in training, the adapter merged."""

from __future__ import annotations

import pytest
import torch

from rime_fast.model.adapter import is_adapter
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("room", [0, 64], ids=["table grows", "table has room"])
def test_an_adapters_folder_loads_merged(room, tmp_path):
    processor = tiny_processor(tiny_tokenizer(["red blue green"]))
    rows = len(processor.tokenizer) + room
    model = tiny_model("qwen2_vl", vocab_size=rows, hidden=32, layers=1)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = DualModeModel.from_pretrained(tmp_path / "base")
    ids = add_embedding_tokens(model, processor.tokenizer)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(model, config)
    trained.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(tmp_path / "base")
    loaded = DualModeModel.from_pretrained(tmp_path / "adapter")
    want = trained.merge_and_unload().state_dict()
    assert max(ids) < loaded.get_input_embeddings().weight.shape[0]
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-6, msg=name)


def test_an_adapter_without_a_base_is_an_error(tmp_path):
    peft.LoraConfig(r=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base model"):
        DualModeModel.from_pretrained(tmp_path)
