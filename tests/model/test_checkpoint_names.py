"""Published checkpoints name their weights the old way; a dual-mode model must find every one of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import FAMILIES, tiny_model


def names(folder):
    return set(load_file(folder / "model.safetensors"))


def loads_everywhere(folder, expected):
    """Stock AutoModel, stock AutoModelForImageTextToText and ours find every weight of ``expected`` (a state dict)."""
    for loader in (AutoModel, AutoModelForImageTextToText, DualModeModel):
        model, info = loader.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        prefix = "model." if loader is AutoModel else ""
        found = {prefix + name: value for name, value in model.state_dict().items()}
        wanted = {name for name in expected if name.startswith(prefix) and not (prefix and name == "lm_head.weight")}
        assert found.keys() == wanted
        for name, value in found.items():
            assert torch.equal(value, expected[name]), (loader.__name__, name)


def save_as_0_1(model, folder):
    """What 0.1 left on disk: the modules' own names."""
    super(type(model).__mro__[1], model).save_pretrained(folder, save_original_format=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_checkpoint_loads_whole_and_comes_back_whole(family, tmp_path):
    """stock -> disk -> dual -> disk -> stock: the same tensors, the same names on disk."""
    stock = tiny_model(family, vocab_size=96)
    stock.save_pretrained(tmp_path / "stock")
    dual = DualModeModel.from_pretrained(tmp_path / "stock")
    dual.save_pretrained(tmp_path / "dual")
    DualModeModel.from_model(tiny_model(family, vocab_size=96)).save_pretrained(tmp_path / "in place")
    for folder in ("stock", "dual", "in place"):
        loads_everywhere(tmp_path / folder, stock.state_dict())
        assert names(tmp_path / folder) == names(tmp_path / "stock")
    fresh = DualModeModel.from_config(stock.config)
    assert fresh.load_state_dict(load_file(tmp_path / "dual" / "model.safetensors")) == ([], [])  # strict: none missing
    for name, value in stock.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_0_1_is_repaired_by_loading_and_saving(family, tied, tmp_path):
    stock = tiny_model(family, vocab_size=96, tie_word_embeddings=tied)
    stock.save_pretrained(tmp_path / "stock")
    save_as_0_1(DualModeModel.from_pretrained(tmp_path / "stock"), tmp_path / "old")
    assert "model.visual.patch_embed.proj.weight" in names(tmp_path / "old")
    assert (names(tmp_path / "old") == names(tmp_path / "stock")) == (family == "qwen3_vl")
    DualModeModel.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    loads_everywhere(tmp_path / "new", stock.state_dict())
    assert names(tmp_path / "new") == names(tmp_path / "stock")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_saves_what_stock_loads(family, tmp_path):
    peft = pytest.importorskip("peft")
    save_as_0_1(DualModeModel.from_model(tiny_model(family, vocab_size=96)), tmp_path / "base")
    model = DualModeModel.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj|.*visual.*qkv", init_lora_weights=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = peft.get_peft_model(model, config).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    state = merged.state_dict()
    changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert any("visual" in name for name in changed)
    assert any("language_model" in name for name in changed)
    loads_everywhere(tmp_path / "merged", state)


@pytest.mark.dist
@pytest.mark.parametrize("family", FAMILIES)
def test_names_do_not_depend_on_the_class_that_fsdp_makes(family, tmp_path):
    """fully_shard renames the class; transformers finds a family's names by the class."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    stock = tiny_model(family, vocab_size=96)
    stock.save_pretrained(tmp_path / "stock")
    whole = {name: value.clone() for name, value in stock.state_dict().items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(DualModeModel.from_model(stock), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        assert type(model).__name__.startswith("FSDP")
        gathered = {name: value for name, value in whole.items() if name != "lm_head.weight"}
        model.save_pretrained(tmp_path / "saved", state_dict=gathered)
    finally:
        dist.destroy_process_group()
    assert names(tmp_path / "saved") == names(tmp_path / "stock")
    loads_everywhere(tmp_path / "saved", whole)


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
