"""One small copy of each published layout, as it lies on a disk, read into a packed batch."""

from __future__ import annotations

import io
import json
import zipfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from rime_fast.data.check import CheckRules, check_file
from rime_fast.data.collate import Collator
from rime_fast.data.datasets import PairDataset, open_pairs
from rime_fast.data.formats import parse_row, read_pairs
from rime_fast.data.images import load_image
from rime_fast.data.templates import get_template
from tests.data.builders import config, picture, processor


def png(seed, width=16, height=8):
    stream = io.BytesIO()
    picture(seed, width, height).save(stream, "PNG")
    return stream.getvalue()


def collated(pairs):
    """A training batch of pairs without rewrites: one fixed text stands in each response."""
    made = Collator(processor(), get_template("rewrite", filler="red"), config())
    batch = made(list(pairs))
    assert batch["side"].numel() >= 2 * len(pairs)
    return batch


def mmeb(folder):
    """TIGER-Lab/MMEB-train: a folder a subset with its Parquet files, images still in images_zip."""
    subset, zips = folder / "ImageNet_1K", folder / "images_zip"
    subset.mkdir()
    zips.mkdir()
    with zipfile.ZipFile(zips / "ImageNet_1K.zip", "w") as out:
        for i in range(3):
            out.writestr(f"ImageNet_1K/Train/{i}.png", png(i))
    rows = [
        {
            "qry": f"<|image_1|>\r\nRepresent the given image for classification {i}\r\n",
            "qry_image_path": f"images/ImageNet_1K/Train/{i}.png",
            "pos_text": f"class {i}",
            "pos_image_path": "",
            "neg_text": "" if i else "another class",
            "neg_image_path": "",
        }
        for i in range(3)
    ]
    rows.append({**rows[0], "pos_text": ""})  # some rows have an empty side
    parquet.write_table(pyarrow.Table.from_pylist(rows), subset / "original-00000-of-00001.parquet")
    return subset / "original-00000-of-00001.parquet"


def test_mmeb_train_with_its_images_still_zipped(tmp_path):
    file = mmeb(tmp_path)
    rules = CheckRules(images="decode")
    report = check_file(file, rules)
    assert [(p.row, p.field) for p in report.problems] == [(4, "pos_text")]
    assert dict(report.formats) == {"mmeb": 4}
    dataset, _ = open_pairs(file, rules=rules, on_bad_row="skip")
    assert [len(pair.negatives) for pair in dataset] == [1, 0, 0]
    pair = dataset[1]
    assert pair.query.text == "Represent the given image for classification 1"
    assert pair.query.images == [f"{tmp_path}/images_zip/ImageNet_1K.zip::ImageNet_1K/Train/1.png"]
    assert load_image(pair.query.images[0]).tobytes() == picture(1).tobytes()
    assert collated(dataset)["image_grid_thw"].shape == (3, 3)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("member", ["images/ImageNet_1K/Train/0.png", "Train/0.png"])
def test_mmeb_members_by_the_whole_path_or_an_end_of_it(tmp_path, member):
    file = mmeb(tmp_path)
    with zipfile.ZipFile(tmp_path / "images_zip" / "ImageNet_1K.zip", "w") as out:
        out.writestr(member, png(5))
    pair = PairDataset(file)[0]
    assert load_image(pair.query.images[0]).tobytes() == picture(5).tobytes()
    assert "missing image" in check_file(file).problems[0].problem


def test_mmeb_with_its_images_unpacked(tmp_path):
    file = mmeb(tmp_path)
    folder = tmp_path / "images" / "ImageNet_1K" / "Train"
    folder.mkdir(parents=True)
    picture(9).save(folder / "0.png")
    pair = PairDataset(file, image_root=tmp_path)[0]
    assert pair.query.images == [str(folder / "0.png")]


def colpali(folder):
    """vidore/colpali_train_set: Parquet parts in data/, the page as bytes beside the question."""
    features = datasets.Features({"image": datasets.Image()} | {k: datasets.Value("string") for k in COLPALI})
    rows = [
        {**dict.fromkeys(COLPALI, "x"), "image": {"bytes": png(i), "path": None}, "query": f"q {i}"} for i in range(4)
    ]
    (folder / "data").mkdir()
    for part in range(2):
        table = datasets.Dataset.from_list(rows[2 * part : 2 * part + 2], features=features)
        table.to_parquet(str(folder / "data" / f"train-{part:05d}-of-00002.parquet"))
    return folder / "data", rows, features


COLPALI = ("image_filename", "query", "answer", "source", "options", "page", "model", "prompt", "answer_type")


def test_colpali_train_set_as_parquet_and_as_a_dataset(tmp_path):
    folder, rows, features = colpali(tmp_path)
    pairs = list(read_pairs(folder))
    assert [pair.query.text for pair in pairs] == [f"q {i}" for i in range(4)]
    assert load_image(pairs[3].target.images[0]).tobytes() == picture(3).tobytes()
    expected = collated(pairs)["pixel_values"]
    table = datasets.Dataset.from_list(rows, features=features)
    table.save_to_disk(tmp_path / "saved")
    for source in (table, table.to_iterable_dataset(), tmp_path / "saved"):
        dataset, report = open_pairs(source, rules=CheckRules(images="decode"))
        assert dict(report.formats) == {"colpali": 4}
        assert (collated(dataset)["pixel_values"] == expected).all()


def test_visrag_in_domain(tmp_path):
    rows = [{"query": f"q {i}", "image": {"bytes": png(i), "path": "p.png"}, "source": "ChartQA"} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    pairs = list(read_pairs(tmp_path))
    assert [(pair.query.text, pair.dataset) for pair in pairs] == [(f"q {i}", "ChartQA") for i in range(3)]
    batch = collated(pairs)
    assert batch["key_ids"].unique().numel() == 3  # one file name, three pages


def hound(folder):
    """LLaVA-Hound's instructions: JSONL, a folder of frames a video."""
    for video in ("a", "b"):
        (folder / "frames" / video).mkdir(parents=True)
        for i in range(12):
            picture(i, 16, 16).save(folder / "frames" / video / f"c01_{i + 1}.jpeg")
    turns = [{"from": "human", "value": "<video>\nwhat is red?"}, {"from": "gpt", "value": "a cat"}]
    rows = [{"id": f"{video}_0", "video": video, "conversations": turns} for video in ("a", "b")]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "qa.jsonl"


def test_llava_hound_both_ways_round(tmp_path):
    file = hound(tmp_path)
    root = tmp_path / "frames"
    forward = list(read_pairs(file, image_root=root))
    assert forward[0].query.video == str(root / "a")
    assert (forward[0].query.text, forward[0].target.text) == ("what is red?", "a cat")
    backward = list(read_pairs(file, image_root=root, file_format="llava-hound-video"))
    assert (backward[1].query.text, backward[1].target.video) == ("a cat", str(root / "b"))
    made = Collator(processor(), get_template("rewrite", filler="red"), config(), video_frames=4)
    batch = made(forward)
    assert batch["video_grid_thw"][:, 0].tolist() == [2, 2]  # two frames a temporal patch
    assert made.measure([forward[0].query]) == [batch["lengths"][0]]
    report = check_file(file, image_root=root)
    assert report.ok
    assert dict(report.formats) == {"llava-hound": 2}
    assert not check_file(file, image_root=tmp_path).ok


def test_line_ends_of_other_systems_change_nothing():
    def sft(end):
        human = f"<image>{end}what is{end}this{end}<disc_emb>{end}instruction"
        gpt = f"<rewrite>red{end}cat</rewrite>{end}<gen_emb>"
        side = {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}], "image": "a.png"}
        return {"qry": side, "pos": side}

    plain, problems = parse_row(sft("\n"))
    assert not problems
    assert (plain.query.text, plain.query.rewrite) == ("what is\nthis", "red\ncat")
    for end in ("\r\n", "\r"):
        assert parse_row(sft(end)) == (plain, [])


TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
BAD = [
    ("mmeb", {"qry": 3, "qry_image_path": "a", "pos_text": "t"}, "qry", "is a number; expected text"),
    ("mmeb", {"qry": "<|image_1|>\na", "qry_image_path": "", "pos_text": "t"}, "qry", "has 1 image placeholder"),
    ("mmeb", {"qry": "a", "qry_image_path": "", "pos": "t"}, "pos", "unknown key"),
    ("colpali", {"query": None, "image_filename": "a", "image": {"bytes": b"x"}}, "query", "this side is empty"),
    ("visrag", {"query": "a", "image": None, "source": "s"}, "image", "this side is empty"),
    ("visrag", {"query": "a", "image": 3}, "image", "is a number; expected the path"),
    ("llava-hound", {"id": "1", "video": "v", "conversations": []}, "conversations", "has turns from []"),
    ("llava-hound", {"id": "1", "video": "", "conversations": TURNS}, "video", "this side is empty"),
]


@pytest.mark.parametrize(("name", "row", "field", "message"), BAD)
def test_bad_rows_are_named(name, row, field, message):
    found = parse_row(row, file_format=name)[1]
    assert any(where == field and problem.startswith(message) for where, problem in found), found


def test_pixels_of_a_page_are_the_same_from_a_path_or_from_bytes(tmp_path):
    (tmp_path / "p.png").write_bytes(png(1))
    raw = {"query": "q", "source": "s"}
    one, _ = parse_row({**raw, "image": "p.png"}, root=tmp_path)
    two, _ = parse_row({**raw, "image": {"bytes": png(1), "path": "p.png"}}, root=tmp_path)
    assert np.array_equal(np.asarray(load_image(one.target.images[0])), np.asarray(load_image(two.target.images[0])))
