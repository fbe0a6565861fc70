"""Widths in the trainers: trained in joint training, saved with the model, compared in Refine-RL."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from rime_fast.trainers.config import RefineConfig, RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from rime_fast.trainers.refine import RefineRLTrainer
from tests.trainers.test_cached_step import assert_same, trained

WIDTHS = {"matryoshka_dims": [8, 16], "matryoshka_weights": [0.5, 2.0, 1.0], "max_steps": 1}


def test_widths_are_trained_logged_and_saved(tiny, tmp_path):
    plain = trained(tiny, tmp_path / "plain", detach_disc_in_cross=True, **WIDTHS)
    log = plain.state.log_history[0]
    names = [f"{q}-{k}" for q in ("disc", "gen") for k in ("disc", "gen")]
    assert {f"hit@1/{name}@{width}" for name in names for width in (8, 16, 32)} <= set(log)
    ours = 0.5 * log["contrast/all@8"] + 2 * log["contrast/all@16"] + log["contrast/all@32"]
    assert log["loss"] == pytest.approx(log["ce/query"] + log["ce/target"] + ours, rel=1e-5)
    assert all(log[f"hit@1/{name}"] == log[f"hit@1/{name}@32"] for name in names)
    cached = trained(tiny, tmp_path / "cached", detach_disc_in_cross=True, micro_batch_tokens=48, **WIDTHS)
    assert cached.parts[0] > 1
    assert_same(cached, plain)
    plain.save_model(str(tmp_path / "saved"))
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert (config.is_matryoshka, config.matryoshka_dimensions) == (True, [8, 16, 32])
    assert "Matryoshka dimensions: [8, 16, 32]" in (tmp_path / "saved" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matryoshka_dims": [16, 8]}, r"matryoshka_dims is \[16, 8\]; expected ascending widths from 1"),
        ({"matryoshka_dims": [0, 8]}, "expected ascending widths from 1"),
        ({"matryoshka_dims": [8], "matryoshka_weights": [1.0, -1.0]}, "matryoshka_weights is -1.0"),
        ({"matryoshka_dims": [8], "matryoshka_weights": [1.0] * 3}, "matryoshka_weights has 3 numbers"),
        ({"matryoshka_dims": [8, 64]}, "matryoshka_dims has 64; the model's embeddings have 32"),
        ({"matryoshka_dims": [8], "matryoshka_weights": [1.0]}, r"has 1 numbers; expected 2, one for each of \[8"),
    ],
)
def test_bad_widths_are_named(tiny, tmp_path, settings, message):
    def made() -> RimeTrainer:
        args, processor = RimeConfig(output_dir=str(tmp_path), **settings), tiny.processor()
        return RimeTrainer(
            tiny.model(processor), args, tiny.pairs(2), processing_class=processor, template=tiny.template
        )

    with pytest.raises(ValueError, match=message):
        made()


@pytest.mark.parametrize("anchors", ["sft", "policy"])
def test_rewrites_and_anchors_are_compared_at_a_width(tiny, tmp_path, anchors):
    args = RefineConfig(
        output_dir=str(tmp_path),
        anchors=anchors,
        anchor_dims=8,
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        logging_steps=1,
        progress="none",
    )
    processor = tiny.processor()
    model = tiny.model(processor)
    run = RefineRLTrainer(model, args, tiny.pairs(3), processing_class=processor, template=tiny.template)
    run.train()
    assert {"entropy", "reward/total"} <= set(run.state.log_history[0])
    for bank in run.banks.values():
        assert bank.anchors.shape == (3, 8)
        torch.testing.assert_close(bank.anchors.norm(dim=1), torch.ones(3))
    args.anchor_dims = 64
    with pytest.raises(ValueError, match="anchor_dims is 64; the model's embeddings have 32"):
        RefineRLTrainer(model, args, tiny.pairs(3), processing_class=processor, template=tiny.template)
