"""Both forms of a retrieval set, and what is wrong with bad ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rime_fast.data.formats import parse_row
from rime_fast.data.records import DataError, Side
from rime_fast.data.retrieval import RetrievalSet, is_retrieval_set

SHARED = {
    "name": "mine",
    "candidates": [{"text": "a"}, {"image": "b.png"}, {"text": "c", "id": 3}],
    "queries": [
        {"query": {"text": "one"}, "correct": 0},
        {"query": {"text": "two"}, "correct": [1, 2], "candidates": [1, 2], "gains": [2, 1]},
    ],
}


def documented(kind):
    """The JSON blocks of docs/data.md that hold ``kind``."""
    blocks = re.findall(r"```json\n(.*?)```", (Path(__file__).parents[2] / "docs" / "data.md").read_text(), re.DOTALL)
    return [block for block in blocks if kind in block]


def test_the_documented_examples_are_valid(tmp_path):
    shared, inline = documented('"candidates"')
    found = RetrievalSet.from_file(save(tmp_path / "set.json", shared))
    assert (found.correct, found.gains) == ([[0], [0, 1]], [[1.0], [2, 1]])
    assert RetrievalSet.from_file(save(tmp_path / "set.jsonl", inline)).correct == [[0]]
    (pair,) = documented('"target"')
    assert parse_row(json.loads(pair))[1] == []


def save(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
    return path


def test_shared_candidates(tmp_path):
    found = RetrievalSet.from_file(save(tmp_path / "set.json", SHARED))
    assert found.candidates == [Side("a"), Side("", [str(tmp_path / "b.png")]), Side("c", id="3")]
    assert found.queries == [Side("one"), Side("two")]
    assert found.correct == [[0], [1, 2]]
    assert found.pools == [[0, 1, 2], [1, 2]]
    assert found.gains == [[1.0], [2, 1]]
    assert found.name == "mine"
    found.save(tmp_path / "again.json")
    assert RetrievalSet.from_file(tmp_path / "again.json") == found


def test_plain_set_has_no_pools_or_gains(tmp_path):
    plain = {"candidates": [{"text": "a"}], "queries": [{"query": {"text": "q"}, "correct": 0}]}
    found = RetrievalSet.from_file(save(tmp_path / "set.json", json.dumps(plain)))
    assert (found.pools, found.gains, found.name) == (None, None, "set")


def test_inline_candidates_are_shared_where_equal(tmp_path):
    lines = [
        {"query": {"text": "one"}, "candidates": [{"text": "a"}, {"text": "b"}], "correct": 1},
        {"query": {"text": "two"}, "candidates": [{"text": "b"}, {"text": "c"}, {"text": "a"}], "correct": [0]},
    ]
    path = save(tmp_path / "set.jsonl", "\n".join(json.dumps(line) for line in lines))
    found = RetrievalSet.from_file(path)
    assert [side.text for side in found.candidates] == ["a", "b", "c"]
    assert found.pools == [[0, 1], [1, 2, 0]]
    assert found.correct == [[1], [1]]
    assert is_retrieval_set(path)
    assert is_retrieval_set(save(tmp_path / "list.json", lines))
    assert RetrievalSet.from_file(tmp_path / "list.json").correct == found.correct


def test_an_empty_list_is_told(tmp_path):
    path = save(tmp_path / "empty.json", "[]")
    assert not is_retrieval_set(path)
    with pytest.raises(DataError, match=r"empty\.json: is empty"):
        RetrievalSet.from_file(path)


def test_detection(tmp_path):
    assert is_retrieval_set(save(tmp_path / "set.json", SHARED))
    assert not is_retrieval_set(save(tmp_path / "rows.jsonl", json.dumps({"query": {}, "target": {}})))
    assert not is_retrieval_set(save(tmp_path / "odd.json", "{\n nonsense"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, "candidates: is a list; expected a list that is not empty"),
        ({"queries": None}, "queries: is null"),
        ({"cands": []}, "cands: unknown key"),
        ({"queries": [{"query": {"text": "a"}, "correct": 3}]}, r"row 1, correct: is 3; expected indices from 0 to 2"),
        ({"queries": [{"query": {"text": "a"}}]}, "row 1, correct: is None"),
        ({"queries": [{"query": {"text": "a"}, "correct": []}]}, r"row 1, correct: is \[\]"),
        ({"queries": [{"query": {"txt": "a"}, "correct": 0}]}, "row 1, query.txt: unknown key"),
        ({"queries": [{"query": {"text": "a"}, "correct": 0, "candidates": [1]}]}, "row 1, correct: names candidate 0"),
        ({"queries": [{"query": {"text": "a"}, "correct": 0, "gains": [1, 2]}]}, "row 1, gains: expected one number"),
        ({"queries": [5]}, "row 1, queries: is a number"),
        ({"candidates": [{"text": 3}]}, r"candidates\[0\].text: is a number"),
    ],
)
def test_bad_shared_sets(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        RetrievalSet.from_file(save(tmp_path / "set.json", {**SHARED, **change}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"query": {"text": "a"}, "candidates": 3, "correct": 0}, "row 1, candidates: expected an object"),
        ({"query": {"text": "a"}, "candidates": [{"text": "b"}], "correct": 1}, "row 1, correct: is 1; .* 0 to 0"),
        ({"query": None, "candidates": [{"text": "b"}], "correct": 0}, "row 1, query: is null"),
        ({"query": {"text": "a"}, "candidates": [{}], "correct": 0}, r"row 1, candidates\[0\]: is empty"),
        ('{"query": ', "row 1: is not JSON"),
    ],
)
def test_bad_inline_sets(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        RetrievalSet.from_file(save(tmp_path / "set.jsonl", line if isinstance(line, str) else json.dumps(line)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": [[0]]}, "correct has 1 entries for 2 queries"),
        ({"correct": [[0], []]}, r"correct\[1\] is empty"),
        ({"correct": [[0], [2]]}, r"correct\[1\] names candidate 2"),
        ({"pools": [[0], [0]]}, r"correct\[1\] names candidate 1"),
        ({"gains": [[1.0], []]}, r"gains\[1\] has 0 entries"),
        ({"correct": [[0], [1, 1]]}, r"correct\[1\] names candidate 1 twice"),
        ({"pools": [[0, 1, 0], [1]]}, r"pools\[0\] names candidate 0 twice"),
    ],
)
def test_a_set_checks_itself(changes, message):
    good = {"queries": [Side("a"), Side("b")], "candidates": [Side("c"), Side("d")], "correct": [[0], [1]]}
    assert RetrievalSet(**good)
    with pytest.raises(ValueError, match=message):
        RetrievalSet(**{**good, **changes})


def test_equal_candidates_of_a_shared_pool_are_one(tmp_path):
    """hit@1 of a query whose right answer stands there twice is 1, whichever of the two comes first."""
    whole = {
        "candidates": [{"text": "a"}, {"text": "b"}, {"text": "a"}, {"text": "x", "id": 1}, {"text": "y", "id": 1}],
        "queries": [
            {"query": {"text": "one"}, "correct": 2, "candidates": [0, 1, 2]},
            {"query": {"text": "two"}, "correct": [0, 2, 4], "gains": [1, 3, 2], "candidates": [0, 2, 3, 4]},
        ],
    }
    found = RetrievalSet.from_file(save(tmp_path / "set.json", whole))
    assert [side.text for side in found.candidates] == ["a", "b", "x"]
    assert found.correct == [[0], [0, 2]]
    assert found.pools == [[0, 1], [0, 2]]
    assert found.gains == [[1.0], [3, 2]]


def test_candidates_equal_to_an_equal_one_are_equal():
    candidates = [Side("one", id="1"), Side("x"), Side("two", id="2"), Side("two", id="1"), Side("x", id="3")]
    found = RetrievalSet([Side("q")], candidates, [[3]], pools=[[0, 1, 2, 3]]).merged()
    assert found.candidates == candidates[:2]
    assert (found.correct, found.pools) == ([[0]], [[0, 1]])


def test_two_equal_right_candidates_of_a_line_are_one(tmp_path):
    line = {"query": {"text": "q"}, "candidates": [{"text": "a"}, {"text": "a"}, {"text": "b"}], "correct": [0, 1]}
    assert RetrievalSet.from_file(save(tmp_path / "set.jsonl", json.dumps(line))).correct == [[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": [0, 0]}, "row 1, correct: names candidate 0 twice"),
        ({"candidates": [0, 1, 1]}, "row 1, candidates: names candidate 1 twice"),
        ({"gains": [-1]}, "row 1, gains: expected one number for each of 1 right candidates, >= 0 and not all 0"),
        ({"gains": [0]}, "row 1, gains: expected one number"),
        ({"gains": ["2"]}, "row 1, gains: expected one number"),
        ({"gains": [float("nan")]}, "row 1, gains: expected one number"),
        ({"query": {"text": "a <gen_emb>"}}, "row 1, query.text: holds '<gen_emb>'"),
        ({"query": {"text": "half \ud800"}}, "row 1, query.text: holds half a surrogate"),
        ({"query": {"text": "a", "image": "../x.png"}}, "row 1, query.image: .* outside of image_root"),
    ],
)
def test_faults_of_a_set_are_found_before_anything_is_embedded(tmp_path, change, message):
    query = {"query": {"text": "q"}, "correct": 0, **change}
    whole = {"candidates": [{"text": "a"}, {"text": "b"}], "queries": [query]}
    with pytest.raises(DataError, match=message):
        RetrievalSet.from_file(save(tmp_path / "set.json", whole))


def test_missing_images_on_request(tmp_path):
    whole = {"candidates": [{"image": "gone.png"}], "queries": [{"query": {"text": "q"}, "correct": 0}]}
    path = save(tmp_path / "set.json", whole)
    assert RetrievalSet.from_file(path)
    with pytest.raises(DataError, match=r"candidates\[0\].images\[0\]: missing image"):
        RetrievalSet.from_file(path, images="head")
