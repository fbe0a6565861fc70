"""The rollout buffer: written in place, in parts, by decoding and scoring; the same memory step after step."""

from __future__ import annotations

import pytest
import torch

from rime_fast.engine.rollout import generate_rollouts
from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import tiny_model
from rime_fast.model.tiny_batch import tiny_batch

VOCAB = 96
MICRO = [[[3, ("image", 4, 6), 9], [12]], [[2, ("image", 4, 4), 5]]]
GROUP, CAP = 3, 10


@pytest.fixture(scope="module")
def model():
    return DualModeModel.from_model(tiny_model("qwen2_vl", vocab_size=VOCAB, seed=0, init_std=0.15)).eval()


def make(prompts=3, **more):
    sizes = {"prompts": prompts, "group_size": GROUP, "max_tokens": CAP, "hidden": 64, "device": "cpu", "pad_id": 1}
    return RolloutBuffer.make(**(sizes | more))


def pointers(buffer):
    return {name: tensor.data_ptr() for name, tensor in buffer._tensors().items()}


def decode(model, micro, seed, out=None, **more):
    batch = tiny_batch(model.config, MICRO[micro], seed=micro)
    options = {"gen_id": 20, "max_new_tokens": CAP, "group_size": GROUP, "stop_ids": [21, 22, 23, 24], "pad_id": 1}
    return generate_rollouts(model, batch, generator=torch.Generator().manual_seed(seed), out=out, **options | more)


def test_steps_write_the_same_memory(model):
    buffer = make()
    before = pointers(buffer)
    for step in range(2):
        for micro, part in enumerate([buffer.part(0, 2), buffer.part(2, 1)]):
            found = decode(model, micro, step, part)
            fresh = decode(model, micro, step)
            for name in ("tokens", "lengths", "logp", "gen_states", "finished", "disc_states"):
                assert torch.equal(getattr(found, name), getattr(fresh, name)), name
            assert found.tokens.data_ptr() == part.tokens.data_ptr()
            longest = found.tokens.shape[1]
            assert (part.tokens[:, longest:] == 1).all()
            assert part.responses() == [
                row[:n] for row, n in zip(fresh.tokens.tolist(), fresh.lengths.tolist(), strict=True)
            ]
        assert pointers(buffer) == before
        assert (buffer.lengths > 0).all()
        assert buffer.rewards.isnan().all()


def test_a_part_is_the_same_memory():
    buffer = make()
    part = buffer.part(1, 2)
    part.rewards.fill_(2.0)
    part.disc_states.fill_(3.0)
    assert buffer.rewards[:GROUP].isnan().all()
    assert (buffer.rewards[GROUP:] == 2).all()
    assert buffer.disc_states[:, 0].tolist() == [0, 3, 3]
    part.clear()
    assert buffer.rewards.isnan().all()
    assert buffer.disc_states.abs().sum() == 0


def test_a_saved_buffer_comes_back(tmp_path):
    buffer = make()
    draw = torch.Generator().manual_seed(0)
    for tensor in buffer._tensors().values():
        if tensor.is_floating_point():
            tensor.normal_(generator=draw)
        else:
            tensor.random_(0, 2, generator=draw)
    file = tmp_path / "runs" / "rollouts.safetensors"
    buffer.save(file)
    other = make()
    before = pointers(other)
    for found in (other.load(file), RolloutBuffer.from_file(file, "cpu")):
        assert found.group_size == GROUP
        for name, tensor in buffer._tensors().items():
            assert torch.equal(getattr(found, name), tensor), name
    assert pointers(other) == before
    with pytest.raises(ValueError, match=r"tokens has shape \[9, 10\]; expected \[9, 4\]"):
        make(max_tokens=4).load(file)
    with pytest.raises(ValueError, match="group_size is 3; expected 9"):
        make(prompts=1, group_size=9).load(file)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="max_tokens is 0"):
        make(max_tokens=0)
    with pytest.raises(ValueError, match="prompts 2 to 4 of a buffer of 3"):
        make().part(2, 2)
    for bad in ({"prompts": 2}, {"group_size": 2}, {"max_tokens": 9}, {"pad_id": 0}):
        with pytest.raises(ValueError, match="out has"):
            decode(model, 1, 0, make(**({"prompts": 1} | bad)))
