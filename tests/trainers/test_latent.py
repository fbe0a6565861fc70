"""Joint training with latent rewrites: its terms, its micro-batches, its adapters, and the embeddings afterwards."""

from __future__ import annotations

import math

import pytest
import torch

from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.model.tokens import latent_token_ids
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from tests.trainers.test_rime_trainer import trainer

MODES = ("disc", "gen", "latent")


def test_the_loss_is_the_sum_of_its_terms(tiny, tmp_path):
    """And its other contrasts are those of a run without latent tokens."""
    logs = []
    for latent_tokens in (3, 0):
        pairs = tiny.pairs(4, negatives=2)
        run = trainer(tiny, tmp_path, pairs, max_steps=1, learning_rate=0.0, latent_tokens=latent_tokens)
        run.train()
        logs.append(run.state.log_history[0])
    log, plain = logs
    assert {f"contrast/{q}-{k}" for q in MODES for k in MODES} <= set(log)
    total = sum(log[f"{name}/{side}"] for name in ("ce", "ce_latent") for side in ("query", "target"))
    total += sum(log[f"contrast/{q}-{k}"] * (1.0 if q == k else 0.5) for q in MODES for k in MODES)
    assert math.isclose(log["loss"], total, rel_tol=1e-5)
    for name in ("contrast/disc-disc", "contrast/gen-gen", "contrast/gen-disc"):
        assert log[name] == pytest.approx(plain[name], rel=1e-4), name


def test_micro_batches_change_no_gradient(tiny, tmp_path):
    """The gradient cache cuts sequences with their branches; images go with them."""
    gradients = []
    for tokens in (None, 400):
        run = trainer(tiny, tmp_path, tiny.pairs(3, negatives=1), latent_tokens=2, micro_batch_tokens=tokens)
        batch = run._prepare_inputs(run.data_collator(tiny.pairs(3, negatives=1)))
        run.step(run.model, batch, 1.0)
        gradients.append({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("lora", [False, True])
def test_it_trains_saves_and_embeds(tiny, tmp_path, lora):
    """The saved folder (an adapter's too) gives the trained model's latent embeddings, and decodes nothing."""
    processor = tiny.processor()
    base = tmp_path / "base"
    tiny.model(processor).save_pretrained(base)
    processor.save_pretrained(base)
    more = {}
    if lora:
        from peft import LoraConfig

        more = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")}
    args = RimeConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        latent_tokens=2,
        progress="none",
        save_strategy="no",
    )
    run = RimeTrainer(str(base), args, tiny.pairs(8), template=tiny.template, **more)
    ids = latent_token_ids(run.processing_class.tokenizer)
    inner = run.model.get_base_model() if lora else run.model
    before = inner.get_input_embeddings().weight[ids].detach().clone()
    run.train()
    items = [pair.query for pair in tiny.pairs(3)]
    direct = RimeEmbedder(run.model, run.processing_class, tiny.template).encode(items, mode="latent")
    run.save_model(tmp_path / "out")
    loaded = RimeEmbedder.from_pretrained(tmp_path / "out", template=tiny.template)
    rows = loaded.model.get_input_embeddings().weight[ids]
    assert not torch.allclose(rows, before, atol=1e-4)
    torch.testing.assert_close(loaded.encode(items, mode="latent"), direct, rtol=1e-4, atol=1e-5)
    assert (loaded.stats.decoded_tokens, loaded.stats.items["latent"]) == (0, 3)


def test_settings_are_checked(tiny, tmp_path):
    with pytest.raises(ValueError, match="latent_tokens is -1; expected a number >= 0"):
        RimeConfig(output_dir=str(tmp_path), latent_tokens=-1)
    with pytest.raises(ValueError, match="latent_weight is nan"):
        RimeConfig(output_dir=str(tmp_path), latent_weight=math.nan)
    weights = RimeConfig(output_dir=str(tmp_path)).weights()
    assert (weights.latent, weights.latent_ce, weights.modes()) == (0.0, 0.0, ("disc", "gen"))
    run = trainer(tiny, tmp_path)
    embedder = RimeEmbedder(run.model, run.processing_class, tiny.template)
    assert embedder.modes == ("disc", "gen")
    with pytest.raises(ValueError, match="no latent tokens; train it with latent_tokens"):
        embedder.encode("a", mode="latent")
