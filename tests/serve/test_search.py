"""From a file of items to an index and its answers, by the commands."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from rime_fast.cli import main
from rime_fast.data.sources import write_rows
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.eval.index import EmbeddingIndex
from tests.serve.conftest import picture


@pytest.fixture(scope="module")
def embedded(model_dir, items_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    words = ["embed", "--model", str(model_dir), "--data", str(items_file), "--mode", "both", "--max_new_tokens", "4"]
    assert main([*words, "--output_dir", str(folder)]) == 0
    return folder


def build(embedded, folder, *more):
    return main(["index", str(embedded), "--output_dir", str(folder), *more])


def test_an_items_own_query_finds_it(embedded, items_file, tmp_path, capsys):
    assert build(embedded, tmp_path / "index") == 0
    assert "6 disc rows of 32 dimensions, exact" in capsys.readouterr().out
    index = EmbeddingIndex.load(tmp_path / "index")
    assert index.items[0]["id"] == "r"
    assert index.items[2] == {
        "row": 2,
        "id": None,
        "text": "which one",
        "images": [str(items_file.parent / "b.png")],
    } | {key: value for key, value in index.items[2].items() if key in ("rewrite", "tokens", "reached_gen_emb")}
    page = tmp_path / "pages" / "found.html"
    words = ["search", str(tmp_path / "index"), "--text", "which one", "--image", str(items_file.parent / "b.png")]
    assert main([*words, "--k", "3", "--html", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("'which one' [1 image(s)]  margin ")
    assert re.match(r"  1\.  1\.0000  row 2  which one  .*b\.png$", lines[1])
    assert len([line for line in lines if re.match(r" +\d+\.", line)]) == 3
    html = page.read_text()
    assert html.count("<li>") == 3
    assert html.count('<img alt="query" src="data:image/') == 1
    assert "which one" in html


def test_a_file_of_queries_in_mode_gen_on_fewer_dimensions(embedded, model_dir, items_file, tmp_path, capsys):
    pytest.importorskip("faiss")
    assert build(embedded, tmp_path, "--mode", "gen", "--dims", "16", "--faiss", "Flat") == 0
    words = [
        "search",
        str(tmp_path),
        "--queries",
        str(items_file),
        "--mode",
        "gen",
        "--max_new_tokens",
        "4",
        "--k",
        "1",
    ]
    assert main(words) == 0
    found = re.findall(r"^  1\. +([\d.]+)  row (\d)", capsys.readouterr().out, re.M)
    assert [int(row) for _, row in found] == list(range(6))
    assert all(float(score) > 0.9999 for score, _ in found)


def test_a_text_is_escaped_on_the_page(model_dir, tmp_path, capsys):
    rows = RimeEmbedder.from_pretrained(model_dir).encode(["a", "it"])
    items = [{"row": 0, "id": "x", "text": "<script>alert(1)</script>", "images": ["/gone.png"]}, {"row": 1, "id": "y"}]
    EmbeddingIndex(rows, items=items, facts={"mode": "disc", "model": str(model_dir)}).save(tmp_path / "index")
    page = tmp_path / "page.html"
    assert main(["search", str(tmp_path / "index"), "--text", "<b>a", "--html", str(page)]) == 0
    html = page.read_text()
    assert "<script>" not in html
    assert "&lt;b&gt;a" in html
    assert "id y" in html


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index"], "--embeddings is required"),
        (["index", "{tmp}"], "holds no embeddings.safetensors"),
        (["index", "{embedded}", "--mode", "latent"], "--mode is 'latent'; .* holds disc, gen"),
        (["index", "{embedded}", "--dims", "64"], "dims is 64; expected 1 to 32"),
        (["index", "{embedded}", "--data", "/gone.jsonl"], "--data /gone.jsonl: no such file"),
        (["index", "{embedded}", "--data", "{tmp}/two.txt"], "has 2 items; the embeddings have 6"),
        (["index", "{embedded}", "--output_dir", "{tmp}/i", "--faiss", "Nope"], "faiss is 'Nope'"),
        (["search", "{tmp}"], "give a query by --text, --image or both"),
        (["search", "{tmp}", "--text", "a", "--queries", "b.txt"], "give a query by --text, --image or both"),
        (["search", "{tmp}", "--text", "a"], "holds no index.json"),
        (["search", "{tmp}", "--text", "a", "--mode", "auto"], "--mode is 'auto'"),
        (["search", "{tmp}", "--text", "a", "--k", "0"], "--k is 0"),
    ],
)
def test_wrong_use_is_named(words, message, embedded, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a\nb\n")
    assert main([word.format(tmp=tmp_path, embedded=embedded) for word in words]) in (1, 2)
    assert re.search(message, capsys.readouterr().err)


def test_odd_characters_cost_no_embeddings(model_dir, tmp_path, capsys):
    ids = ["half \ud800", "one\u2028line"]
    data = tmp_path / "items.jsonl"
    words = ["embed", "--model", str(model_dir), "--data", str(data), "--output_dir", str(tmp_path / "embedded")]
    data.write_text("".join(json.dumps({"text": "it", "id": one}) + "\n" for one in ids))
    assert main(words) == 0
    assert build(tmp_path / "embedded", tmp_path / "index") == 0
    assert [item["id"] for item in EmbeddingIndex.load(tmp_path / "index").items] == ids
    data.write_text(json.dumps({"text": "it"}) + "\n" + json.dumps({"text": "half \ud800"}))
    assert main(words) == 1
    assert f"{data}, row 2, text: holds half a surrogate pair" in capsys.readouterr().err


def test_a_folder_whose_data_is_gone_still_answers_by_id(model_dir, tmp_path, capsys):
    data = tmp_path / "items.jsonl"
    picture(16, 16).save(tmp_path / "p.png")
    data.write_text("".join(json.dumps({"text": text, "id": text}) + "\n" for text in ("a", "it")))
    out = ["--output_dir", str(tmp_path / "embedded")]
    assert main(["embed", "--model", str(model_dir), "--data", str(data), *out]) == 0
    data.unlink()
    assert build(tmp_path / "embedded", tmp_path / "index") == 0
    assert "results will show ids only" in capsys.readouterr().out
    assert main(["search", str(tmp_path / "index"), "--text", "it", "--k", "1"]) == 0
    assert "row 1  id it" in capsys.readouterr().out


def test_an_id_that_is_no_unicode_is_shown(model_dir, tmp_path, capsys):
    """Half a surrogate, as JSON may escape it and a file's name may hold it."""
    rows = RimeEmbedder.from_pretrained(model_dir).encode(["a", "it"])
    items = [{"row": 0, "id": "x\ud800", "text": "red \udcff"}, {"row": 1, "id": "y"}]
    EmbeddingIndex(rows, items=items, facts={"mode": "disc", "model": str(model_dir)}).save(tmp_path / "index")
    page = tmp_path / "page.html"
    assert main(["search", str(tmp_path / "index"), "--text", "a", "--html", str(page)]) == 0
    assert "id x\\ud800  red \\udcff" in capsys.readouterr().out
    assert "red \\udcff" in page.read_text(encoding="utf-8")


def test_items_that_changed_since_they_were_embedded_are_refused(model_dir, tmp_path, capsys):
    data = tmp_path / "items.jsonl"
    data.write_text('{"text": "red"}\n{"text": "blue"}\n')
    words = ["embed", "--model", str(model_dir), "--data", str(data), "--output_dir", str(tmp_path / "e")]
    assert main(words) == 0
    data.write_text('{"text": "blue"}\n{"text": "red"}\n')
    assert build(tmp_path / "e", tmp_path / "i") == 2
    assert f"{data} has changed since it was embedded" in capsys.readouterr().err
    assert build(tmp_path / "e", tmp_path / "i", "--data", str(data)) == 0  # other texts to show, on purpose


def test_damaged_files_are_named(embedded, tmp_path, capsys):
    assert build(embedded, tmp_path / "i") == 0
    for name in ("index.json", "items.jsonl", "index.safetensors"):
        whole = (tmp_path / "i" / name).read_bytes()
        for broken in (b"{broken\n", b"3\n"):
            (tmp_path / "i" / name).write_bytes(broken)
            assert main(["search", str(tmp_path / "i"), "--text", "a"]) == 1
            assert f"{name} is damaged: " in capsys.readouterr().err
        (tmp_path / "i" / name).write_bytes(whole)
    folder = shutil.copytree(embedded, tmp_path / "e")
    (folder / "embeddings.safetensors").write_bytes(b"abc")
    assert build(folder, tmp_path / "i") == 1
    assert "embeddings.safetensors is damaged: " in capsys.readouterr().err


def test_an_embedded_folder_is_read_for_texts_too(model_dir, tmp_path, capsys):
    write_rows(tmp_path / "parts" / "a.parquet", [{"text": "red"}, {"text": "blue"}])
    words = ["embed", "--model", str(model_dir), "--data", str(tmp_path / "parts"), "--output_dir", str(tmp_path / "e")]
    assert main(words) == 0
    assert build(tmp_path / "e", tmp_path / "i") == 0
    assert [item["text"] for item in EmbeddingIndex.load(tmp_path / "i").items] == ["red", "blue"]


def test_an_index_is_not_written_over_and_an_empty_text_not_searched(embedded, model_dir, items_file, tmp_path, capsys):
    assert build(embedded, tmp_path) == 0
    before = (tmp_path / "items.jsonl").read_bytes()
    words = ["embed", "--model", str(model_dir), "--data", str(items_file), "--output_dir", str(tmp_path)]
    assert main(words) == 2
    assert "holds an index" in capsys.readouterr().err
    assert (tmp_path / "items.jsonl").read_bytes() == before
    assert main(["search", str(tmp_path), "--text", " "]) == 2
    assert "--text holds no text" in capsys.readouterr().err
