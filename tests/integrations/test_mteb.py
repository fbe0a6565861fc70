"""The mteb encoder on mteb's own mock tasks for text and image, which need no data."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("mteb")

import mteb
from mteb.mocks.mock_run import get_compatible_mock_tasks
from mteb.results.task_result import TaskError
from mteb.types import PromptType

from rime_fast.cli import main
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.integrations.mteb import RimeMtebEncoder
from tests.eval.suites.test_command import model
from tests.eval.suites.test_run import tiny_embedder

SMALL = ("MockRetrievalTask", "MockAny2AnyRetrievalT2I", "MockZeroShotClassification")


@pytest.fixture(scope="module")
def encoder() -> RimeMtebEncoder:
    return RimeMtebEncoder(tiny_embedder(max_new_tokens=2), mode="disc")


@pytest.mark.slow
def test_every_mock_task_for_text_and_image(encoder):
    results = mteb.mock_run(encoder)
    assert results.all_passed, results.to_markdown()
    ran = [status for _, status in results.items() if status is not None]
    assert len(ran) >= 43
    assert not any(isinstance(status, TaskError) for status in ran), results.to_markdown()


def mock_tasks(encoder):
    return [task for task in get_compatible_mock_tasks(encoder) if task.metadata.name in SMALL]


@pytest.mark.parametrize("mode", ["disc", "gen"])
def test_mock_tasks_of_several_kinds(encoder, mode):
    one = encoder if mode == "disc" else RimeMtebEncoder(encoder.embedder, mode=mode)
    chosen = mock_tasks(one)
    assert len(chosen) == len(SMALL)
    results = mteb.evaluate(one, chosen, cache=None, show_progress_bar=False)
    assert len(results.task_results) == len(SMALL)
    assert all(np.isfinite(result.get_score()) for result in results.task_results)


__all__ = ["model"]  # a fixture


class Loader(list):
    dataset = None


def test_rows_are_the_embedders(encoder, monkeypatch):
    """In mteb's order, whatever its batches; a task's prompt before queries, not before documents."""
    monkeypatch.setattr("rime_fast.integrations.mteb.CHUNK", 2)
    task = next(task for task in mock_tasks(encoder) if task.metadata.name == "MockRetrievalTask")
    batches = Loader([{"text": ["a", "b <|im_end|>"]}, {"text": ["c"], "id": ["3"]}])
    how = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    rows = encoder.encode(batches, prompt_type=PromptType.document, **how)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, encoder.embedder.encode(["a", "b < |im_end|>", "c"]).numpy(), atol=1e-5)
    asked = encoder.encode(batches, prompt_type=PromptType.query, **how)
    prompt = encoder.get_instruction(task.metadata, PromptType.query)
    assert prompt
    np.testing.assert_allclose(asked[2], encoder.embedder.encode(f"{prompt} c").numpy()[0], atol=1e-5)
    frames = np.zeros((3, 3, 8, 8), dtype=np.uint8)
    assert encoder.encode(Loader([{"video": [frames], "text": ["x"]}]), **how).shape == (1, 64)


def test_wrong_arguments(encoder):
    with pytest.raises(ValueError, match="mode is 'both'"):
        RimeMtebEncoder(encoder.embedder, mode="both")
    with pytest.raises(ValueError, match="expected owner/model"):
        RimeMtebEncoder(encoder.embedder, name="mine")


def test_from_the_command_line(encoder, model, tmp_path, monkeypatch, capsys):
    chosen = mock_tasks(encoder)
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [one for one in chosen if one.metadata.name in tasks])
    words = ["eval", "--mteb", "MockRetrievalTask", "--model", model, "--output_dir", str(tmp_path), "--modes", "disc"]
    assert main([*words, "--device", "cpu"]) == 0
    assert "MockRetrievalTask" in capsys.readouterr().out
    assert "ndcg_at_10" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "mteb").rglob("MockRetrievalTask.json"))
    monkeypatch.undo()
    assert main([*words[:2], "NoSuchTask", *words[3:]]) == 2
    assert "NoSuchTask" in capsys.readouterr().err


def test_a_result_of_another_model_is_not_given_back(encoder, model, tmp_path, monkeypatch, capsys):
    """mteb keeps results by name and revision: folders may have one name, and a folder other weights."""
    chosen = mock_tasks(encoder)
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [one for one in chosen if one.metadata.name in tasks])
    asked = []
    monkeypatch.setattr(RimeEmbedder, "encode", lambda self, items, mode: asked.append(1) or torch.ones(len(items), 4))
    first, second = tmp_path / "a" / "final", tmp_path / "b" / "final"
    for folder, scale in ((first, 1.0), (second, 0.5)):
        shutil.copytree(model, folder)
        weights = load_file(folder / "model.safetensors")
        save_file(
            {name: scale * value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )

    def calls(*models, **more):
        words = [word for pair in more.items() for word in (f"--{pair[0]}", str(pair[1]))]
        words += ["--mteb", "MockRetrievalTask", "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
        before = len(asked)
        assert main(["eval", *words, "--model", *map(str, models)]) == 0
        return len(asked) - before

    once = calls(first, modes="disc")
    assert once > 0
    assert calls(first, second, modes="disc") == once
    assert calls(first, second, modes="disc") == 0
    assert calls(first, modes="gen", max_new_tokens=2) == once
    assert calls(first, modes="gen", max_new_tokens=3) == once
