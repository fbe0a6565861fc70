"""MMEB-V2's loaders against what the official loaders make of the same rows, string for string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rime_fast.data.records import load_image
from rime_fast.eval.suites import load_suite
from tests.eval.suites.layout import ENTRIES, GOLDENS, write_goldens


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_goldens(tmp_path_factory.mktemp("mmeb"))


def placed(path: str, name: str) -> str:
    """A golden's path with the task's own root where the golden has a stand-in."""
    own = GOLDENS[name]["config"].get("frame_root")
    return path if own is None else path.replace(own, ENTRIES[name]["roots"]["frame_root"].rstrip("/"), 1)


def files(side: Any, root: Path) -> list[str] | None:
    sources = [*side.images, *(side.video or ())]
    found = [source["path"] if isinstance(source, dict) else source for source in sources]
    return [Path(path).relative_to(root).as_posix() for path in found] or None


def counted(golden: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The spelled-out entries, and how many there are in all."""
    rest = golden[-1].get("...") if "..." in golden[-1] else None
    return (golden, len(golden)) if rest is None else (golden[:-1], rest)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name, root):
    data = load_suite("mmeb-v2", root, protocol="vlm2vec").tasks[name].load()
    golden, entry = GOLDENS[name], ENTRIES[name]
    spelled, total = counted(golden["candidates"])
    assert len(data.candidates) == len(data.names) == len(set(data.names)) == total
    assert data.names[: len(spelled)] == [placed(str(one["name"]), name) for one in spelled]
    for side, one in zip(data.candidates, spelled, strict=False):
        assert side.text == one["text"]
        expected = one["images"] and [placed(path, name) for path in one["images"]]
        assert files(side, root) == expected
    spelled, total = counted(golden["queries"])
    assert len(data.queries) == total
    for i, one in enumerate(spelled):
        assert data.queries[i].text == one["text"]
        expected = one["images"] and [placed(path, name) for path in one["images"]]
        assert files(data.queries[i], root) == expected
        assert bool(data.queries[i].video) == ("<|video_pad|>" in one["text"])
        labels = one["label_name"] if isinstance(one["label_name"], list) else [one["label_name"]]
        assert [data.names[row] for row in data.correct[i]] == [placed(str(label), name) for label in labels]
        if entry["eval_type"] == "local":
            pool = [data.names[row] for row in data.pools[i]]
            assert pool == list(dict.fromkeys(placed(str(c), name) for c in one["cand_names"]))
        else:
            assert data.pools is None
        if "rel_scores" in one and set(one["rel_scores"]) != {1}:
            assert data.gains[i] == one["rel_scores"]


def test_all_parsers_have_a_golden():
    assert {ENTRIES[name]["parser"] for name in GOLDENS} == {entry["parser"] for entry in ENTRIES.values()}


def test_ume_r1_text(root):
    """The token removed, white space at the ends removed, a white picture where there is none, a bare page query."""
    suite = load_suite("mmeb-v2", root)
    assert suite.protocol.name == "ume-r1"
    tasks = {name: suite.tasks[name].load() for name in ("ImageNet-1K", "VisDial", "ViDoRe_arxivqa", "VisRAG_ArxivQA")}
    assert tasks["ImageNet-1K"].queries[0].text == "Represent the given image for classification"
    label = tasks["ImageNet-1K"].candidates[0]
    assert label.text == "tench"
    assert np.array(load_image(label.images[0])).tolist() == [[[255] * 3] * 28] * 28
    dialogue = tasks["VisDial"].queries[0]
    assert dialogue.text.endswith("Q:is it? A:yes")
    assert len(dialogue.images) == 1
    assert tasks["ViDoRe_arxivqa"].queries[0].text == "question 0"
    assert tasks["ViDoRe_arxivqa"].candidates[0].text == ""
    assert tasks["VisRAG_ArxivQA"].queries[0].text == "Find a document image that matches the given query: question q0"
    video = suite.tasks["HMDB51"].load().queries[0]
    assert len(video.video) == 8
    assert video.images == []


def test_plain_keeps_instructions_and_adds_no_picture(root):
    suite = load_suite("mmeb-v2", root, protocol="plain")
    page = suite.tasks["ViDoRe_arxivqa"].load()
    assert page.queries[0].text == "Find a document image that matches the given query: question 0"
    assert page.queries[0].images == []
    assert page.candidates[0].text == "Understand the content of the provided document image."
    assert load_image(page.candidates[0].images[0]).size == (32, 32)  # out of the parquet file


def test_pages_come_from_files_where_there_are_some(root, tmp_path):
    write_goldens(tmp_path, ["ViDoRe_arxivqa"])
    file = tmp_path / "visdoc-tasks" / "images" / "ViDoRe_arxivqa" / "2.png"
    file.parent.mkdir(parents=True)
    file.write_bytes((root / "image-tasks/ImageNet-1K/a.jpg").read_bytes())
    data = load_suite("mmeb-v2", tmp_path).tasks["ViDoRe_arxivqa"].load()
    assert data.candidates[0].images == [str(file)]
    assert isinstance(data.candidates[1].images[0], dict)


def test_images_below_mmeb(tmp_path):
    """The archive unpacks to MMEB/<task>; not everyone moves it up."""
    write_goldens(tmp_path, ["WebQA"], image_folder="image-tasks/MMEB")
    data = load_suite("mmeb-v2", tmp_path, protocol="vlm2vec").tasks["WebQA"].load()
    assert data.candidates[0].images == [str(tmp_path / "image-tasks/MMEB/WebQA/1.jpg")]
    assert data.notes == {"texts_of_one_name_that_differ": 1}


def test_notes_count_what_is_odd(root):
    suite = load_suite("mmeb-v2", root)
    assert suite.tasks["OK-VQA"].load().notes == {"repeated_names_in_lists": 1}
    notes = suite.tasks["ViDoRe_arxivqa"].load().notes
    assert notes == {"judgements_given_twice": 1, "judgements_of_no_relevance": 1}
