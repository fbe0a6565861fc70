"""What lies beside a saved model: a card and readable settings; push_to_hub through Trainer's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rime_fast.model.card import read_facts, write_card
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer


def trainer(tiny, folder, peft_config=None, **settings):
    processor = tiny.processor()
    args = RimeConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        use_cpu=True,
        progress="none",
        cross_weight=0.25,
        **settings,
    )
    return RimeTrainer(tiny.model(processor), args, tiny.pairs(4), processing_class=processor, peft_config=peft_config)


def header(folder):
    text = Path(folder, "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_every_saved_model_has_its_card(tiny, tmp_path):
    run = trainer(tiny, tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "final"):
        facts = read_facts(folder)
        assert facts["settings"]["cross_weight"] == 0.25
        assert facts["settings"]["learning_rate"] == 5e-5
        assert "SchedulerType" not in (folder / "README.md").read_text()
        assert facts["template"] == "rewrite"
        assert facts["step"] == 2
        assert list(facts["data"].values()) == [4]
        assert facts["results"]["loss"] > 0
        meta, text = header(folder)
        assert meta["library_name"] == "transformers"
        assert "| cross_weight | 0.25 |" in text


@pytest.mark.parametrize("lora", [False, True])
def test_the_command_pushes_what_it_wrote(lora, tiny, tmp_path, monkeypatch):
    """Trainer's own push, after the card, the state and (for a LoRA) the merged model are there."""
    from transformers import Trainer

    from rime_fast.cli.training import TrainingOptions, save_outputs

    pushed = {}

    def repository(self, **_):
        self.hub_model_id, self.push_in_progress = "me/model", None

    monkeypatch.setattr(Trainer, "init_hf_repo", repository)

    def upload(self, **given):
        pushed.update({path.name: path for path in Path(given["folder_path"]).iterdir()})

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: type("Api", (), {"upload_folder": upload})())
    config = None
    if lora:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    run = trainer(tiny, tmp_path, config, push_to_hub=True, hub_strategy="end")
    run.train()
    options = TrainingOptions(model="base", train_data=["x"], lora_rank=2 * lora, report=False)
    save_outputs(run, options, run.args, "Joint training")
    assert {"model.safetensors", "config.json", "README.md", "trainer_state.json", "processor_config.json"} <= set(
        pushed
    )
    assert "adapter_config.json" not in pushed
    assert (tmp_path / "adapter" / "adapter_config.json").is_file() == lora
    assert header(tmp_path)[0]["tags"][0] == "rime-fast"


def test_a_name_that_is_no_unicode_loses_no_card(tmp_path):
    """A set's name with half a surrogate, a path whose bytes are no UTF-8."""
    write_card(tmp_path, {"data": {"set \ud800": 3}, "settings": {"output_dir": "runs/\udcff"}})
    assert "set \\ud800" in header(tmp_path)[1]
    assert read_facts(tmp_path)["settings"]["output_dir"] == "runs/\udcff"
