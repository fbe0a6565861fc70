"""Checkpoints as transactions, and the guard against steps that are not finite."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from rime_fast.data.records import Pair, Side
from rime_fast.engine import checkpoint
from rime_fast.engine.finite import FiniteGuard, all_finite


def make(run, step, text="weights"):
    partial = run / checkpoint.PARTIAL / f"checkpoint-{step}"
    (partial / "inner").mkdir(parents=True)
    (partial / "model.bin").write_bytes(text.encode() * 1000)
    (partial / "inner" / "state.json").write_text("{}")
    checkpoint.commit(partial, run / partial.name, {"seed": 1})
    return run / partial.name


def zero_half(path):
    path.write_bytes(b"\0" * (path.stat().st_size // 2) + path.read_bytes()[path.stat().st_size // 2 :])


DAMAGE = {
    "zeroed": (lambda folder: zero_half(folder / "model.bin"), "the bytes of model.bin are not those"),
    "cut": (lambda folder: os.truncate(folder / "model.bin", 10), "model.bin has 10 bytes, 7000 were written"),
    "missing": (lambda folder: (folder / "inner" / "state.json").unlink(), "inner/state.json is missing"),
    "no manifest": (lambda folder: (folder / checkpoint.MANIFEST).unlink(), "it has no manifest.json"),
    "bad manifest": (lambda folder: os.truncate(folder / checkpoint.MANIFEST, 20), "manifest.json is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_the_newest_whole_checkpoint_is_found_and_the_others_are_named(tmp_path, damage, message):
    first, second, tenth = (make(tmp_path, step) for step in (1, 2, 10))
    assert checkpoint.checkpoints(tmp_path) == [first, second, tenth]
    assert checkpoint.newest(tmp_path) == (tenth, {})
    assert checkpoint.read_manifest(tenth)["facts"] == {"seed": 1}
    damage(tenth)
    found, left_out = checkpoint.newest(tmp_path)
    assert found == second
    assert list(left_out) == [tenth]
    assert message in left_out[tenth]


def test_a_checkpoint_takes_the_place_of_one_of_its_name(tmp_path):
    make(tmp_path, 3, "old")
    folder = make(tmp_path, 3, "new")
    assert (folder / "model.bin").read_bytes().startswith(b"new")
    assert checkpoint.fault(folder) is None
    assert sorted(path.name for path in (tmp_path / checkpoint.PARTIAL).iterdir()) == []
    checkpoint.remove(folder)
    assert checkpoint.newest(tmp_path) == (None, {})


@pytest.mark.parametrize("name", ["global_step3/mp_rank_00_model_states.pt", "optimizer_0/.metadata"])
def test_pickles_of_another_folder_are_not_loaded_unasked(tmp_path, name):
    for folder in ("own/checkpoint-3", "foreign/checkpoint-3"):
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(b"pickle")
    (tmp_path / "own" / "checkpoint-4").symlink_to(tmp_path / "foreign" / "checkpoint-3")
    own = str(tmp_path / "own")
    checkpoint.check_trust(f"{own}/checkpoint-3", own)
    for folder in (tmp_path / "foreign" / "checkpoint-3", tmp_path / "own" / "checkpoint-4"):
        with pytest.raises(ValueError, match=rf"holds pickles \({name}\), which run code .* trust_checkpoint=True"):
            checkpoint.check_trust(str(folder), own)
    (tmp_path / "foreign" / "checkpoint-3" / name).unlink()
    checkpoint.check_trust(str(tmp_path / "foreign" / "checkpoint-3"), own)  # nothing to run there


def test_a_link_is_removed_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / checkpoint.PARTIAL).symlink_to(tmp_path / "elsewhere")
    checkpoint.remove(tmp_path / checkpoint.PARTIAL)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_data_is_known_by_its_rows_and_their_order():
    rows = [Pair(Side(text=f"q{i}", id=f"q{i}"), Side(text=f"t{i}", rewrite="a b")) for i in range(6)]
    own = checkpoint.data_facts(rows)
    assert own == checkpoint.data_facts([replace(row) for row in rows])
    for other in (rows[::-1], rows[:3], [*rows[:5], replace(rows[5], target=Side(text="t5", rewrite="b a"))]):
        assert checkpoint.differences(own, checkpoint.data_facts(other)).keys() >= {"data"}
    assert checkpoint.data_facts(rows, rows=False) == {"data rows": 6}
    assert checkpoint.differences({"a": 1, "b": (2,)}, json.loads('{"a": 3, "b": [2]}')) == {"a": "1 -> 3"}


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_step_leaves_weights_and_state_alone(fused):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    guard, told = FiniteGuard(torch.device("cpu")), []
    want = []
    for step, gradient in enumerate((1.0, float("nan"), float("inf"), 2.0)):
        weight.grad = torch.full((3,), gradient)
        guard.see(torch.tensor(1.0))
        bad = guard.step(weight.grad.norm(), optimizer, step)
        told.append(bad)
        if bad == step:
            weight.grad = None
        optimizer.step()
        want.append(weight.detach().clone())
    told.append(guard.settle())
    assert [bad for bad in told if bad is not None] == [1, 2]
    assert told.index(1) == (2 if fused else 1)  # a fused optimizer's host learns one step late
    assert torch.equal(want[0], want[1])
    assert torch.equal(want[1], want[2])
    assert float(optimizer.state[weight]["step"]) == 2.0
    plain = torch.nn.Parameter(torch.ones(3))
    other = torch.optim.AdamW([plain], lr=0.1, fused=fused)
    for gradient in (1.0, 2.0):
        plain.grad = torch.full((3,), gradient)
        other.step()
    assert torch.equal(plain, weight)


def test_a_bad_loss_is_a_bad_step():
    guard = FiniteGuard(torch.device("cpu"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    guard.see(torch.tensor(float("inf")))
    guard.see(torch.tensor(1.0))
    assert guard.step(torch.tensor(1.0), optimizer, "first") == "first"
    guard.see(torch.tensor(1.0))
    assert guard.step(1.0, optimizer, "second") is None


def test_all_finite_sees_every_element():
    good = [torch.ones(4), torch.zeros(2, 3, dtype=torch.bfloat16), torch.arange(3), torch.empty(0)]
    assert all_finite(good)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([*good, torch.tensor([1.0, bad, 2.0])])
