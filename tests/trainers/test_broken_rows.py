"""Rows that break while training: an image with a sound head and cut data, left out and counted or named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from conftest import TEMPLATE, make_model, make_pairs, make_processor

from rime_fast.data.records import DataError
from rime_fast.engine import checkpoint
from rime_fast.trainers.config import RefineConfig, RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from rime_fast.trainers.refine import RefineRLTrainer
from tests.ranks import run_ranks

SHARED: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "progress": "none",
    "train_sampling_strategy": "sequential",
}
JOINT = {"temperature": 0.1}
REFINE = {"num_generations": 2, "max_completion_length": 4, "seed": 3}
BROKEN, NEXT = 3, 4  # rows, counted from 0


def files(folder: Path, side: str = "query") -> Path:
    """A JSONL of 8 rows whose images are files; ``sound.png`` beside it is what row BROKEN would be."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, pair in enumerate(make_pairs(8)):
        image = pair.query.images[0].resize((64, 64))
        image.save(folder / f"{i}.png")
        query, target = {"text": "which one", "rewrite": pair.query.rewrite}, {"text": pair.target.text}
        target["rewrite"] = pair.target.rewrite
        {"query": query, "target": target}[side]["image"] = f"{i}.png"
        rows.append({"query": query, "target": target, "id": f"p{i}"})
    shutil.copy(folder / f"{BROKEN}.png", folder / "sound.png")
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def cut(folder: Path) -> None:
    path = folder / f"{BROKEN}.png"
    path.write_bytes(path.read_bytes()[:-200])


def replaced(path: Path) -> Path:
    """The same set with another row in the place of the broken one."""
    lines = path.read_text().splitlines()
    lines[BROKEN] = lines[NEXT]
    other = path.with_name("replaced.jsonl")
    other.write_text("\n".join(lines) + "\n")
    return other


def trainer(folder: Path, data: Any, evaluation: Any = None, **settings: Any) -> Any:
    kind, config, own = (RimeTrainer, RimeConfig, JOINT)
    if "trained_sides" in settings:
        kind, config, own = (RefineRLTrainer, RefineConfig, REFINE)  # type: ignore[assignment]
    args = config(output_dir=str(folder), **(SHARED | own | {"on_bad_row": "skip"} | settings))
    processor = make_processor()
    torch.manual_seed(0)
    return kind(make_model(processor), args, data, evaluation, processing_class=processor, template=TEMPLATE)


def weights(run: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def counted(run: Any) -> float:
    return sum(entry.get("left_out_rows", 0.0) for entry in run.state.log_history)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grad cache": {"contrastive_batch_size": 4, "micro_batch_tokens": 40, "max_steps": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_pair_that_breaks_is_left_out_and_counted(tmp_path, case, capsys):
    path = files(tmp_path)
    wanted = trainer(tmp_path / "a", str(replaced(path)), **CASES[case])
    wanted.train()
    cut(tmp_path)
    run = trainer(tmp_path / "b", str(path), **CASES[case])  # the check reads the heads of images only
    assert run.bad_rows == 0
    run.train()
    assert torch.equal(weights(run), weights(wanted))
    assert counted(run) == 1
    told = capsys.readouterr().err
    assert told.count(f"left out, and another row taken in its place: {path}, row {BROKEN + 1}: side") == 1
    assert "broken image" in told


@pytest.mark.parametrize(
    "settings", [{"trained_sides": "both"}, {"trained_sides": "query", "num_iterations": 2}], ids=str
)
def test_in_refine_rl_too(tmp_path, settings, capsys):
    path = files(tmp_path)
    cut(tmp_path)
    run = trainer(tmp_path / "run", str(path), max_steps=4, train_sampling_strategy="random", **settings)
    rows = watched(run)
    run.train()
    assert BROKEN not in rows
    assert len(rows) == 8
    assert counted(run) == rows.count(NEXT) - settings.get("num_iterations", 1) > 0
    assert f"{path}, row {BROKEN + 1}: side" in capsys.readouterr().err


def watched(run: Any) -> list[int]:
    """The rows that a trainer will take."""
    rows: list[int] = []
    step = run.step
    run.step = lambda model, inputs, scale: rows.extend(inputs["rows"]) or step(model, inputs, scale)
    return rows


def test_in_a_mixture_another_row_of_the_same_set_stands_there(tmp_path):
    files(tmp_path / "a"), files(tmp_path / "b")
    cut(tmp_path / "a")
    sets = [{"path": str(tmp_path / name / "rows.jsonl"), "name": name} for name in "ab"]
    run = trainer(tmp_path / "run", sets, block=2, per_device_train_batch_size=4, max_steps=4)
    seen = []
    step = run.step
    run.step = lambda model, inputs, scale: seen.append(inputs["sets"].tolist()) or step(model, inputs, scale)
    run.train()
    assert counted(run) >= 1
    assert all(sorted(rows.count(at) % 2 for at in (0, 1)) == [0, 0] for rows in seen)


@pytest.mark.parametrize("decoding", [False, True], ids=["undecoded by us", "decoded by its own transform"])
def test_through_datasets(tmp_path, decoding):
    datasets = pytest.importorskip("datasets")
    path = files(tmp_path)
    cut(tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    table = {
        "query": [{"text": "which one", "image": str(tmp_path / row["query"]["image"])} for row in rows],
        "target": [{"text": row["target"]["text"], "rewrite": row["target"]["rewrite"]} for row in rows],
    }
    features = datasets.Features(
        {
            "query": {"text": datasets.Value("string"), "image": datasets.Image()},
            "target": {"text": datasets.Value("string"), "rewrite": datasets.Value("string")},
        }
    )
    data = datasets.Dataset.from_dict(table, features=features)
    if decoding:
        data = data.with_transform(lambda rows: rows | {"query": [opened(q) for q in rows["query"]]})
    settings = {"ce_query_weight": 0.0, "ce_target_weight": 0.0, "gen_weight": 0.0, "cross_weight": 0.0}
    run = trainer(tmp_path / "run", data, check_data=False, **settings)
    run.train()
    assert counted(run) == 1


def opened(query: dict[str, Any]) -> dict[str, Any]:
    query["image"].load()
    return query


def test_rows_without_an_anchor_are_left_out(tmp_path):
    """Only queries are trained; the broken image is the target's, which the bank alone opens."""
    path = files(tmp_path, "target")
    cut(tmp_path)
    for number, resume in ((2, None), (4, True)):
        settings = {"trained_sides": "query", "save_strategy": "steps", "save_steps": 1, "max_steps": number}
        run = trainer(tmp_path / "run", str(path), **settings)
        rows = watched(run)
        run.train(resume_from_checkpoint=resume)
        assert BROKEN not in rows
        assert set(run.train_dataset.anchorless) == {BROKEN}
    bank = run.banks["train", "target"]
    assert torch.equal(bank.ids[BROKEN], bank.ids[NEXT])
    assert torch.equal(bank.anchors[BROKEN], bank.anchors[NEXT])


def test_where_no_row_is_good_the_run_ends(tmp_path):
    path = files(tmp_path)
    run = trainer(tmp_path / "run", str(path), max_steps=1)
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:-200])
    with pytest.raises(DataError, match="none of up to 100 rows after it is good"):
        run.train()


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1}, {"trained_sides": "query"}], ids=str)
def test_or_the_run_ends_with_file_row_and_a_checkpoint(tmp_path, settings):
    path = files(tmp_path)
    straight = trainer(tmp_path / "a", str(path), **settings)
    straight.train()
    cut(tmp_path)
    run = trainer(tmp_path / "b", str(path), on_bad_row="stop", **settings)
    with pytest.raises(DataError, match=r"rows.jsonl, row 4: .*broken image.*3.png(.|\n)*checkpoint: .*checkpoint-1"):
        run.train()
    assert checkpoint.newest(tmp_path / "b") == (tmp_path / "b" / "checkpoint-1", {})
    shutil.copy(tmp_path / "sound.png", tmp_path / f"{BROKEN}.png")
    again = trainer(tmp_path / "b", str(path), on_bad_row="stop", **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), weights(straight))


def test_in_evaluation_too(tmp_path):
    path = files(tmp_path)
    run = trainer(tmp_path / "run", str(path), on_bad_row="stop")
    skipping = trainer(tmp_path / "run2", str(path))
    cut(tmp_path)
    with pytest.raises(DataError, match=r"rows.jsonl, row 4: "):
        run.evaluate(run.train_dataset)
    assert skipping.evaluate(skipping.train_dataset)["eval_left_out_rows"] == 1


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1}, {"trained_sides": "query"}], ids=str)
def test_and_while_training_with_a_checkpoint(tmp_path, settings):
    sound, broken = files(tmp_path / "sound"), files(tmp_path / "broken")
    many = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    run = trainer(tmp_path / "run", str(sound), str(broken), on_bad_row="stop", **many, **settings)
    cut(tmp_path / "broken")
    wanted = r"row 4: .*broken image(.|\n)*\(found in the evaluation after step 2; checkpoint: .*checkpoint-2;"
    with pytest.raises(DataError, match=wanted):
        run.train()
    assert checkpoint.newest(tmp_path / "run") == (tmp_path / "run" / "checkpoint-2", {})
    again = trainer(tmp_path / "run", str(sound), str(broken), on_bad_row="skip", **many, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


# --- several ranks ---------------------------------------------------------------------------------------------------


def two_ranks(rank: int, world: int, folder: str) -> None:
    path = str(Path(folder, "rows.jsonl"))
    settings = {"ddp_backend": "gloo", "use_cpu": True, "max_steps": 2}
    for more in ({}, {"trained_sides": "both"}):
        run = trainer(Path(folder, f"skip{len(more)}"), path, **settings, **more)
        run.train()
        assert counted(run) == 1
        mine = weights(run)
        others = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(others, mine)
        assert torch.equal(others[0], others[1])
    run = trainer(Path(folder, "stop"), path, on_bad_row="stop", per_device_train_batch_size=1, **settings)
    with pytest.raises(DataError, match=r"rank 1: .*rows.jsonl, row 4: .*broken image(.|\n)*checkpoint-1"):
        run.train()
    assert checkpoint.fault(Path(folder, "stop", "checkpoint-1")) is None


@pytest.mark.dist
def test_all_ranks_agree(tmp_path):
    files(tmp_path)
    cut(tmp_path)
    run_ranks(two_ranks, 2, str(tmp_path))
