"""The reranker of ``mine``: its logits against the whole head's, what its two bounds let pass, and pictures that are
equal."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from rime_fast.data.records import Side
from rime_fast.data.templates import get_template
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens
from rime_fast.prepare.mine import mine_negatives
from rime_fast.prepare.mine_items import MineOptions
from rime_fast.prepare.reranker import SYSTEM, Reranker


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank")
    words = [get_template("rewrite").instruction, "yes no question answer system user assistant", SYSTEM]
    tokenizer = tiny_tokenizer(words)
    for name, trained_here in (("reranker", False), ("m", True)):
        model = tiny_model("qwen2_vl", tokenizer=tokenizer, hidden=32, vision_hidden=16, seed=3, init_std=0.15)
        if trained_here:
            add_embedding_tokens(model, tokenizer)
        model.save_pretrained(folder / name)
        tiny_processor(tokenizer).save_pretrained(folder / name)
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue"), ("d", "green")):
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
    return folder


def pairs(folder, rows, name="p.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def mined(folder, rows, **options):
    source, output = pairs(folder, rows), folder / "o.jsonl"
    options = MineOptions(negatives=2, relative=1.0, overwrite=True, **options)
    report = mine_negatives(source, RimeEmbedder.from_pretrained(folder / "m", max_new_tokens=4), output, options)
    return report, [json.loads(line) for line in output.read_text().splitlines()]


ROWS = [{"query": {"text": f"question {i}"}, "target": {"text": f"answer {i}"}} for i in range(6)]


def test_logits_are_those_of_yes_less_no(work):
    reranker = Reranker.load(str(work / "reranker"), work / "kept")
    query, documents = Side("question"), [Side("answer yes"), Side("no answer at all")]
    tokenizer = reranker.chat.processor.tokenizer
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    found = reranker.logits(query, documents)
    for document, logit in zip(documents, found, strict=True):
        alone = reranker.logits(query, [document])
        prompt = reranker.chat.batch(SYSTEM, [contents(query, document)], 1)
        whole = reranker.chat.model(prompt["input_ids"][None]).logits[0, -1].log_softmax(0)
        assert logit == pytest.approx(float(whole[yes] - whole[no]), abs=1e-5)
        assert alone[0] == pytest.approx(logit, abs=1e-5)


def contents(query, document):
    from rime_fast.prepare.reranker import INSTRUCT

    before, between = f"<Instruct>: {INSTRUCT}\n<Query>:", "\n<Document>:"
    return [("text", before), *query.parts, ("text", between), *document.parts]


@pytest.mark.parametrize(("bounds", "expected"), [((0.0, 1.0), 2), ((0.0, -1.0), 0), ((1.0, 1.0), 0)])
def test_the_bounds_let_all_or_none_pass(work, bounds, expected):
    options = {"reranker": str(work / "reranker"), "reranker_min": bounds[0], "reranker_margin": bounds[1]}
    _, plain = mined(work, ROWS)
    report, rows = mined(work, ROWS, **options)
    for row, without in zip(rows, plain, strict=True):
        assert len(row.get("negatives", [])) == min(expected, len(without.get("negatives", [])))
        assert len(row["scores"]) == 1 + len(row.get("negatives", []))
    assert report["rows_the_reranker_doubts"] == (0 if expected else 6)


def test_equal_pictures_are_no_negatives(work):
    rows = [{"query": {"text": f"question {name}"}, "target": {"image": f"{name}.png"}} for name in "abcd"]
    for options in ({}, {"mode": "gen"}):
        _, found = mined(work, rows, **options)
        taken = [{side["image"] for side in row.get("negatives", [])} for row in found]
        assert not taken[0] & {"a.png", "b.png"}
        assert not taken[1] & {"a.png", "b.png"}


def test_broken_rows_stop_or_are_left_out(work):
    rows = [*ROWS, {"query": {"text": "question"}, "target": {"image": "gone.png"}}]
    with pytest.raises(ValueError, match=r"p\.jsonl.*row 7.*gone\.png"):
        mined(work, rows)
    report, found = mined(work, rows, on_bad_row="skip")
    assert (report["rows"], report["bad_rows"], len(found)) == (6, 1, 6)
    assert torch.tensor([len(row.get("negatives", [])) for row in found]).max() <= 2
