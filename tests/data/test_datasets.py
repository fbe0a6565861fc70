"""Datasets of pairs: from files, lists and datasets.Dataset; lazy, and safe in workers."""

from __future__ import annotations

import json
import pickle

import datasets
import pytest
from torch.utils.data import DataLoader

from rime_fast.data.check import CheckRules
from rime_fast.data.collate import Collator
from rime_fast.data.datasets import PairDataset, open_pairs
from rime_fast.data.records import DataError, Pair, Side
from tests.data.builders import config, picture, processor


def rows(n=6):
    return [
        {"query": {"text": f"q ü {i}", "rewrite": "r"}, "target": {"text": f"t {i}", "rewrite": "s", "image": "a.png"}}
        for i in range(n)
    ]


@pytest.fixture
def folder(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "lines.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows()))
    (tmp_path / "list.json").write_text(json.dumps(rows(), indent=2, ensure_ascii=False))
    return tmp_path


@pytest.mark.parametrize("name", ["lines.jsonl", "list.json"])
def test_files_by_index(folder, name):
    dataset = PairDataset(folder / name)
    assert len(dataset) == 6
    assert [dataset[i].query.text for i in (3, 0, -1)] == ["q ü 3", "q ü 0", "q ü 5"]
    assert dataset[2].target.images == [str(folder / "a.png")]
    with pytest.raises(IndexError):
        dataset[6]
    assert pickle.loads(pickle.dumps(dataset))[4] == dataset[4]


def test_a_later_change_of_directory_does_not_matter(folder, monkeypatch):
    monkeypatch.chdir(folder)
    dataset = PairDataset("lines.jsonl")
    assert dataset.name == "lines.jsonl"
    monkeypatch.chdir(folder.parent)
    assert dataset[3].target.images == [str(folder / "a.png")]
    assert dataset[3].query.text == "q ü 3"


def test_lists_of_pairs_and_rows(folder):
    pairs = list(PairDataset(folder / "list.json"))
    assert list(PairDataset(pairs)) == pairs
    assert list(PairDataset(rows(), image_root=folder)) == pairs
    with pytest.raises(TypeError, match="train_dataset is int; expected a path"):
        PairDataset(3, name="train_dataset")
    with pytest.raises(DataError, match=r"mine, row 2, query: is null"):
        PairDataset([rows()[0], {"target": {"text": "a"}}], name="mine")[1]


def test_a_datasets_dataset_with_our_columns(folder):
    plain = {"query": {"text": "q", "rewrite": "r"}, "target": {"text": "t", "rewrite": "s"}, "id": "7"}
    mixed = [*({**row, "id": None} for row in rows(3)), plain]
    table = datasets.Dataset.from_list(mixed)
    pairs = list(PairDataset(table, image_root=folder))
    assert pairs == list(PairDataset(mixed, image_root=folder))
    assert pairs[3].id == "7"
    assert open_pairs(table, image_root=folder)[1].ok


def test_a_datasets_dataset_with_decoded_images():
    features = datasets.Features(
        {
            "query": {"text": datasets.Value("string"), "rewrite": datasets.Value("string"), "image": datasets.Image()},
            "target": {"text": datasets.Value("string"), "rewrite": datasets.Value("string")},
        }
    )
    row = {"query": {"text": "q", "rewrite": "r", "image": picture(3)}, "target": {"text": "t", "rewrite": "s"}}
    made = Collator(processor(), "rewrite", config())
    expected = made([Pair(Side("q", [picture(3)], rewrite="r"), Side("t", rewrite="s"))])["pixel_values"]
    table = datasets.Dataset.from_list([row], features=features)
    for decode in (True, False):
        if not decode:
            stored = features["query"] | {"image": datasets.Image(decode=False)}
            table = table.cast(datasets.Features({**features, "query": stored}))
        dataset, report = open_pairs(table, rules=CheckRules(images="decode"))
        assert report.ok
        assert (made([dataset[0]])["pixel_values"] == expected).all()


@pytest.mark.parametrize("kind", ["file", "list", "pairs"])
def test_bad_rows_stop_or_are_skipped(folder, kind):
    bad = rows()
    bad[1]["query"]["rewrite"] = ""
    bad[4]["target"]["image"] = "gone.png"
    file = folder / "bad.json"
    file.write_text(json.dumps(bad))
    source = {"file": file, "list": bad, "pairs": None}[kind]
    if kind == "pairs":
        source = [Pair(Side("q", rewrite="r"), Side("t", rewrite="s")) for _ in rows()]
        source[1].query.rewrite, source[4].target.images = None, ["gone.png"]
    options = {"image_root": folder, "name": "train_dataset"}
    with pytest.raises(DataError) as caught:
        open_pairs(source, **options)
    assert [problem.row for problem in caught.value.problems] == [2, 5]
    assert caught.value.problems[0].field == "query.rewrite"
    assert caught.value.problems[0].file == (str(file) if kind == "file" else "train_dataset")
    dataset, report = open_pairs(source, on_bad_row="skip", **options)
    assert (len(dataset), report.bad_rows, report.rows) == (4, 2, 6)
    again = pickle.loads(pickle.dumps(dataset))
    if kind != "pairs":
        assert [pair.query.text for pair in again] == ["q ü 0", "q ü 2", "q ü 3", "q ü 5"]
    assert all(pair.query.rewrite == "r" for pair in again)


def test_nothing_good_or_nothing_readable_is_an_error_even_when_skipping(folder):
    with pytest.raises(DataError, match="none of 2 rows is good"):
        open_pairs([{"query": 1}, {"query": 2}], on_bad_row="skip")
    broken = folder / "broken.json"
    broken.write_text((folder / "list.json").read_text()[:-3])
    with pytest.raises(DataError, match="is not a JSON list of rows"):
        open_pairs(broken, on_bad_row="skip")
    with pytest.raises(DataError, match="is not a JSON list of rows"):
        PairDataset(broken)
    with pytest.raises(DataError, match="no such file"):
        open_pairs(folder / "none.json", on_bad_row="skip")
    with pytest.raises(ValueError, match="on_bad_row is 'warn'"):
        open_pairs([], on_bad_row="warn")  # type: ignore[arg-type]


def test_through_a_dataloader_with_a_worker(folder):
    dataset, _ = open_pairs(folder / "lines.jsonl")
    made = Collator(processor(), "rewrite", config())
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=made, num_workers=1))
    assert [batch["side"].numel() for batch in batches] == [8, 4]
    assert (batches[0]["input_ids"] == made([dataset[i] for i in range(4)])["input_ids"]).all()


def test_an_error_in_a_worker_keeps_its_problems(folder):
    (folder / "a.png").unlink()
    loader = DataLoader(PairDataset(folder / "list.json"), batch_size=2, num_workers=1, collate_fn=raise_first)
    with pytest.raises(DataError, match="row 1, field: wrong"):
        list(loader)


def raise_first(batch):
    from rime_fast.data.records import Problem

    raise DataError([Problem("f", 1, "field", "wrong")])
