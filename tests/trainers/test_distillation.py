"""A teacher in joint training: scores that the rows hold, and a larger model's bank."""

from __future__ import annotations

import json

import pytest
import torch

from rime_fast import cli
from rime_fast.engine.teacher import TeacherRows
from rime_fast.model.tokens import add_embedding_tokens
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer
from tests.trainers.test_cached_step import QUIET, assert_same


def trainer(tiny, folder, pairs, **settings) -> RimeTrainer:
    args = RimeConfig(output_dir=str(folder), **(QUIET | {"distill_weight": 0.5, "max_steps": 1} | settings))
    processor = tiny.processor()
    return RimeTrainer(tiny.model(processor), args, pairs, processing_class=processor, template=tiny.template)


def scored_pairs(tiny):
    pairs = tiny.pairs(6, negatives=2)
    for i, pair in enumerate(pairs):
        pair.scores = None if i == 2 else [3.0, 1.0 - i, -1.0]
    return pairs


def test_stored_scores_join_the_loss(tiny, tmp_path):
    plain = trainer(tiny, tmp_path / "plain", scored_pairs(tiny), distill_temperature=2.0)
    plain.train()
    log = plain.state.log_history[0]
    terms = sum(weight * log[f"contrast/{q}-{k}"] for q, k, weight in plain.weights.pair_terms())
    terms += log["ce/query"] + log["ce/target"] + 0.5 * (log["distill/disc"] + log["distill/gen"])
    assert log["loss"] == pytest.approx(terms, rel=1e-5)
    assert log["distill/disc"] > 0
    cached = trainer(tiny, tmp_path / "cached", scored_pairs(tiny), distill_temperature=2.0, micro_batch_tokens=64)
    cached.train()
    assert_same(cached, plain)


def test_a_run_without_a_teacher_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="no row looked at has scores"):
        trainer(tiny, tmp_path, tiny.pairs(6)).train()
    with pytest.raises(ValueError, match="distill_weight is 0"):
        RimeConfig(output_dir=str(tmp_path), teacher_bank="bank")
    with pytest.raises(ValueError, match="distill_temperature is 0"):
        RimeConfig(output_dir=str(tmp_path), distill_temperature=0.0)


def test_a_larger_model_teaches_through_its_bank(tiny, tmp_path):
    """Written by ``embed --anchors`` from the set's file; the student finds its items by their hashes."""
    processor = tiny.processor()
    teacher = tiny.model(processor, hidden=64)
    add_embedding_tokens(teacher, processor.tokenizer)
    teacher.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    rows = [
        {"query": {"text": f"red {i}", "rewrite": "red"}, "target": {"text": f"blue {i}", "rewrite": "blue"}}
        for i in range(6)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["embed", "--model", tmp_path / "teacher", "--data", tmp_path / "pairs.jsonl", "--anchors", "both"]
    assert cli.main([str(word) for word in (*words, "--output_dir", tmp_path / "bank")]) == 0
    found = TeacherRows(tmp_path / "bank" / "anchors-query.safetensors", torch.device("cpu"))
    assert found.anchors.shape == (6, 64)
    with pytest.raises(ValueError, match="lacks a query of this batch"):
        found.of(torch.tensor([1, 2]))
    settings = {"teacher_bank": str(tmp_path / "bank"), "mask_false_negatives": False}
    run = trainer(tiny, tmp_path / "run", str(tmp_path / "pairs.jsonl"), **settings)
    run.train()
    log = run.state.log_history[0]
    assert log["distill/disc"] > 0
    terms = sum(weight * log[f"contrast/{q}-{k}"] for q, k, weight in run.weights.pair_terms())
    assert log["loss"] == pytest.approx(
        terms + log["ce/query"] + log["ce/target"] + 0.5 * (log["distill/disc"] + log["distill/gen"]), rel=1e-5
    )
    with pytest.raises(FileNotFoundError, match="no such anchor bank"):
        trainer(tiny, tmp_path / "other", tiny.pairs(6), teacher_bank=str(tmp_path / "none"))
