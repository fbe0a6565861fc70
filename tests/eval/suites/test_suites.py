"""Task tables, the other suites' layouts, published aggregates, and what an absent or odd file says."""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from rime_fast.data.records import DataError, load_image
from rime_fast.eval.suites import SUITES, TaskScore, load_suite
from rime_fast.eval.suites.disk import frames, natural, table_files
from rime_fast.eval.suites.tasks import Suite, mean, table
from tests.eval.suites.layout import (
    png,
    write_beir,
    write_frames,
    write_goldens,
    write_mrmr,
    write_table,
    write_uvrb,
    write_v1,
)

PUBLISHED = json.loads((Path(__file__).parent / "mmeb_v2_published_scores.json").read_text())


def scored(suite: Suite, scores: dict[str, float]) -> dict[str, float]:
    return suite.aggregate({name: TaskScore(score) for name, score in scores.items()})


def test_tables_of_mmeb(tmp_path):
    tasks = load_suite("mmeb-v2", tmp_path).tasks.values()
    assert Counter(task.modality for task in tasks) == {"image": 36, "video": 18, "visdoc": 24}
    assert Counter(f"{t.modality}.{t.group}" for t in tasks) == {
        **{"image.CLS": 10, "image.QA": 10, "image.RET": 12, "image.VG": 4},
        **{"video.CLS": 5, "video.QA": 5, "video.RET": 5, "video.MRET": 3},
        **{"visdoc.ViDoRe-V1": 10, "visdoc.ViDoRe-V2": 4, "visdoc.VisRAG": 6, "visdoc.OOD": 4},
    }
    assert sum(task.expected_queries for task in tasks) == 83_530
    assert Counter(task.in_domain for task in tasks) == {True: 20, False: 16, None: 42}
    assert {t.metric for t in tasks if t.modality == "visdoc"} == {"ndcg_linear@5"}
    assert {t.exported for t in tasks if t.exported != t.name} == {"ViDoSeek-page-fixed", "MMLongBench-page-fixed"}
    assert len(load_suite("mmeb-v1", tmp_path).tasks) == 36
    assert len(load_suite("uvrb", tmp_path).tasks) == 16
    assert list(load_suite("mrmr", tmp_path).tasks) == ["knowledge", "theorem", "traffic", "design", "negation"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_aggregates_of_mmeb(name, tmp_path):
    """Published task scores make the published overall scores."""
    expected = PUBLISHED[name]["overall"]
    found = scored(load_suite("mmeb-v2", tmp_path), PUBLISHED[name]["scores"])
    assert {key: 100 * found[key] for key in expected} == pytest.approx(expected, abs=1e-9)


def test_a_mean_needs_all_its_tasks(tmp_path):
    scores = dict(PUBLISHED["v2.0.0/VLM2Vec-V2.0-Qwen2VL-2B"]["scores"])
    del scores["K700"]
    found = scored(load_suite("mmeb-v2", tmp_path), scores)
    assert "image" in found
    assert "video.QA" in found
    assert not found.keys() & {"all", "video", "video.CLS"}


@pytest.mark.parametrize("model", ["GVE-7B", "GVE-3B"])
def test_aggregates_of_uvrb(model, tmp_path):
    facts = table("uvrb.json")
    found = scored(load_suite("uvrb", tmp_path), facts["published"][model])
    published = facts["published_aggregates"][model]
    assert {key: found[key] for key in published} == pytest.approx(published, abs=1e-3)


def test_aggregate_of_mrmr(tmp_path):
    suite = load_suite("mrmr", tmp_path)
    knowledge = {"Art": 0.1, "Humanities": 0.2, "Medicine": 0.3, "Science": 0.4}
    theorem = {"Math": 0.5, "Physics": 0.6, "Engineering": 0.7, "Business": 0.8}
    scores = {"knowledge": TaskScore(0.0, knowledge), "theorem": TaskScore(0.0, theorem)}
    scores |= {"negation": TaskScore(0.9), "design": TaskScore(1.0), "traffic": TaskScore(0.0)}
    assert suite.aggregate(scores)["all"] == pytest.approx(mean([*knowledge.values(), *theorem.values(), 0.9, 1, 0]))
    del scores["design"]
    assert "all" not in suite.aggregate(scores)


def test_version_1(tmp_path):
    tasks = load_suite("mmeb-v1", write_v1(tmp_path), protocol="vlm2vec").tasks
    data = tasks["ImageNet-1K"].load()
    assert data.queries[0].text == "<|image_pad|>\nRepresent the given image for classification\n"
    assert data.queries[0].images == [str(tmp_path / "images/ImageNet-1K/a.jpg")]
    assert (data.names, data.correct, data.pools) == (["tench", "goldfish"], [[0]], [[0, 1]])
    data = tasks["MSCOCO_t2i"].load()
    assert data.queries[0].text == "Find me a picture: a man\n"
    assert [side.text for side in data.candidates] == ["<|image_pad|>\nRepresent the given image.\n"] * 2


def test_mrmr(tmp_path):
    tasks = load_suite("mrmr", write_mrmr(tmp_path), protocol="plain").tasks
    data = tasks["knowledge"].load()
    assert data.names == ["corpus-test-a", "corpus-test-b", "corpus-test-c", "redo-test-0"]
    assert data.categories == ["Art", "Science"]
    assert data.correct == [[1], [0]]
    prompt = "Retrieve relevant documents that help answer the question."
    assert data.queries[0].text == f"{prompt} knowledge question 0"
    assert (len(data.queries[0].images), data.queries[1].images) == (1, [])
    picture = data.candidates[0].images[0]
    assert load_image(picture).size == (2000, 500)
    assert load_image(pickle.loads(pickle.dumps(picture))).size == (2000, 500)
    data = tasks["negation"].load()
    assert [[data.names[row] for row in pool] for pool in data.pools] == [
        [f"corpus-test-{q}_{i}" for i in range(1, 5)] for q in (7, 9)
    ]
    assert data.correct == [[0], [4]]
    assert tasks["negation"].metric == "hit@1"
    assert tasks["design"].load().queries[0].text.endswith("that it violates. design question 0")


def test_uvrb(tmp_path):
    suite = load_suite("uvrb", write_uvrb(tmp_path), protocol="vlm2vec")
    data = suite.tasks["MSRVTT"].load()
    assert data.queries[0].text.startswith("Find the clip that corresponds to the described scene")
    assert [Path(frame).stem for frame in data.candidates[0].video] == ["1", "2", "3", "4", "6", "7", "8", "10"]
    assert data.pools is None
    data = suite.tasks["MS-TI"].load()
    assert data.pools == [[2, 0, 3]]
    assert (data.correct, data.queries[0].images) == ([[2]], [str(tmp_path / "MS-TI/images/q0.jpg")])
    assert data.queries[0].text.startswith("<|image_pad|> Find the video clip")
    assert (suite.tasks["MS-TI"].metric, suite.tasks["CMRB"].metric) == ("precision@1", "hit@10")
    assert suite.protocol.video_max_pixels == 200 * 28 * 28


def test_beir(tmp_path):
    suite = load_suite("beir", write_beir(tmp_path), protocol="plain")
    data = suite.tasks["recipes"].load()
    assert data.candidates[0].text == "dish 0 stir 0 times"
    assert data.candidates[3].images == [str(tmp_path / "recipes/pictures/d3.jpg")]
    assert (data.correct, data.gains) == ([[0, 3], [1]], [[2.0, 1.0], [1.0]])
    assert data.notes == {"judgements_of_no_relevance": 1, "queries_without_judgement": 1}
    assert load_suite("beir", tmp_path / "recipes").tasks.keys() == {"recipes"}
    with pytest.raises(ValueError, match="folder with corpus, queries and qrels"):
        load_suite("beir", tmp_path / "recipes" / "qrels")


def test_a_missing_table_lists_every_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DataError, match=r"no table of VLM2Vec/MSVD") as error:
        load_suite("mmeb-v2", tmp_path).tasks["MSVD"].load()
    for place in ("video-tasks/MSVD", "VLM2Vec/MSVD", "visdoc-tasks/data/MSVD"):
        assert str(tmp_path / place) in str(error.value)


def test_missing_frames_are_noted(tmp_path):
    write_goldens(tmp_path, ["MVBench"])
    folder = tmp_path / "video-tasks/frames/video_qa/MVBench/action_count/z.mp4"
    for frame in folder.iterdir():
        frame.unlink()
    (tmp_path / "video-tasks/MVBench/state_change/train-00000-of-00001.parquet").unlink()
    notes = load_suite("mmeb-v2", tmp_path).tasks["MVBench"].load().notes
    assert notes["missing_frames_names"] == ["video-tasks/frames/video_qa/MVBench/action_count/z.mp4"]
    assert notes["missing_subsets_names"] == ["state_change"]


def test_repaired_page_sets_come_first(tmp_path):
    rows = {"corpus": [{"corpus-id": 0}], "queries": [{"query-id": 0, "query": "?"}]}
    for place, target in (("visdoc-tasks/ViDoSeek-page", 0), ("VLM2Vec/ViDoSeek-page-fixed", 0)):
        for config, own in (rows | {"qrels": [{"query-id": 0, "corpus-id": target, "score": 1}]}).items():
            images = {"image": [png(1)]} if config == "corpus" else {}
            write_table(tmp_path / place / config / "test-0.parquet", own, **images)
        notes = load_suite("mmeb-v2", tmp_path).tasks["ViDoSeek-page"].load().notes
        assert ("page_set" in notes) == (place == "visdoc-tasks/ViDoSeek-page")


def test_frames_in_natural_order(tmp_path):
    write_frames(tmp_path, 20, 1, "{}.jpg")
    (tmp_path / "notes.txt").write_text("no frame")
    assert [Path(path).stem for path in frames(tmp_path, 8)] == ["1", "3", "6", "9", "11", "14", "17", "20"]
    assert len(frames(tmp_path, 64)) == len(frames(tmp_path, None)) == 20
    assert frames(tmp_path / "none", 8) == []
    assert sorted(["a10", "a9", "b1"], key=natural) == ["a9", "a10", "b1"]


def test_readme_names_the_files(tmp_path):
    (tmp_path / "x.parquet").touch()
    head = "configs:\n- config_name: corpus\n  data_files:\n  - split: test\n    path: x.parquet\n"
    (tmp_path / "README.md").write_text(f"---\n{head}---\ntext")
    assert table_files(tmp_path, "corpus", "test") == [tmp_path / "x.parquet"]
    assert table_files(tmp_path, "corpus", "train") == []
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert table_files(tmp_path, "corpus", "test") == []


def test_broken_parquet_is_named(tmp_path):
    path = tmp_path / "video-tasks/MSVD/data/test-0.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"test-0\.parquet: is no readable parquet"):
        load_suite("mmeb-v2", tmp_path).tasks["MSVD"].load()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda root: load_suite("mmeb", root), "suite is 'mmeb'; expected one of mmeb-v2"),
        (lambda root: load_suite("mmeb-v2", root, protocol="ume"), "protocol is 'ume'; expected one of ume-r1"),
        (lambda root: load_suite("mmeb-v2", root / "none"), "expected a folder"),
        (lambda root: load_suite("mmeb-v2", root, frames=0), "frames is 0"),
        (lambda root: load_suite("mmeb-v2", root).select(["X"]), "tasks names 'X'"),
        (lambda root: load_suite("mmeb-v2", root).select(groups=["image.X"]), r"groups names 'image\.X'"),
    ],
)
def test_wrong_names(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_selection(tmp_path):
    suite = load_suite("mmeb-v2", tmp_path)
    assert len(suite.select(groups=["image.CLS", "visdoc"]).tasks) == 34
    assert list(suite.select(["MSVD"], ["video.MRET"]).tasks) == ["MSVD", "QVHighlight", "Charades-STA", "MomentSeeker"]
    assert set(SUITES) == {"mmeb-v2", "mmeb-v1", "mrmr", "uvrb", "beir"}
    assert Image.open(io.BytesIO(png(1))).size == (32, 32)
