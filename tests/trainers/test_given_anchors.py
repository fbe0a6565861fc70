"""A bank made by ``rime-fast embed --anchors`` in the trainer, end to end."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rime_fast import cli
from rime_fast.model.tokens import add_embedding_tokens
from rime_fast.trainers.config import RefineConfig
from rime_fast.trainers.refine import RefineRLTrainer

QUIET = {
    "save_strategy": "no",
    "logging_steps": 1,
    "progress": "none",
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "max_completion_length": 4,
    "max_steps": 1,
}


@pytest.fixture
def work(tiny, tmp_path):
    """A model's folder, and a file of pairs with images."""
    processor = tiny.processor()
    model = tiny.model(processor)
    add_embedding_tokens(model, processor.tokenizer)
    model.save_pretrained(tmp_path / "sft")
    processor.save_pretrained(tmp_path / "sft")
    rows = []
    for i, pair in enumerate(tiny.pairs(5)):
        pair.query.images[0].save(tmp_path / f"{i}.png")
        rows.append(
            {
                "query": {"text": pair.query.text, "image": f"{i}.png", "id": f"q{i}"},
                "target": {"text": pair.target.text, "id": pair.target.id},
            }
        )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    return tmp_path


def embed(work, *more):
    words = ["embed", "--model", work / "sft", "--data", work / "pairs.jsonl", "--output_dir", work / "bank", *more]
    return cli.main([str(word) for word in words])


def trainer(work, name="run", data="pairs.jsonl", model="sft", more=None, **settings):
    args = RefineConfig(output_dir=str(work / name), **(QUIET | {"anchor_bank": str(work / "bank")} | settings))
    return RefineRLTrainer(str(work / model), args, str(work / data), **(more or {}))


def test_the_trainer_takes_the_bank(work, capsys):
    assert embed(work, "--anchors", "both") == 0
    assert "target: 5 x 32 fp32" in capsys.readouterr().out
    own = trainer(work, "own", anchor_bank=None)
    own.make_banks(own.model)
    for storage in ("device", "host"):
        run = trainer(work, bank_storage=storage)
        run.train()
        assert not (work / "run" / "anchors").exists()
        for key, bank in own.banks.items():
            torch.testing.assert_close(run.banks[key].anchors, bank.anchors, rtol=0, atol=1e-6)
            assert torch.equal(run.banks[key].ids, bank.ids)
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    run = trainer(
        work,
        more={"peft_config": lora},
        trained_sides="query",
        anchor_bank=str(work / "bank" / "anchors-target.safetensors"),
    )
    run.train()
    assert run.state.log_history[0]["ratio"] == 1.0


def test_a_bank_of_something_else_is_an_error(work):
    assert embed(work, "--anchors", "target") == 0
    with pytest.raises(FileNotFoundError, match=r"anchors-query.safetensors: no such anchor bank"):
        trainer(work).train()
    one = {"trained_sides": "query"}
    with pytest.raises(ValueError, match="stale anchor bank: its data fingerprint"):
        trainer(work, data="others.jsonl", **one).train()
    with pytest.raises(ValueError, match="stale anchor bank: its data fingerprint"):
        trainer(work, max_pixels=1024, **one).train()
    other = trainer(work, model="sft", **one)
    with torch.no_grad():
        next(other.model.parameters())[0].add_(0.1)
    with pytest.raises(ValueError, match="stale anchor bank: its model fingerprint"):
        other.train()
    shutil.copy(work / "bank" / "anchors-target.safetensors", work / "bank" / "anchors-query.safetensors")
    with pytest.raises(ValueError, match="stale anchor bank: its data fingerprint"):
        trainer(work).train()


def test_embeddings_are_cut_and_normalised_again(work, capsys):
    (work / "pairs.jsonl").write_text("".join(json.dumps({"text": f"red {i}"}) + "\n" for i in range(5)))
    assert embed(work, "--dims", 8) == 0
    assert "disc: 5 x 8 float32" in capsys.readouterr().out
    rows = load_file(work / "bank" / "embeddings.safetensors")["disc"]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    assert embed(work, "--dims", 33) == 1
    assert "dims is 33; expected 1 to 32, the model's hidden size" in capsys.readouterr().err


def test_bad_options_are_named(work, capsys):
    assert embed(work, "--anchors", "both", "--dims", 8) == 2
    assert "--dims goes without --anchors" in capsys.readouterr().err
    assert embed(work, "--anchors", "all") == 2
    assert "--anchors is 'all'; expected query, target, both" in capsys.readouterr().err
