"""The FLOP of a step, against torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rime_fast.model.flops import StepFlops, peak_flops, recomputed
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from tests.trainers.conftest import TEMPLATE, make_model, make_pairs, make_processor


def trainer(folder, **settings):
    processor = make_processor()
    sizes = {"hidden": 64, "vision_hidden": 64}
    args = RimeConfig(
        output_dir=str(folder), max_steps=1, logging_steps=1, use_cpu=True, progress="none", save_strategy="no",
        per_device_train_batch_size=4, **settings,
    )  # fmt: skip
    model = make_model(processor, **sizes)
    return RimeTrainer(model, args, make_pairs(4), processing_class=processor, template=TEMPLATE)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_has_the_flop_that_torch_counts(tmp_path, frozen):
    """Of matrix products: torch's counter sees neither our operators nor attention on a CPU."""
    run = trainer(tmp_path, freeze_vision=frozen, ce_query_weight=0.0, ce_target_weight=0.0)
    batch = run.collator.collate_pairs([run.train_dataset[i] for i in range(4)])
    with FlopCounterMode(display=False) as counter:
        run.step(run.model, run._prepare_inputs(batch), 1.0)
    flops = StepFlops(run.model)
    whole = flops.of(batch)[0]
    flops.text, flops.vision = replace(flops.text, width=0), replace(flops.vision, width=0)
    needed, executed = flops.of(batch | {"prompt_lengths": batch["lengths"]})
    assert needed < whole < 1.5 * needed
    assert needed == executed
    assert needed == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_they_are_in_the_log(tmp_path):
    run = trainer(tmp_path, peak_tflops=1e-3)
    run.train()
    entry = run.state.log_history[0]
    assert 0 < entry["mfu"] == entry["hfu"]
    assert 0 < entry["data_wait"] < 1
    assert "mfu" not in run.state.log_history[-1]
    assert run.facts()["settings"]["recomputed towers"] == "none"


def test_what_is_computed_anew_counts_for_hfu_alone(tmp_path):
    run = trainer(tmp_path, gradient_checkpointing=True, freeze_vision=False)
    run.model.gradient_checkpointing_enable()
    run.model.train()
    assert recomputed(run.model) == "text, vision"
    batch = run.collator.collate_pairs([run.train_dataset[i] for i in range(4)])
    flops = StepFlops(run.model)
    needed, executed = flops.of(batch, towers="text, vision")
    plain = flops.of(batch)
    assert plain == (needed, needed)
    assert needed < executed < 1.5 * needed
    assert flops.of(batch, again=1.0)[1] > needed


def test_a_peak_is_known_or_given():
    assert peak_flops(torch.device("cpu")) is None
    with pytest.raises(ValueError, match="peak_tflops is 0"):
        RimeConfig(peak_tflops=0)
