"""Pairs without rewrites, by our commands alone: rewrite by a small model, mine, train with blocks and negatives, eval.

The demo's scans; the small model has learned from other rows to begin a rewrite as the demo's vague teacher does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from rime_fast.cli import main
from rime_fast.data.digits import DigitChains, retrieval_set
from rime_fast.data.records import Side
from rime_fast.data.templates import get_template
from rime_fast.demo.task import fresh_model
from rime_fast.model.tiny import tiny_tokenizer

SMALL = ["--disc_weight", 0.05, "--gen_weight", 0.05, "--cross_weight", 0.05]
QUIET = ["--progress", "none", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"]


def side(made: Side, folder: Path, name: str, rewrite: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"text": made.text}
    if made.images:
        Image.fromarray(made.images[0]).save(folder / f"{name}.png")
        row["image"] = f"{name}.png"
    return row | ({"rewrite": made.rewrite} if rewrite else {})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("way")
    for name, size, rewrites in (("taught", 96, True), ("raw", 24, False)):
        chains = DigitChains("train", size, seed=len(name), vague=1.0)
        rows = [
            {
                "query": side(pair.query, root, f"{name}{i}", rewrites),
                "target": side(pair.target, root, f"{name}t{i}", rewrites),
                "dataset": "ab"[i % 2],
            }
            for i, pair in enumerate(chains)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = retrieval_set("val", 12, seed=0)
    queries = [
        {"query": side(query, root, f"q{i}", False), "correct": correct[0]}
        for i, (query, correct) in enumerate(zip(data.queries, data.correct, strict=True))
    ]
    candidates = [side(one, root, f"c{i}", False) for i, one in enumerate(data.candidates)]
    (root / "test.json").write_text(json.dumps({"name": "chains", "candidates": candidates, "queries": queries}))
    texts = [get_template("rewrite").instruction or "", "<rewrite>1 and so</rewrite>", *"0123456789", "+ - ×"]
    model, processor = fresh_model(tiny_tokenizer(texts), 0, patch_size=4, mrope_section=(0, 0, 16))
    model.save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    return root


def run(root: Path, *words: object) -> None:
    assert main([str(word).replace("@", f"{root}/") for word in words]) == 0


def test_from_raw_pairs_to_a_table(work: Path) -> None:
    batch = ["--per_device_train_batch_size", 16]
    run(work, "train", "--model", "@base", "--train_data", "@taught.jsonl", "--output_dir", "@teacher", *batch,
        "--max_steps", 30, "--learning_rate", "2e-3", "--warmup_steps", 5, *SMALL, *QUIET)  # fmt: skip
    run(work, "rewrite", "--data", "@raw.jsonl", "--model", "@teacher", "--output", "@rewritten.jsonl",
        "--max_tokens", 16, "--device", "cpu")  # fmt: skip
    report = json.loads((work / "rewritten.jsonl.report.json").read_text())
    assert report["rows"] == 24
    assert report["accepted"] == report["unique_sides"]
    run(work, "mine", "--data", "@rewritten.jsonl", "--model", "@teacher", "--output", "@mined.jsonl",
        "--negatives", 2, "--relative", 1, "--device", "cpu")  # fmt: skip
    mined = [json.loads(line) for line in (work / "mined.jsonl").read_text().splitlines()]
    assert any(len(row.get("negatives", [])) == 2 for row in mined)
    settings = {"train_data": [{"path": str(work / "mined.jsonl"), "name": "*"}], "block": 4}
    (work / "mixture.yaml").write_text(yaml.safe_dump(settings))
    run(work, "train", "--config", "@mixture.yaml", "--model", "@teacher", "--output_dir", "@trained",
        "--per_device_train_batch_size", 8, "--max_steps", 2, *QUIET)  # fmt: skip
    state = json.loads((work / "trained" / "trainer_state.json").read_text())
    assert {"set/a/rows", "set/b/rows"} <= state["log_history"][0].keys()
    run(work, "eval", "--model", "@trained", "--data", "@test.json", "--output_dir", "@eval",
        "--max_new_tokens", 16)  # fmt: skip
    (phase,) = json.loads((work / "eval" / "report.json").read_text())["phases"]
    assert set(phase["mutual"]["cells"]) == {"disc-disc", "disc-gen", "gen-disc", "gen-gen"}
