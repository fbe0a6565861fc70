"""The LoRA options of ``rime-fast train``: what they make, that it merges exactly, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from rime_fast import RimeEmbedder, cli
from rime_fast.cli import training
from rime_fast.engine.anchor_bank import model_fingerprint
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tokens import add_embedding_tokens


@pytest.fixture
def work(tiny, tmp_path):
    processor = tiny.processor()
    model = tiny.model(processor)
    add_embedding_tokens(model, processor.tokenizer)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    rows = [
        {"query": {"text": f"red {i}", "rewrite": "red"}, "target": {"text": f"blue {i}", "rewrite": "blue"}}
        for i in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def train(work, *more, model="base") -> int:
    words = ["train", "--model", work / model, "--train_data", work / "pairs.jsonl", "--output_dir", work / "out"]
    words += ["--max_steps", 2, "--learning_rate", "1e-2", "--save_strategy", "no", "--progress", "none"]
    return cli.main([str(word) for word in (*words, "--report", "false", *more)])


@pytest.mark.parametrize(
    ("options", "facts", "names"),
    [
        (["--lora_dora", "true"], {"use_dora": True}, "lora_magnitude_vector"),
        (["--lora_rslora", "true"], {"use_rslora": True}, "lora_A"),
        (["--lora_modules_to_save", "embed_tokens"], {"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_an_adapter_trains_and_its_merged_model_is_the_same(work, options, facts, names):
    assert train(work, "--lora_rank", 2, "--lora_alpha", 8, *options) == 0
    config = json.loads((work / "out" / "adapter" / "adapter_config.json").read_text())
    assert config.items() >= facts.items()
    assert any(names in name for name in load_file(work / "out" / "adapter" / "adapter_model.safetensors"))
    merged = RimeEmbedder.from_pretrained(work / "out").encode("red 1")
    adapted = RimeEmbedder.from_pretrained(work / "out" / "adapter").encode("red 1")
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-6)
    assert (merged - RimeEmbedder.from_pretrained(work / "base").encode("red 1")).abs().max() > 1e-4


def test_an_idle_dora_is_the_model_it_stands_on(work):
    from peft import LoraConfig, get_peft_model

    model = DualModeModel.from_pretrained(work / "base")
    name = model_fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    assert model_fingerprint(adapted) == name


def test_what_does_not_go_together_is_named(work, capsys, monkeypatch):
    def fails(words, message):
        assert train(work, *words) == 2
        assert message in capsys.readouterr().err

    fails(["--lora_dora", "true"], "--lora_dora goes with --lora_rank")
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    fails(["--lora_rank", 2, "--lora_4bit", "true"], "--lora_4bit needs bitsandbytes; pip install bitsandbytes")


def test_qlora(work, capsys):
    pytest.importorskip("bitsandbytes")
    assert train(work, "--lora_rank", 2, "--lora_4bit", "true") == 0
    assert RimeEmbedder.from_pretrained(work / "out").encode("red 1").isfinite().all()


def test_an_adapter_on_an_adapter_is_read_as_both(work):
    """The folder of the second names the first as its base, not the first one's: nothing of a phase goes."""
    lora = ["--lora_rank", 2, "--lora_alpha", 8]
    assert train(work, *lora) == 0
    (work / "out").rename(work / "first")
    assert train(work, *lora, model="first/adapter") == 0
    merged = RimeEmbedder.from_pretrained(work / "out").encode("red 1")
    adapted = RimeEmbedder.from_pretrained(work / "out" / "adapter").encode("red 1")
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-6)
    assert f"Started from: {work / 'first' / 'adapter'}" in (work / "out" / "README.md").read_text()


def test_a_whole_model_is_trained_from_an_adapters_folder(work):
    assert train(work, "--lora_rank", 2) == 0
    (work / "out").rename(work / "first")
    assert train(work, model="first/adapter") == 0
    before, after = (load_file(work / name / "model.safetensors") for name in ("first", "out"))
    assert {name for name in after if not torch.equal(before[name], after[name])} >= {
        name for name in after if name.startswith("model.layers.") and name.endswith("weight")
    }
    assert all(p.requires_grad for p in DualModeModel.from_pretrained(work / "first" / "adapter").parameters())


def test_an_adapters_folder_keeps_what_the_models_config_would(work):
    """Widths and the step of int8, which embed, eval and export read there."""
    assert train(work, "--lora_rank", 2, "--matryoshka_dims", 8, "--int8_weight", 1) == 0
    trained = AutoConfig.from_pretrained(work / "out")
    read = DualModeModel.from_pretrained(work / "out" / "adapter").config
    for name in ("is_matryoshka", "matryoshka_dimensions", "int8_step"):
        assert getattr(read, name) == getattr(trained, name)
