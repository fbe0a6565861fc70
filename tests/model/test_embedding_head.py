"""Heads on a frozen backbone: equal to it at the start, of one sequence whatever is beside it, saved with the model."""

from __future__ import annotations

import os

import pytest
import torch

from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.embedding_head import HeadSpec
from rime_fast.model.state_cache import StateCache, sequence_keys
from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.tiny_batch import tiny_batch

SEQUENCES = [[3, ("image", 4, 6), 9], [12], [2, ("image", 4, 4), 2, ("image", 8, 4), 14]]
NAMES = ["self:2", "qformer:3x2", "attention:4", "latent:5"]


def model_of(family="qwen2_vl", head=None):
    model = DualModeModel.from_model(tiny_model(family, seed=0, hidden=32, layers=3, init_std=0.1)).eval()
    if head is not None:
        torch.manual_seed(1)
        model.attach_head(head)
    return model


def batch_of(model, sequences=SEQUENCES):
    batch = tiny_batch(model.config, sequences, scored=0.0)
    unused = ("targets", "disc_index", "token_weight")
    return {key: value for key, value in batch.items() if key not in unused}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_self_head_begins_as_the_backbone(family, layers):
    model = model_of(family)
    if layers == 3 and family == "qwen3_vl":
        with pytest.raises(ValueError, match="adds to the first 2 layers of 3"):
            model.attach_head("self:3")
        layers = 1
    batch = batch_of(model)
    wanted = model(**batch).embeddings["gen"]
    model.attach_head(f"self:{layers}")
    assert torch.equal(model(**batch).embeddings["gen"], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_is_read_alone_and_only_the_head_is_trained(name):
    model = model_of(head=name)
    batch = batch_of(model)
    rows = model(**batch).embeddings["gen"]
    assert rows.shape == (3, 32)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    text = {"input_ids", "lengths", "position_ids", "mm_token_type_ids", "gen_index"}
    alone = {key: value for key, value in batch_of(model, [[12]]).items() if key in text}
    start, stop = batch["lengths"][0], sum(batch["lengths"][:2])
    alone["input_ids"] = batch["input_ids"][start:stop]
    alone["position_ids"] = batch["position_ids"][:, start:stop]
    torch.testing.assert_close(model(**alone).embeddings["gen"][0], rows[1], rtol=1e-5, atol=1e-5)
    rows.square().sum().backward()
    rows = model(**batch).embeddings["gen"]
    rows[:, 0].sum().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"embedding_head"}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_and_loaded_with_the_model(name, tmp_path):
    model = model_of(head=name)
    batch = batch_of(model)
    model.save_pretrained(tmp_path)
    loaded = DualModeModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.config.embedding_head == name
    assert not list(tmp_path.glob("*.bin"))
    assert torch.equal(loaded(**batch).embeddings["gen"], model(**batch).embeddings["gen"])


@pytest.mark.parametrize("name", NAMES)
def test_states_from_disk_give_the_same_gradients(name, tmp_path):
    model = model_of(head=name)
    batch = batch_of(model)

    def gradients():
        model.zero_grad()
        loss = model(**batch).embeddings["gen"][:, :3].sum()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.embedding_head.parameters() if p.grad is not None)]

    wanted = gradients()
    kept, mine = tmp_path / "kept", tmp_path / "mine"
    model.state_cache = StateCache(kept, "a model")
    mine.write_text("mine")
    links = [kept / f"{key}.{os.getpid()}" for key in sequence_keys(batch, "a model")]
    for link in links:  # no name of a file that is being written can be told beforehand
        link.symlink_to(mine)
    for _ in range(2):
        assert all(map(torch.equal, gradients(), wanted))
    assert mine.read_text() == "mine"
    assert len(list(kept.glob("*.safetensors"))) == 3
    assert len(list(kept.iterdir())) == 3 + len(links)
    hidden = model.encode_hidden
    model.encode_hidden = lambda **_: pytest.fail("the backbone was run")
    assert all(map(torch.equal, gradients(), wanted))
    model.encode_hidden = hidden


def test_a_sequence_is_kept_under_all_that_it_is_made_from():
    batch = batch_of(model_of())
    keys = sequence_keys(batch, "a model")
    assert len(set(keys)) == 3
    assert keys != sequence_keys(batch, "another model")
    batch["pixel_values"][-1] += 1
    assert [a == b for a, b in zip(keys, sequence_keys(batch, "a model"), strict=True)] == [True, True, False]
    batch["input_ids"][0] += 1
    assert sequence_keys(batch, "a model")[0] != keys[0]


@pytest.mark.parametrize("name", ["self", "self:0", "self:4", "qformer:8", "qformer:8x4", "mlp:3", "latent:x"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="head is"):
        HeadSpec.parse(name, 3)
