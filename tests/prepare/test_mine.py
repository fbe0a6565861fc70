"""``rime-fast mine``: against plain products, what is excluded, and ``kill -9``."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest

from rime_fast.data.templates import get_template
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens
from rime_fast.prepare.content import plain
from rime_fast.prepare.mine import mine_negatives
from rime_fast.prepare.mine_items import MineOptions

ROWS = [
    {"query": {"text": f"question {i // 2}"}, "target": {"text": f"answer {i % 37}"}, "dataset": "ab"[i // 2 % 2]}
    for i in range(600)
]
ROWS[3]["target"]["id"] = ROWS[8]["target"]["id"] = "same"
ROWS[5]["target"] = {"text": "  ANSWER   7 "}  # row 7's text
ROWS[9]["negatives"] = [{"text": "given"}]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    tokenizer = tiny_tokenizer([get_template("rewrite").instruction, "question answer given system user assistant"])
    model = tiny_model("qwen2_vl", tokenizer=tokenizer, hidden=32, vision_hidden=16, seed=3, init_std=0.15)
    add_embedding_tokens(model, tokenizer)
    model.save_pretrained(folder / "m")
    tiny_processor(tokenizer).save_pretrained(folder / "m")
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def test_negatives_are_those_of_plain_products(work):
    options = MineOptions(negatives=4, top_k=1000, relative=1.0)
    embedder = RimeEmbedder.from_pretrained(work / "m")
    report = mine_negatives(work / "p.jsonl", embedder, work / "o.jsonl", options)
    found = [json.loads(line) for line in (work / "o.jsonl").read_text().splitlines()]
    texts = sorted({side["text"] for row in ROWS for side in (row["query"], row["target"])} | {"given"})
    place = {text: i for i, text in enumerate(texts)}
    rows = embedder.encode(texts)
    same = {t: {plain(t)} for t in texts}
    for a, b in ((3, 8), (8, 3)):
        same[ROWS[a]["target"]["text"]] |= {plain(ROWS[b]["target"]["text"])}
    for row, made in zip(ROWS, found, strict=True):
        own, query = row.get("negatives", []), row["query"]["text"]
        inside = [r for r in ROWS if r["dataset"] == row["dataset"]]
        pool = {side["text"] for r in inside for side in (r["target"], *r.get("negatives", []))}
        banned = set().union(*(same[r["target"]["text"]] for r in inside if r["query"]["text"] == query))
        positive = float(rows[place[query]] @ rows[place[row["target"]["text"]]])
        left = [(float(rows[place[query]] @ rows[place[t]]), t) for t in pool if plain(t) not in banned]
        wanted = sorted((s for s, t in left if s < positive and {"text": t} not in own), reverse=True)[:4]
        negatives = made.get("negatives", [])
        assert negatives[: len(own)] == own
        assert len(negatives) == len(own) + len(wanted)
        assert not banned & {plain(one["text"]) for one in negatives}
        if negatives:
            assert made["mined_scores"][0] == pytest.approx(positive, abs=2e-5)
            assert made["mined_scores"][1 + len(own) :] == pytest.approx(wanted, abs=2e-5)
    assert report["rows"] == 600


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_in_the_same_bytes(work, kills):
    words = ["mine", "--data", work / "p.jsonl", "--model", work / "m", "--device", "cpu", "--relative", "1"]
    command = [sys.executable, "-m", "rime_fast.cli", *map(str, words), "--output"]
    whole, broken = work / f"whole{kills}.jsonl", work / f"broken{kills}.jsonl"
    began = time.monotonic()
    assert subprocess.run([*command, whole], capture_output=True).returncode == 0
    seconds = time.monotonic() - began
    rng = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen([*command, broken], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.5, 1.0) * seconds)
        process.kill()
        process.wait()
    assert subprocess.run([*command, broken], capture_output=True).returncode == 0
    for end in ("", ".report.json", ".suspects.jsonl"):
        first, second = (path.with_name(path.name + end).read_bytes() for path in (whole, broken))
        assert first == second
