"""Checkpoints as transactions, and the guard against steps that are not finite."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from rime_fast.data.datasets import PairDataset, open_pairs
from rime_fast.data.mixture import MixtureDataset
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


def rewrite_manifest(folder, **parts):
    path = folder / checkpoint.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


DAMAGE = {
    "zeroed": (lambda folder: zero_half(folder / "model.bin"), "the bytes of model.bin are not those"),
    "cut": (lambda folder: os.truncate(folder / "model.bin", 10), "model.bin has 10 bytes, 7000 were written"),
    "missing": (lambda folder: (folder / "inner" / "state.json").unlink(), "inner/state.json is missing"),
    "no manifest": (lambda folder: (folder / checkpoint.MANIFEST).unlink(), "it has no manifest.json"),
    "other manifest": (lambda folder: rewrite_manifest(folder, files=[]), "manifest.json is damaged"),
    "half a manifest": (lambda folder: rewrite_manifest(folder, files={"model.bin": {}}), "manifest.json is damaged"),
    "empty manifest": (lambda folder: rewrite_manifest(folder, files={}), "manifest.json names no files"),
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


def test_the_newest_is_the_one_made_last(tmp_path):
    """A run that goes on from an older checkpoint leaves higher numbers behind; they are older, for rotation too."""
    second, fourth, sixth = (make(tmp_path, step) for step in (2, 4, 6))
    make(tmp_path, 4, "another branch")
    assert checkpoint.newest(tmp_path) == (fourth, {})
    assert checkpoint.checkpoints(tmp_path) == [second, sixth, fourth]
    third = tmp_path / checkpoint.PARTIAL / "checkpoint-3"
    third.mkdir(parents=True)
    (third / "model.bin").write_bytes(b"third")
    checkpoint.publish(third.parent, tmp_path / third.name, {}, limit=2, best=str(second))
    assert checkpoint.checkpoints(tmp_path) == [second, tmp_path / third.name]


def test_damaged_checkpoints_are_rotated_out_first(tmp_path):
    first, second = make(tmp_path, 1), make(tmp_path, 2)
    (second / checkpoint.MANIFEST).unlink()
    third = tmp_path / checkpoint.PARTIAL / "checkpoint-3"
    third.mkdir(parents=True)
    (third / "model.bin").write_bytes(b"third")
    checkpoint.publish(third.parent, tmp_path / third.name, {}, limit=2, best=None)
    assert checkpoint.checkpoints(tmp_path) == [first, tmp_path / third.name]


def test_another_run_is_not_mixed_into_a_used_folder(tmp_path):
    """Neither from another folder's checkpoint, nor by a fresh start where a finished run kept none."""
    own, other = tmp_path / "own", tmp_path / "other"
    start, held = make(other, 2), make(own, 3)
    for folder in (start, held):
        (folder / "trainer_state.json").write_text('{"global_step": 2}')
        (folder / checkpoint.MANIFEST).unlink()  # written without it: nothing to verify
    with pytest.raises(ValueError, match=r"own' holds a run \(checkpoint-3\); resume it .* set overwrite_output_dir"):
        checkpoint.choose(str(start), own, overwrite=False)
    assert checkpoint.choose(str(held), own, overwrite=False)[0] == str(held)
    assert checkpoint.choose(str(start), own, overwrite=True)[0] == str(start)
    assert checkpoint.checkpoints(own) == []
    (own / "model.safetensors").write_bytes(b"finished")
    with pytest.raises(ValueError, match=r"holds a run \(model.safetensors\); choose another folder"):
        checkpoint.choose("last", own, overwrite=False)
    found, lines = checkpoint.choose("last", own, overwrite=True)
    assert found is None
    assert "a fresh start" in lines[-1]


def test_nothing_whole_is_said_and_overwriting_starts_afresh(tmp_path):
    (make(tmp_path, 1) / "model.bin").unlink()
    with pytest.raises(ValueError, match=r"model.bin is missing; no checkpoint .* restore one, or set overwrite"):
        checkpoint.choose(True, tmp_path, overwrite=False)
    assert checkpoint.choose(True, tmp_path, overwrite=True)[0] is None
    assert checkpoint.checkpoints(tmp_path) == []


def test_what_an_interruption_left_is_cleared(tmp_path):
    """And a checkpoint that was about to be replaced has its name again."""
    folder = make(tmp_path, 1)
    partial = tmp_path / checkpoint.PARTIAL
    os.replace(folder, partial / "checkpoint-1.old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".checkpoint-7.gone").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".checkpoint-8.gone").mkdir()
    with pytest.raises(ValueError, match=r"holds a run \(checkpoint-1\)"):
        checkpoint.choose(None, tmp_path, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "elsewhere"]
    partial.write_text("a file")
    checkpoint.choose(None, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere"]


@pytest.mark.parametrize("name", ["global_step3/mp_rank_00_model_states.pt", "optimizer_0/.metadata", "latest"])
def test_pickles_of_another_folder_are_not_loaded_unasked(tmp_path, name):
    for folder in ("own/checkpoint-3", "foreign/checkpoint-3"):
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(b"pickle")
    (tmp_path / "own" / "checkpoint-4").symlink_to(tmp_path / "foreign" / "checkpoint-3")
    own = str(tmp_path / "own")
    checkpoint.check_trust(f"{own}/checkpoint-3", own)
    for folder in (tmp_path / "foreign" / "checkpoint-3", tmp_path / "own" / "checkpoint-4"):
        with pytest.raises(ValueError, match=rf"holds pickles, .*\({name}\): they run code .* trust_checkpoint"):
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
    assert checkpoint.data_facts(rows, rows=False) == own  # a list is the same twice

    class Made(list):
        source = type("Source", (), {"key": lambda self: None})()  # made on the fly

    made = checkpoint.data_facts(Made(rows), rows=False)
    assert made == {"data rows": 6} | dict.fromkeys(("data", "data files", "data digest"), checkpoint.UNKNOWN)
    assert checkpoint.differences({"a": 1, "b": (2,)}, json.loads('{"a": 3, "b": [2]}')) == {"a": "1 -> 3"}


def test_every_row_of_a_checked_set_counts():
    """Above the rows that are read whole, by what the check before step 1 saw of each."""
    rows = [Pair(Side(text=f"q{i}", rewrite="q"), Side(text="t", rewrite="t")) for i in range(2 * checkpoint.SAMPLED)]
    own = checkpoint.data_facts(open_pairs(rows)[0])
    for i in (0, 1, 513):
        other = [*rows[:i], replace(rows[i], target=Side(text="another", rewrite="t")), *rows[i + 1 :]]
        found = checkpoint.data_facts(open_pairs(other)[0])
        assert checkpoint.differences(own, found).keys() >= {"data digest"}
    assert checkpoint.data_facts(open_pairs(list(rows))[0]) == own


def test_the_shares_of_a_mixture_count():
    def facts(*weights: float, names=("a", "b")):
        parts = [PairDataset([Pair(Side(text=name), Side(text="t"))] * 3) for name in "ab"]
        return checkpoint.data_facts(MixtureDataset(parts, names, weights))

    own = facts(1, 1)
    assert own == facts(2, 2)
    assert checkpoint.differences(own, facts(1, 3)) == {
        "mixture.a.share": "0.5 -> 0.25",
        "mixture.b.share": "0.5 -> 0.75",
    }
    assert checkpoint.differences(own, facts(1, 1, names="ba")).keys() == {"mixture.a.place", "mixture.b.place"}


def test_pictures_under_the_same_path_are_told_apart(tmp_path):
    rows = [Pair(Side(text="q", images=[str(tmp_path / "0.png")]), Side(text="t"))]
    (tmp_path / "0.png").write_bytes(b"one")
    own = checkpoint.data_facts(rows)
    (tmp_path / "0.png").write_bytes(b"two")
    assert checkpoint.differences(own, checkpoint.data_facts(rows)).keys() == {"data files"}


def test_a_fact_that_one_run_does_not_know_is_named(tmp_path):
    """An older version's checkpoint lacks facts; one that this run lacks is a difference."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    facts = {"seed": 1, "data": "x", checkpoint.MAY_CHANGE: {"learning_rate": 1.0}}
    text = json.dumps({"format": checkpoint.FORMAT, "files": {}, "facts": facts})
    (folder / checkpoint.MANIFEST).write_text(text)
    now = facts | {"adapter": None, "data": checkpoint.UNKNOWN}
    assert checkpoint.compare(str(folder), now, False) == "not known of both runs, so not compared: adapter, data"
    with pytest.raises(ValueError, match="differs: seed 1 -> None"):
        checkpoint.compare(str(folder), {"data": "x"}, False)


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
