"""Every format to pairs; every kind of bad row by its field."""

from __future__ import annotations

import copy
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rime_fast.data.formats import detect_format, pair_to_json, parse_row, read_pairs
from rime_fast.data.records import DataError, Pair, Side
from rime_fast.data.templates import CONTROL, get_template


def turns(human, gpt):
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def sft_row(**extra):
    return {
        "qry": {
            "conversations": turns(
                "<image>\nFind the car.\n<disc_emb>\nRepresent this. Use <gen_emb>.",
                "<rewrite>red car</rewrite>\n<gen_emb>",
            ),
            "image": "a/b.jpg",
        },
        "pos": {
            "conversations": turns("<video>\nA clip.\n<disc_emb>\n", "<think>hm</think><answer>car\n<gen_emb>"),
            "video": ["1.jpg", "2.jpg"],
        },
        **extra,
    }


RL_ROW = {
    "qry_text": "<|image_1|>\nFind it.",
    "qry_image": "q.png",
    "qry_video": [""],
    "pos_text": "a clip",
    "pos_image": "",
    "pos_video": ["1.jpg", "2.jpg"],
    "dataset": "MSVD",
    "solution": "",
}
OWN_ROW = {
    "query": {"text": "what", "image": "q.png", "rewrite": "r", "id": 7},
    "target": {"images": ["/abs/t.png", "u.png"], "rewrite": "s"},
    "negatives": [{"text": "no"}, {"video": ["f.png"], "fps": 2}],
    "id": "p1",
    "dataset": "mine",
}


def test_sft_rows():
    pair, problems = parse_row(sft_row(dataset_name="MSVD"), root="/data")
    assert not problems
    assert pair == Pair(
        Side("Find the car.", ["/data/a/b.jpg"], rewrite="red car"),
        Side("A clip.", video=["/data/1.jpg", "/data/2.jpg"], rewrite="<think>hm</think><answer>car"),
        dataset="MSVD",
    )
    assert parse_row(sft_row(), root="/data")[0].dataset is None


def test_rl_rows():
    pair, problems = parse_row(RL_ROW, root="r")
    assert not problems
    assert pair == Pair(Side("Find it.", ["r/q.png"]), Side("a clip", video=["r/1.jpg", "r/2.jpg"]), dataset="MSVD")


def test_own_rows():
    pair, problems = parse_row(OWN_ROW, root="r")
    assert not problems
    assert pair == Pair(
        Side("what", ["r/q.png"], rewrite="r", id="7"),
        Side("", ["/abs/t.png", "r/u.png"], rewrite="s"),
        [Side("no"), Side(video=["r/f.png"], fps=2)],
        "p1",
        "mine",
    )


def test_detection():
    rows = (sft_row(), sft_row(dataset_name="x"), RL_ROW, OWN_ROW, {"a": 1}, [1], None)
    assert [detect_format(row) for row in rows] == ["rime-sft", "ume-r1-sft", "rime-rl", "rime-jsonl", None, None, None]


GPT = ("qry", "conversations", 1, "value")
HUMAN = ("qry", "conversations", 0, "value")


@pytest.mark.parametrize(
    ("path", "value", "field", "message"),
    [
        (GPT, "<rewrite>car</rewrite>", "qry.conversations[1].value", "missing <gen_emb>"),
        (GPT, "a\n<gen_emb><gen_emb>", "qry.conversations[1].value", "2 times <gen_emb>"),
        (GPT, "<rewrite> </rewrite>\n<gen_emb>", "qry.conversations[1].value", "empty rewrite"),
        (GPT, "\n<gen_emb>", "qry.conversations[1].value", "empty rewrite"),
        (GPT, "car<gen_emb>more", "qry.conversations[1].value", "goes on after <gen_emb>"),
        (GPT, "a <disc_emb>\n<gen_emb>", "qry.conversations[1].value", "control token"),
        (GPT, 5, "qry.conversations[1].value", "is a number; expected text"),
        (HUMAN, "a\n<disc_emb>\n<disc_emb>", "qry.conversations[0].value", "2 times <disc_emb>"),
        (HUMAN, "<image><image>a", "qry.conversations[0].value", "2 image placeholder"),
        (HUMAN, "<image><video>a", "qry.conversations[0].value", "1 video placeholder"),
        (HUMAN, "<image>a<|im_end|>", "qry.conversations[0].value", "control token"),
        (HUMAN, "<image>a\ud800", "qry.conversations[0].value", "surrogate"),
        (("qry", "conversations"), [], "qry.conversations", r"expected \['human', 'gpt'\]"),
        (("qry", "conversations"), "hi", "qry.conversations", "is text; expected a list"),
        (("qry", "conversations", 0, "from"), "user", "qry.conversations", r"expected \['human', 'gpt'\]"),
        (("qry", "image"), {"a": 1}, "qry.image", "is an object; expected the path"),
        (("qry", "image"), ["a", 3], r"qry.image[1]", "is a number; expected the path"),
        (("qry", "imgae"), "a.png", "qry.imgae", "unknown key"),
        (("qry", "conversations", 0, "role"), "x", "qry.conversations[0].role", "unknown key"),
        (("source",), "x", "source", "unknown key"),
        (("qry",), None, "qry", "is null; expected an object"),
        (("dataset_name",), 3, "dataset_name", "is a number; expected text"),
    ],
)
def test_bad_sft_rows(path, value, field, message):
    check_bad(sft_row(), path, value, field, message)


@pytest.mark.parametrize(
    ("path", "value", "field", "message"),
    [
        (("qry_text",), None, None, None),
        (("qry_text",), 3, "qry_text", "is a number; expected text"),
        (("qry_text",), "<video>a", "qry_text", "1 video placeholder"),
        (("pos_image",), 3, "pos_image", "expected the path"),
        (("pos_img",), "a", "pos_img", "unknown key"),
        (("qry_text",), "see <gen_emb>", "qry_text", "control token"),
    ],
)
def test_bad_rl_rows(path, value, field, message):
    check_bad(RL_ROW, path, value, field, message)


def test_an_rl_side_with_nothing_in_it():
    _, problems = parse_row({"qry_text": "a", "pos_text": "", "pos_image": "", "pos_video": [""]})
    assert problems == [("pos_text", "this side is empty: no text, no image, no video")]


@pytest.mark.parametrize(
    ("path", "value", "field", "message"),
    [
        (("query", "text"), None, None, None),
        (("query", "text"), ["a"], "query.text", "is a list; expected text"),
        (("query", "rewrite"), " ", "query.rewrite", "empty rewrite"),
        (("query", "rewrite"), "a\n<gen_emb>", "query.rewrite", "control token"),
        (("query", "images"), ["b"], "query.images", "given beside `image`"),
        (("query", "txt"), "a", "query.txt", "unknown key"),
        (("query", "fps"), -1, "query.fps", "positive"),
        pytest.param(("query", "fps"), 10**400, "query.fps", "positive", id="a rate beyond a float"),
        (("query", "id"), True, "query.id", "true/false; expected text or a whole number"),
        (("target",), {}, "target", "is empty"),
        (("target",), None, "target", "is null"),
        (("negatives",), "a", "negatives", "is text; expected a list of sides"),
        (("negatives", 0), "a", "negatives[0]", "is text; expected an object"),
        (("negatives", 1, "video"), [None, 3], "negatives[1].video[1]", "expected the path"),
        (("id",), [1], "id", "is a list"),
        (("dataset",), 1, "dataset", "expected text"),
        (("extra",), 1, "extra", "unknown key"),
    ],
)
def test_bad_own_rows(path, value, field, message):
    check_bad(OWN_ROW, path, value, field, message)


def check_bad(row, path, value, field, message):
    row = copy.deepcopy(row)
    place = row
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    _, problems = parse_row(row)
    if field is None:
        assert not problems
        return
    assert any(where == field and re.search(message, problem) for where, problem in problems), problems
    assert len({where for where, _ in problems}) <= 2


@pytest.mark.parametrize("row", [[1], "a", None, 3, {}, {"a": 1}])
def test_rows_of_no_format(row):
    (problem,) = parse_row(row)[1]
    assert "expected a row of rime-sft" in problem[1]


def test_all_that_is_wrong_with_a_row_is_told_at_once():
    _, problems = parse_row({"query": {"txt": 1, "fps": 0}, "target": {"rewrite": 3}, "x": 1})
    assert [field for field, _ in problems] == ["x", "query.txt", "query.fps", "target.rewrite"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["conversations", "from", "value", "image", "images", "video", "text", "rewrite", "fps", "id"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from([("qry", "pos"), ("query", "target"), ("qry_text", "pos_text")]), JUNK, JUNK, JUNK)
def test_no_junk_makes_the_parser_raise(keys, first, second, third):
    row = {keys[0]: first, keys[1]: second, "negatives": third, "qry_image": third, "pos_video": third}
    pair, problems = parse_row(row)
    assert isinstance(pair, Pair)
    assert all(isinstance(where, str) and problem for where, problem in problems)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda t: not CONTROL.search(t))
NONEMPTY = TEXT.filter(str.strip)
SIDE = st.builds(
    Side,
    text=NONEMPTY,
    images=st.lists(st.sampled_from(["/a.png", "/b/ü.png"]), max_size=2),
    video=st.none() | st.just(["/f1.png", "/f2.png"]),
    rewrite=st.none() | NONEMPTY,
    id=st.none() | TEXT,
    fps=st.none() | st.floats(0.1, 60),
)


@given(st.builds(Pair, SIDE, SIDE, st.lists(SIDE, max_size=2), st.none() | NONEMPTY, st.none() | NONEMPTY))
def test_own_rows_round_trip(pair):
    read, problems = parse_row(json.loads(json.dumps(pair_to_json(pair))))
    assert not problems
    assert read == pair


@given(NONEMPTY, NONEMPTY.map(str.strip).filter(lambda t: "<rewrite>" not in t), st.integers(0, 2))
def test_what_a_template_writes_an_sft_row_reads(text, rewrite, images):
    """The published form of a conversation, written with our template, gives the side back."""
    side = Side(text, [f"/{i}.png" for i in range(images)], rewrite=rewrite)
    template = get_template("rewrite")
    human = "<image>\n" * images + template.render_disc(Side(text)).split("user\n", 1)[1] + template.instruction
    row = {"conversations": turns(human, template.render_response(side)), "image": side.images}
    if "<image>" in text or "<video>" in text:
        return
    pair, problems = parse_row({"qry": row, "pos": row})
    assert not problems
    assert pair == Pair(side, side)


def test_read_pairs_stops_at_the_first_bad_row(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([sft_row(), {"qry": 1}, sft_row()], indent=1))
    pairs = read_pairs(file)
    assert next(pairs).query.images == [str(tmp_path / "a/b.jpg")]
    with pytest.raises(DataError, match=r"rows.json, row 2, qry: is a number"):
        next(pairs)
    assert next(read_pairs(file, image_root="/elsewhere")).query.images == ["/elsewhere/a/b.jpg"]
    with pytest.raises(ValueError, match="file_format is 'csv'"):
        next(read_pairs(file, file_format="csv"))
