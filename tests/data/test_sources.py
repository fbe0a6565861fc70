"""Rows of every kind of source by number, and written again; archives read in place; what is kept about files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rime_fast.data import archives, json_rows
from rime_fast.data.archives import has_member, read_member
from rime_fast.data.cache import cache_folder, cached_array, replacing
from rime_fast.data.datasets import PairDataset, open_pairs
from rime_fast.data.formats import read_pairs, write_pairs
from rime_fast.data.images import load_image
from rime_fast.data.records import DataError, Pair, Side
from rime_fast.data.rows import iter_rows
from rime_fast.data.sources import open_rows, write_rows
from tests.data.builders import picture


def rows(n=7):
    return [{"query": {"text": f"q ü {i}"}, "target": {"text": f"t {i}", "id": str(i % 3)}} for i in range(n)]


def written(folder, kind):
    """rows() as that kind of source."""
    table = pyarrow.Table.from_pylist(rows())
    if kind in ("jsonl", "json", "parquet"):
        write_rows(folder / f"a.{kind}", rows())
        return folder / f"a.{kind}"
    if kind == "parts":
        (folder / "parts").mkdir()
        for i, start in enumerate((0, 3)):
            part = table.slice(start, 3 if i == 0 else 4)
            parquet.write_table(part, folder / "parts" / f"part-{i}.parquet", row_group_size=2)
        return folder / "parts"
    if kind == "pattern":
        return str(written(folder, "parts") / "part-*.parquet")
    if kind == "saved":
        datasets.Dataset.from_list(rows()).save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "arrow":
        with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
        return folder / "a.arrow"
    if kind == "dataset":
        return datasets.Dataset.from_list(rows())
    if kind == "iterable":
        return datasets.Dataset.from_list(rows()).to_iterable_dataset()
    return (row for row in rows())


KINDS = ["jsonl", "json", "parquet", "parts", "pattern", "saved", "arrow", "dataset", "iterable", "generator"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_rows(tmp_path, kind):
    source = open_rows(written(tmp_path, kind))
    assert len(source) == 7
    order = [3, 0, 6, 6, 2]
    assert [source.read(i)["query"]["text"] for i in order] == [f"q ü {i}" for i in order]
    found = list(source.between(2, 6))
    assert [row.value["target"]["text"] for row in found] == [f"t {i}" for i in range(2, 6)]
    assert [row.error for row in found] == [None] * 4
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i) for i in range(7)] == [source.read(i) for i in range(7)]
    pairs = list(PairDataset(written(tmp_path, kind) if kind == "generator" else open_again(tmp_path, kind)))
    assert [pair.target.id for pair in pairs] == [str(i % 3) for i in range(7)]


def open_again(folder, kind):
    inner = folder / "again"
    inner.mkdir()
    return written(inner, kind)


def test_an_iterable_is_read_once_in_its_order_and_no_further_than_asked():
    def endless():
        for i in range(10**9):
            yield {"query": {"text": str(i)}, "target": {"text": "t"}}

    dataset = PairDataset(endless(), max_rows=5)
    path = dataset.source.path
    assert [pair.query.text for pair in dataset] == list("01234")
    del dataset
    assert not os.path.exists(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_pairs_come_back_as_they_were_written(tmp_path, ending):
    picture(1).save(tmp_path / "a.png")
    pairs = [
        Pair(Side("q", rewrite="r"), Side("t", [str(tmp_path / "a.png")], id="1"), [Side("n")], "x", "set"),
        Pair(Side("half \ud800"), Side("t"), scores=[1.5]) if ending != "parquet" else Pair(Side("q"), Side("t")),
        Pair(Side("q"), Side("t"), positives=[Side("u", rewrite="v")], dataset="set"),
    ]
    file = tmp_path / f"a.{ending}"
    write_pairs(file, pairs)
    assert not list(tmp_path.glob(".*partial"))
    if ending == "parquet":
        found = list(read_pairs(file))
        assert [pair.query for pair in found] == [pair.query for pair in pairs]
        assert load_image(found[0].target.images[0]).tobytes() == picture(1).tobytes()
        write_pairs(file, [Pair(Side("q", [picture(3)]), Side("t"))])
        (pair,) = read_pairs(file)
        assert load_image(pair.query.images[0]).tobytes() == picture(3).tobytes()
    elif ending == "json":
        with pytest.raises(DataError, match=r"row 2, query.text: holds half a surrogate"):
            list(read_pairs(file))
    else:
        write_pairs(file, pairs[::2])
        assert list(read_pairs(file)) == pairs[::2]


def test_parquet_columns_are_those_of_all_rows(tmp_path):
    raw = [{"query": {"text": str(i)}, "target": {"text": "t"}, "scores": [1]} for i in range(1500)]
    raw[1200]["query"]["rewrite"], raw[1400]["dataset"], raw[1300]["scores"] = "late", "d", [0.5]
    write_rows(tmp_path / "a.parquet", raw)
    found = open_rows(tmp_path / "a.parquet")
    assert found.read(1200)["query"] == {"text": "1200", "rewrite": "late"}
    assert [found.read(i)["dataset"] for i in (0, 1400)] == [None, "d"]
    assert [found.read(i)["scores"] for i in (0, 1300)] == [[1.0], [0.5]]


def test_rows_without_common_columns_are_an_error_and_no_file(tmp_path):
    with pytest.raises(ValueError, match="rows 1 to 2 do not fit in columns"):
        write_rows(tmp_path / "a.parquet", [{"a": 1}, {"a": [2]}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 and nothing more", "is not a readable Parquet file"),
        ("a.arrow", b"ARROW1 and nothing more", "is not a readable Arrow file"),
        ("a.jsonl", "{}".encode("utf-16"), "is UTF-16; expected UTF-8"),
        ("a.json", b"[{}] tail", "line 1: is not a JSON list of rows: more follows its closing bracket"),
        ("a.json", b"[{}]\n[{}]", "line 2: .* more follows its closing bracket"),
        ("folder", None, "is a folder with neither"),
        ("none*.parquet", None, "no such file"),
        ("/dev/null", None, "is not a file"),
    ],
)
def test_what_is_no_source_is_named(tmp_path, name, content, message):
    path = tmp_path / name if not name.startswith("/") else name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=message):
        PairDataset(path)


# --- JSON lines ------------------------------------------------------------------------------------------------------

LINE = st.sampled_from(['{"a": 1}', "", " \t", '{"b": "é\\n"}', "nonsense", "3", "\r", " {}  "])


@settings(deadline=None, max_examples=60)
@given(st.lists(LINE, max_size=8), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.integers(1, 9))
def test_lines_by_number_are_those_of_the_stream(tmp_path_factory, lines, end, last, mark, chunk):
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = ("\ufeff" if mark else "") + '{"first": 0}' + end + end.join(lines) + (end if last else "")
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        source = open_rows(file)
        expected = [(row.number, row.value, row.error) for row in iter_rows(file)]
        assert [(row.number, row.value, row.error) for row in source.between(0, len(source))] == expected
        for i in reversed(range(len(source))):
            assert source.number(i) == expected[i][0]
        middle = len(source) // 2
        assert [row.number for row in source.between(middle, len(source))] == [n for n, _, _ in expected[middle:]]


def test_a_bad_line_is_named_when_it_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": {"text": "a"}, "target": {"text": "b"}}\n\n{"query": \n')
    dataset = PairDataset(tmp_path / "a.jsonl")
    assert dataset[0].query.text == "a"
    with pytest.raises(DataError, match=r"a.jsonl, row 3: is not JSON"):
        dataset[1]


def test_places_of_rows_are_kept_and_forgotten_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_CACHED_FROM", 0)
    write_rows(tmp_path / "a.json", rows())
    assert len(open_rows(tmp_path / "a.json")) == 7
    monkeypatch.setattr(json_rows, "iter_rows", None)  # a second look would fail
    assert len(open_rows(tmp_path / "a.json")) == 7
    monkeypatch.undo()
    write_rows(tmp_path / "a.json", rows(3))
    assert len(open_rows(tmp_path / "a.json")) == 3


def test_rows_of_datasets_that_fail_are_bad_rows():
    class Odd(list):
        def __getitem__(self, index):
            raise OSError("gone") if index == 1 else None or KeyError("x")

    with pytest.raises(DataError, match="mine, row 2: cannot be read: OSError: gone"):
        PairDataset(Odd([1, 2]), name="mine")[1]


def test_an_iterable_that_fails_names_the_row():
    def rows():
        yield {"query": {"text": "q"}, "target": {"text": "t"}}
        raise OSError("gone")

    before = set(os.listdir(cache_folder()))
    for on_bad_row in ("stop", "skip"):
        with pytest.raises(DataError, match=r"^mine, row 2: cannot be read: OSError: gone"):
            open_pairs(rows(), name="mine", on_bad_row=on_bad_row)
    assert set(os.listdir(cache_folder())) == before


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cut_image_in_a_dataset_is_a_bad_row(streamed):
    import io

    stream = io.BytesIO()
    picture(0, 64, 64).save(stream, "JPEG")
    whole = stream.getvalue()
    image = [{"bytes": data, "path": "a.jpg"} for data in (whole, whole[:-300], whole)]
    features = datasets.Features(
        {
            "query": {"text": datasets.Value("string"), "images": datasets.List(datasets.Image())},
            "target": {"text": datasets.Value("string")},
        }
    )
    raw = [{"query": {"text": "q", "images": [one]}, "target": {"text": "t"}} for one in image]
    table = datasets.Dataset.from_list(raw, features=features)
    from rime_fast.data.check import CheckRules

    rules = CheckRules(rewrites=False, images="decode")
    source = table.to_iterable_dataset() if streamed else table
    dataset, report = open_pairs(source, rules=rules, on_bad_row="skip")
    assert len(dataset) == 2
    assert str(report.problems[0]).startswith("dataset, row 2, query.images[0]: broken image: a.jpg")


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path):
    picture(1).save(tmp_path / "one.png")
    picture(2).save(tmp_path / "two.png")
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        out.add(tmp_path / "one.png", "./deep/one.png")
        out.add(tmp_path / "two.png", "deep/" + "long" * 60 + ".png")
        out.add(tmp_path, "folder", recursive=False)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.write(tmp_path / "one.png", "deep/one.png", zipfile.ZIP_STORED)
        out.write(tmp_path / "two.png", "deep/" + "long" * 60 + ".png", zipfile.ZIP_DEFLATED)
        out.mkdir("folder")
    return tmp_path


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_members_are_read_in_place(packed, name, monkeypatch):
    archive = str(packed / name)
    for member, seed in (("deep/one.png", 1), ("deep/" + "long" * 60 + ".png", 2)):
        assert load_image(f"{archive}::{member}").tobytes() == picture(seed).tobytes()
    assert has_member(archive, "deep/one.png")
    assert not has_member(archive, "folder")
    assert not has_member(str(packed / "none.zip"), "a")
    with pytest.raises(ValueError, match=f"missing image: .*{name}::gone.png"):
        load_image(f"{archive}::gone.png")
    archives._index.cache_clear()
    monkeypatch.setattr(archives, "_listed", None)  # the list is made once
    assert read_member(f"{archive}::deep/one.png")


def test_members_in_rows_and_in_workers(packed):
    raw = {
        "query": {"text": "q", "image": "a.tar::deep/one.png"},
        "target": {"text": "t", "image": "a.zip::deep/one.png"},
    }
    (packed / "rows.jsonl").write_text(json.dumps(raw))
    (pair,) = read_pairs(packed / "rows.jsonl")
    assert pair.query.images == [str(packed / "a.tar::deep/one.png")]
    code = f"from rime_fast.data.images import load_image; print(load_image({pair.target.images[0]!r}).size)"
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.stdout == "(16, 8)\n", done.stderr


def test_a_parquet_row_that_python_cannot_hold_is_a_bad_row(tmp_path):
    """A text that is no UTF-8, as other writers let through: the rows beside it stay."""
    offsets = np.array([0, 1, 3, 4], dtype=np.int32)
    buffers = [None, *map(pyarrow.py_buffer, (offsets, b"a\xff\xfeb"))]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    parquet.write_table(pyarrow.table({"query": texts}), tmp_path / "a.parquet")
    rows = open_rows(tmp_path / "a.parquet")
    assert [row.value for row in rows.between(0, 3)] == [{"query": "a"}, None, {"query": "b"}]
    assert [row.error is None for row in rows.between(0, 3)] == [True, False, True]
    with pytest.raises(DataError, match=r"a.parquet, row 2: cannot be read: 'utf-8' codec"):
        rows.read(1)


def test_members_that_cannot_be_unpacked_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as out:
        out.writestr("a.png", b"a" * 100)
    with pytest.raises(ValueError, match=r"a.zip::a.png \(a member that is encrypted, or packed by another method"):
        load_image(f"{tmp_path}/a.zip::a.png")
    whole = (tmp_path / "a.zip").read_bytes()
    at = whole.index(b"PK\x01\x02")
    # a version of the format that Python does not know; a name that is not the UTF-8 it says it is
    for name, place, value in (("new.zip", at + 6, b"\xff"), ("name.zip", at + 8, b"\x00\x08")):
        changed = whole[:place] + value + whole[place + len(value) :]
        (tmp_path / name).write_bytes(changed.replace(b"a.png", b"\xff.png"))
        with pytest.raises(ValueError, match=f"{name}::a.png .not a readable archive: "):
            load_image(f"{tmp_path / name}::a.png")


def test_archives_that_cannot_be_read_are_named(packed):
    (packed / "odd.zip").write_bytes(b"PK no zip")
    (packed / "odd.tar").write_bytes(b"no tar" * 200)
    (packed / "a.tgz").write_bytes(b"\x1f\x8b")
    whole = (packed / "a.zip").read_bytes()
    for name in ("odd.zip", "odd.tar", "a.tgz"):
        with pytest.raises(ValueError, match=f"broken image: .*{name}::x.png"):
            load_image(f"{packed / name}::x.png")
    (packed / "a.zip").write_bytes(whole.replace(b"PK\x03\x04", b"PK\x09\x09"))
    with pytest.raises(ValueError, match="was changed or is damaged"):
        load_image(f"{packed / 'a.zip'}::deep/one.png")


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_broken_entry_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("RIME_FAST_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return np.arange(5)

    for _ in range(2):
        assert cached_array(["k"], make).tolist() == [0, 1, 2, 3, 4]
    assert len(made) == 1
    (entry,) = tmp_path.glob("*.npy")
    entry.write_bytes(entry.read_bytes()[:20])
    assert cached_array(["k"], make).tolist() == [0, 1, 2, 3, 4]
    assert len(made) == 2


def test_a_partial_file_follows_no_link_and_orphans_go(tmp_path):
    target = tmp_path / "a.txt"
    orphan = tmp_path / ".a.txt.999999999.x.partial"
    orphan.write_text("old")
    os.utime(orphan, (1, 1))
    (tmp_path / "other").write_text("untouched")
    target.symlink_to(tmp_path / "other")
    with replacing(target) as stream:
        stream.write("new")
    assert (tmp_path / "other").read_text() == "untouched"
    assert target.read_text() == "new"
    assert not target.is_symlink()
    assert not orphan.exists()
    with pytest.raises(TypeError), replacing(target) as stream:
        print("half", file=stream, end=3)  # type: ignore[call-overload]
    assert target.read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2
