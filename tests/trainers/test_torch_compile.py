"""torch_compile=True: the same training, one graph for all layers and lengths, nothing of it in what is saved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from rime_fast.model.compiled import KEPT, handle_of, layout_attention
from rime_fast.model.packing import packed_layout
from rime_fast.trainers import setup
from rime_fast.trainers.config import RefineConfig, RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from rime_fast.trainers.refine import RefineRLTrainer

SETTINGS = {
    "save_strategy": "no",
    "logging_steps": 1,
    "progress": "none",
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "temperature": 0.1,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def joint(tiny, folder, family="qwen2_vl", backend=None, **settings):
    if backend is not None:
        settings |= {"torch_compile": True, "torch_compile_backend": backend}
    processor = tiny.processor()
    args = RimeConfig(output_dir=str(folder), **(SETTINGS | settings))
    run = RimeTrainer(tiny.model(processor, family), args, tiny.pairs(16), processor=processor, template=tiny.template)
    run.train()
    run.save_model(folder)
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry], load_file(
        folder / "model.safetensors"
    )


def same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-4)
    assert found[1].keys() == wanted[1].keys()
    for name, weight in wanted[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_one_graph_serves_all_layers_and_lengths(family, tiny, tmp_path):
    """Four batches of other lengths each, queries with pictures and targets without: nothing breaks a layer's graph."""
    found = joint(tiny, tmp_path / "compiled", family, "aot_eager")
    assert not counters["graph_break"], counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 2, counters["stats"]
    same(found, joint(tiny, tmp_path / "eager", family))


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"contrastive_batch_size": 8}])
def test_with_recomputed_layers_and_the_gradient_cache(settings, tiny, tmp_path):
    found = joint(tiny, tmp_path / "compiled", backend="aot_eager", **settings)
    assert counters["stats"]["unique_graphs"] <= 4, counters["stats"]
    same(found, joint(tiny, tmp_path / "eager", **settings))


@pytest.mark.slow
def test_by_inductor(tiny, tmp_path):
    same(joint(tiny, tmp_path / "compiled", backend="inductor"), joint(tiny, tmp_path / "eager"))


def test_refine_decodes_as_written(tiny, tmp_path):
    """Rollouts run the layers as they are; policy and reference passes, with shared prompts, the compiled ones."""
    losses = []
    for more in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        processor = tiny.processor()
        args = RefineConfig(
            output_dir=str(tmp_path / str(len(more))),
            max_steps=2,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=6,
            save_strategy="no",
            logging_steps=1,
            progress="none",
            learning_rate=1e-3,
            **more,
        )
        model = tiny.model(processor)
        run = RefineRLTrainer(model, args, tiny.pairs(8), processor=processor, template=tiny.template)
        run.train()
        losses.append([entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry])
    assert not counters["graph_break"], counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 4, counters["stats"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_operator_is_attention():
    lengths = [5, 3, 9]
    layout = packed_layout(lengths, torch.device("cpu"))
    query = torch.randn(1, 4, 17, 8, requires_grad=True)
    key, value = (torch.randn(1, 2, 17, 8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(layout_attention, (query, key, value, handle_of(layout), 0.3, 0))
    found, _ = layout_attention(query, key, value, handle_of(layout), 0.3, 0)
    wanted = layout.attention(None, query, key, value, scale=0.3, dropout=0.0)
    slope = torch.randn_like(wanted)
    pairs = [torch.autograd.grad(out, (query, key, value), slope) for out in (found, wanted)]
    for got, want in ((found, wanted), *zip(*pairs, strict=True)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="a sequence of 9 tokens exceeds sliding_window 8"):
        layout_attention(query, key, value, handle_of(layout), 0.3, 8)
    first = handle_of(layout)
    for _ in range(KEPT):
        handle_of(layout)
    with pytest.raises(RuntimeError, match="between a forward and its backward"):
        layout_attention(query, key, value, first, 0.3, 0)


def test_what_no_graph_can_hold_is_refused(tiny, tmp_path, monkeypatch):
    def made(**settings):
        args = RimeConfig(output_dir=str(tmp_path), torch_compile=True, progress="none", **settings)
        processor = tiny.processor()
        RimeTrainer(tiny.model(processor), args, tiny.pairs(4), processor=processor, template=tiny.template)

    with pytest.raises(ValueError, match="torch_compile is set beside head"):
        made(head="self:1", freeze_backbone=True, objective="contrastive", template="tte")
    with monkeypatch.context() as patch:
        patch.setattr(setup, "resolve_attention", lambda _: "flash_attention_2")
        with pytest.raises(ValueError, match="set attn_implementation to 'sdpa'"):
            made()
    monkeypatch.setattr(RimeConfig, "hf_deepspeed_config", SimpleNamespace(is_zero3=lambda: True), raising=False)
    with pytest.raises(ValueError, match="ZeRO-3"):
        made()
