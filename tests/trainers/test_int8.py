"""Int8 by a learned step: trained with widths and the gradient cache, saved, embedded, searched, evaluated."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from rime_fast.cli import main
from rime_fast.eval.index import EmbeddingIndex
from rime_fast.recipe.int8 import fake_int8, first_step, to_int8
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.temperature import Int8Step
from tests.trainers.test_cached_step import assert_same, trained

CPU = torch.device("cpu")


@pytest.mark.parametrize("off", [8.0, 1 / 20])
def test_a_bad_step_is_learnt_away(off):
    """From far too coarse and far too fine to where int8 loses the least."""
    rows = torch.nn.functional.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    step = Int8Step(32, CPU, first_step(32) * off)
    step.learning_rate = 0.05

    def lost() -> torch.Tensor:
        return (1 - (fake_int8(rows, step.value()) * rows).sum(1)).mean()

    begin = float(lost().detach())
    for _ in range(600):
        lost().backward()
        step.step(1.0)
    assert float(lost().detach()) < min(begin / 50, 3e-4)


def test_it_is_trained_beside_widths_saved_and_used(tiny, tmp_path, capsys):
    settings = {"matryoshka_dims": [16], "int8_weight": 0.5, "max_steps": 30, "learning_rate": 1e-2}
    settings |= {"lr_scheduler_type": "constant"}
    run = trained(tiny, tmp_path / "run", negatives=0, **settings)
    logs = run.state.log_history[:-1]
    assert logs[0]["int8_step"] == pytest.approx(first_step(32))
    assert len({log["int8_step"] for log in logs}) == 30
    ours = sum(logs[0][f"contrast/all@{at}"] * w for at, w in ((16, 1), (32, 1), ("int8", 0.5)))
    assert logs[0]["loss"] == pytest.approx(logs[0]["ce/query"] + logs[0]["ce/target"] + ours, rel=1e-5)
    # learnt by heart: in fp32 and, at both widths, in int8 every pair finds its own, which the first step did not
    cells = [f"hit@1/{name}{width}" for name in ("gen-gen", "gen-disc") for width in ("", "@16")]
    assert {logs[-1][cell] for cell in cells} | {logs[-1][f"{cell}@int8"] for cell in cells} == {1.0}
    assert min(logs[0][f"{cell}@int8"] for cell in cells) < 0.6

    run.save_model(str(tmp_path / "model"))
    step = AutoConfig.from_pretrained(tmp_path / "model").int8_step
    assert step == run.int8.value().item() != logs[-1]["int8_step"]
    assert f"Step of int8 embeddings: {step}" in (tmp_path / "model" / "README.md").read_text()
    (tmp_path / "items.txt").write_text("a red shoe\na blue bird\nsix grey stones\n")
    found = {}
    for precision, more in (("float32", []), ("int8", []), ("int8", ["--dims", "16"])):
        words = ["embed", "--model", tmp_path / "model", "--data", tmp_path / "items.txt", "--precision", precision]
        out = tmp_path / f"{precision}{''.join(more)}"
        assert main([*map(str, words), "--output_dir", str(out), *more]) == 0
        found[out.name] = load_file(out / "embeddings.safetensors")["disc"]
    assert torch.equal(found["int8"], to_int8(found["float32"], step))
    assert torch.equal(found["int8--dims16"], found["int8"][:, :16])
    assert main(["index", str(tmp_path / "int8"), "--output_dir", str(tmp_path / "index")]) == 0
    scores, rows = EmbeddingIndex.load(tmp_path / "index").search(found["float32"], 1)
    assert rows.flatten().tolist() == [0, 1, 2]
    assert float(scores.min()) > 0.998

    (tmp_path / "set.json").write_text(
        json.dumps(
            {
                "candidates": [{"text": "a red shoe"}, {"text": "a blue bird"}],
                "queries": [{"query": {"text": "a red shoe"}, "correct": 0}],
            }
        )
    )
    words = ["eval", "--model", tmp_path / "model", "--data", tmp_path / "set.json", "--modes", "disc"]
    assert main([*map(str, words), "--dims", "16,int8,full", "--output_dir", str(tmp_path / "eval")]) == 0
    assert "disc-disc @ int8" in capsys.readouterr().out
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert report["phases"][0]["mutual"]["dims"]["int8"]["disc-disc"]["hit@1"] == 1.0


def test_cached_steps_equal_the_plain_step_and_without_it_nothing_changes(tiny, tmp_path, capsys):
    settings = {"int8_weight": 2.0, "max_steps": 1, "optim": "sgd", "learning_rate": 0.05}
    plain = trained(tiny, tmp_path / "plain", **settings)
    cached = trained(tiny, tmp_path / "cached", micro_batch_tokens=48, **settings)
    assert cached.parts[0] > 1
    assert_same(cached, plain)
    assert float(cached.int8.log.detach()) == pytest.approx(float(plain.int8.log.detach()), rel=1e-6)
    off = trained(tiny, tmp_path / "off", **(settings | {"int8_weight": 0.0}))
    assert off.int8 is None
    assert not hasattr(off.model.config, "int8_step")
    assert not [name for name in off.state.log_history[0] if "int8" in name]
    off.save_model(str(tmp_path / "off"))
    (tmp_path / "items.txt").write_text("a red shoe\n")
    words = ["embed", "--model", tmp_path / "off", "--data", tmp_path / "items.txt", "--precision", "int8"]
    assert main([*map(str, words), "--output_dir", str(tmp_path / "none")]) == 1
    assert "the model has no int8_step in its config" in capsys.readouterr().err


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="int8_weight is -1"):
        RimeConfig(output_dir=str(tmp_path), int8_weight=-1.0)
    with pytest.raises(ValueError, match="int8_weight with fp16=True"):
        RimeConfig(output_dir=str(tmp_path), int8_weight=1.0, fp16=True)
