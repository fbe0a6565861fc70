"""Rows stream from lists and JSONL alike, wherever the buffer ends; what is broken is named."""

from __future__ import annotations

import json
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rime_fast.data import rows as module
from rime_fast.data.records import DataError
from rime_fast.data.rows import iter_rows, read_row

SIGN = st.sampled_from(["[", "]", ",", '"', "\\"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=6) | SIGN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("rows") / "file.json"


@settings(deadline=None)
@given(
    st.lists(VALUE, max_size=6),
    st.integers(1, 40),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.sampled_from(["", "\ufeff", " \n"]),
)
def test_a_list_comes_back_row_by_row(file, values, chunk, indent, ascii_only, before):
    file.write_text(before + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    with mock.patch.object(module, "_CHUNK", chunk):
        found = list(iter_rows(file))
    assert [row.value for row in found] == values
    assert [row.number for row in found] == list(range(1, len(values) + 1))
    assert [read_row(file, row.start, row.stop) for row in found] == values


@settings(deadline=None)
@given(st.lists(VALUE | st.just(...), min_size=1, max_size=6), st.booleans(), st.sampled_from(["", "\ufeff"]))
def test_jsonl_comes_back_line_by_line(file, values, ascii_only, before):
    values = [{"only": "row"}, *values]  # a first line that is a list would make the file one
    lines = ["" if value is ... else json.dumps(value, ensure_ascii=ascii_only) for value in values]
    file.write_text(before + "\n".join(lines), encoding="utf-8")
    found = list(iter_rows(file))
    assert [(row.number, row.value) for row in found] == [(i, v) for i, v in enumerate(values, 1) if v is not ...]
    assert [read_row(file, row.start, row.stop) for row in found] == [row.value for row in found]


def test_a_broken_line_is_a_row_with_an_error(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n{"b": "\xff"}\n{"c": 3}\n' + b"[" * 100_000 + b"\n" + b"9" * 5000)
    found = list(iter_rows(file))
    assert [row.number for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row.error is None for row in found] == [True, False, False, True, False, False]
    assert "is not JSON" in found[1].error
    assert "not UTF-8" in found[2].error
    assert found[4].error
    assert found[5].error == "holds a number of too many digits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": 2}\n', "line 3: is not a JSON list of rows: it breaks off"),
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', "line 3: .* expected a comma"),
        ('[{"a": 1},\n\n{"a": nope}]', "line 3: .* Expecting value"),
        ('[{"a": 1},\n{"a": "un', "line 2: .* Unterminated string"),
        ("[1, ]", "line 1: .* Expecting value"),
        ("[1,\n" + "9" * 5000 + "]", "line 2: .* a number of too many digits"),
        ("  ", "is empty"),
        ("", "is empty"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_broken_list_is_an_error_with_its_line(tmp_path, text, message, chunk):
    file = tmp_path / "a.json"
    file.write_text(text)
    with mock.patch.object(module, "_CHUNK", chunk), pytest.raises(DataError, match=message) as caught:
        list(iter_rows(file))
    assert caught.value.problems[0].file == str(file)


def test_bytes_that_are_no_text_are_an_error(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'[{"a": 1},\n"\xff\xfe"]')
    with pytest.raises(DataError, match="not UTF-8"):
        list(iter_rows(file))
    with pytest.raises(DataError, match="no such file"):
        iter_rows(tmp_path / "none.json")
