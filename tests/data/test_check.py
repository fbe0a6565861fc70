"""The validation pass names file, row and field of every bad row, and writes the good ones out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from rime_fast.data import check
from rime_fast.data.check import CheckRules, check_file, check_pair
from rime_fast.data.check_command import CheckOptions, run_check
from rime_fast.data.collate import Collator
from rime_fast.data.datasets import open_pairs
from rime_fast.data.formats import read_pairs
from rime_fast.data.records import DataError, Pair, Side
from rime_fast.data.rows import iter_rows
from rime_fast.model.tiny import tiny_config
from tests.data.builders import config, picture, processor


def row(text="what", image="good.png", rewrite="r", **extra):
    query = {"text": text, "image": image, "rewrite": rewrite}
    return {"query": query, "target": {"text": "t", "rewrite": "s"}, **extra}


@pytest.fixture
def folder(tmp_path):
    picture(0).save(tmp_path / "good.png")
    picture(0, 32, 32).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) - 200])
    (tmp_path / "text.png").write_text("not an image")
    Image.new("RGB", (402, 2)).save(tmp_path / "thin.png")
    return tmp_path


BAD = [
    (row(image="gone.png"), "query.images[0]", "missing image: {0}/gone.png"),
    (row(image="text.png"), "query.images[0]", "broken image: {0}/text.png"),
    (row(image="half.jpg"), "query.images[0]", "broken image: {0}/half.jpg"),
    (row(image="thin.png"), "query.images[0]", "image is 402 x 2; Qwen's resizing takes at most 1 : 200"),
    (row(rewrite=" "), "query.rewrite", "empty rewrite"),
    (row(rewrite=None), "query.rewrite", "missing rewrite"),
    (row(text="see <|im_end|>"), "query.text", "holds '<|im_end|>', which the model would take for a control token"),
    (row(rewrite="a\n<gen_emb>"), "query.rewrite", "holds '<gen_emb>'"),
    (row(text="x" * 200_001), "query.text", "200001 characters; more than 200000 are absurd"),
    (row(image=["good.png"] * 65), "query.images", "65 images; more than 64 are absurd"),
    (row(imgae="a.png"), "imgae", "unknown key"),
    (row(image=3), "query.image", "is a number; expected the path of an image"),
    ({"a": 1}, "", "is an object with keys ['a']; expected a row of"),
]


def write_lines(path, rows):
    path.write_text("".join((raw if isinstance(raw, str) else json.dumps(raw)) + "\n" for raw in rows))
    return path


def test_every_kind_of_bad_row_is_named_and_the_good_ones_are_kept(folder):
    rows = [row(), *(bad for bad, _, _ in BAD), '{"query": ', row(text="last")]
    file = write_lines(folder / "rows.jsonl", rows)
    out = folder / "good.jsonl"
    report = check_file(file, CheckRules(images="decode"), write_good=out)
    assert (report.rows, report.good_rows, report.bad_rows) == (len(rows), 2, len(BAD) + 1)
    assert len(report.problems) == len(BAD) + 1
    for number, (problem, (_, field, message)) in enumerate(zip(report.problems, BAD, strict=False), 2):
        assert (problem.file, problem.row, problem.field) == (str(file), number, field)
        assert problem.problem.startswith(message.format(folder))
    assert report.problems[-1].row == len(rows) - 1
    assert "is not JSON" in report.problems[-1].problem
    assert [pair.query.text for pair in read_pairs(out)] == ["what", "last"]
    assert [found.value for found in iter_rows(out)] == [row(), row(text="last")]
    assert check_file(out).ok
    assert not list(folder.glob("*.partial"))


def test_images_are_read_as_far_as_asked(folder):
    file = write_lines(folder / "rows.jsonl", [row(image=name) for name in ("half.jpg", "text.png", "good.png")])
    counts = [check_file(file, CheckRules(images=images)).bad_rows for images in ("decode", "head", "skip")]
    assert counts == [2, 1, 0]
    with pytest.raises(ValueError, match="images is 'all'"):
        CheckRules(images="all")  # type: ignore[arg-type]


def test_fields_are_those_of_the_format(folder):
    sft = {
        "qry": {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "image": ["good.png", "gone.png"],
        },
        "pos": {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b<gen_emb>"}],
            "video": ["gone.png"],
        },
    }
    rl = {"qry_text": "a", "qry_image": "gone.png", "pos_text": "b", "pos_video": ["good.png", "gone.png"]}
    file = folder / "rows.json"
    file.write_text(json.dumps([sft, rl]))
    report = check_file(file)
    assert [(problem.row, problem.field) for problem in report.problems] == [
        (1, "qry.conversations[1].value"),
        (1, "qry.image[1]"),
        (1, "pos.video[0]"),
        (2, "qry_image[0]"),
        (2, "pos_video[1]"),
    ]
    assert dict(report.formats) == {"rime-sft": 1, "rime-rl": 1}


def test_rewrites_are_asked_for_where_they_are_needed(folder):
    rl = {"qry_text": "a", "pos_text": "b"}
    file = write_lines(folder / "rows.jsonl", [rl, row(rewrite=None), row(negatives=[{"text": "n"}])])
    bad = {mode: check_file(file, CheckRules(rewrites=mode)).bad_rows for mode in (None, True, False)}
    assert bad == {None: 1, True: 2, False: 0}


def test_length_in_tokens():
    made = Collator(processor(), "rewrite", config())
    short, long = Side("cat", rewrite="a"), Side("cat " * 50, rewrite="a", id="l")
    limit = made.measure([short])[0]
    rules = CheckRules(max_length=limit, measure=made.measure)
    assert check_pair(Pair(short, short), rules) == []
    ((field, problem),) = check_pair(Pair(short, long), rules)
    assert field == "target"
    assert problem == f"{made.measure([long])[0]} tokens; max_length is {limit}"


def test_a_broken_list_ends_the_pass_with_what_was_found(folder):
    file = folder / "rows.json"
    file.write_text(json.dumps([row(), row(image="gone.png"), row()])[:-1])
    report = check_file(file, write_good=folder / "good.json")
    assert [(problem.row, problem.field) for problem in report.problems] == [(2, "query.images[0]"), (0, "line 1")]
    assert json.loads((folder / "good.json").read_text()) == [row(), row()]
    assert not check_file(folder / "none.json").ok


def test_report_as_data_and_text(folder):
    file = write_lines(folder / "rows.jsonl", [row(), row(image="gone.png")])
    report = check_file(file)
    assert report.summary() == f"{file}: 1 of 2 rows are good (2 rime-jsonl), 1 bad"
    assert json.loads(json.dumps(report.to_json()))["problems"][0]["row"] == 2
    with pytest.raises(ValueError, match=r"rows.jsonl, row 2, query.images\[0\]: missing image"):
        report.raise_if_bad()


def test_command(folder, capsys):
    good = write_lines(folder / "a.jsonl", [row()])
    bad = write_lines(folder / "b.jsonl", [row(), *[row(image="gone.png")] * 3])
    assert run_check(CheckOptions(files=[str(good)])) == 0
    report = folder / "report.json"
    options = CheckOptions(files=[str(good), str(bad), str(folder / "none")], report=str(report), max_shown=2)
    assert run_check(options) == 1
    out = capsys.readouterr().out
    assert f"{bad}, row 2, query.images[0]: missing image: {folder}/gone.png\n" in out
    assert "... and 1 more\n" in out
    assert f"{folder / 'none'}: no such file\n" in out
    assert [entry["bad_rows"] for entry in json.loads(report.read_text())] == [0, 3, 0]
    written = folder / "sub" / "good.jsonl"
    assert run_check(CheckOptions(files=[str(bad)], write_good=str(written))) == 1
    assert f"start from {folder}" in capsys.readouterr().out
    assert check_file(written, image_root=folder).ok


def test_command_measures_with_a_model(folder, capsys):
    file = write_lines(folder / "rows.jsonl", [row(), row(text="cat " * 300)])
    processor().save_pretrained(folder / "model")
    tiny_config("qwen2_vl", vocab_size=320).save_pretrained(folder / "model")
    assert run_check(CheckOptions(files=[str(file)], model=str(folder / "model"), max_length=300)) == 1
    out = capsys.readouterr().out
    assert "row 2, query: " in out
    assert "tokens; max_length is 300" in out


def test_command_on_a_retrieval_set(folder, capsys):
    whole = {
        "candidates": [{"image": "good.png"}, {"image": "gone.png"}],
        "queries": [
            {"query": {"text": "a"}, "correct": 0},
            {"query": {"text": "b", "image": "text.png"}, "correct": 1},
        ],
    }
    file = folder / "eval.json"
    file.write_text(json.dumps(whole, indent=1))
    assert run_check(CheckOptions(files=[str(file)])) == 1
    out = capsys.readouterr().out
    assert f"{file}, row 2, query.images[0]: broken image" in out
    assert f"{file}, candidates[1].images[0]: missing image" in out
    assert f"{file}: 1 of 2 rows are good (2 retrieval set), 1 bad" in out
    whole["queries"][1]["query"].pop("image")
    whole["candidates"][1]["image"] = "good.png"
    file.write_text(json.dumps(whole))
    assert run_check(CheckOptions(files=[str(file)])) == 0
    assert run_check(CheckOptions(files=[str(file)], max_image_pixels=127)) == 1
    assert "candidates[0].images[0]: image too large" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", " [ ]\n"])
def test_command_on_a_file_without_rows(content, tmp_path, capsys):
    (tmp_path / "empty.json").write_text(content)
    assert run_check(CheckOptions(files=[str(tmp_path / "empty.json")])) == 1
    assert f"{tmp_path / 'empty.json'}: is empty" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": []}, "files is empty"),
        ({"files": ["a", "b"], "write_good": "c"}, "one file at a time"),
        ({"files": ["a"], "model": "m"}, "model and max_length go together"),
        ({"files": ["a"], "rewrites": "some"}, "rewrites is 'some'"),
    ],
)
def test_command_errors(options, message):
    with pytest.raises(ValueError, match=message):
        run_check(CheckOptions(**options))


def test_the_checked_file_is_not_written_over(folder):
    file = write_lines(folder / "rows.jsonl", [row()])
    with pytest.raises(ValueError, match="the file being checked"):
        check_file(file, write_good=folder / "." / "rows.jsonl")
    assert file.read_text()


# --- whole files: in parallel, once, by samples ----------------------------------------------------------------------


def many(folder, n=60):
    rows = [row(text=f"q {i}", image="good.png" if i % 7 else f"gone{i}.png") for i in range(n)]
    return write_lines(folder / "many.jsonl", rows)


def test_processes_find_what_one_finds(folder, monkeypatch):
    monkeypatch.setattr(check, "_PART", 7)
    file = many(folder)
    one = check_file(file, workers=1, fresh=True)
    two = check_file(file, workers=2, fresh=True)
    assert one.to_json() == two.to_json()
    assert one.bad_rows == 9


@pytest.mark.slow  # each process imports transformers
def test_processes_measure_too(folder, monkeypatch):
    monkeypatch.setattr(check, "_PART", 7)
    made = Collator(processor(), "rewrite", config())
    rules = CheckRules(max_length=300, measure=made.measure)
    one, two = (check_file(many(folder), rules, workers=workers, fresh=True) for workers in (1, 2))
    assert one.to_json() == two.to_json()


def test_the_check_starts_without_torch():
    """Its processes are started for one file: they must not take longer to import than to look."""
    code = "import sys, rime_fast.data.check; print({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "set()\n", done.stderr


def test_a_verdict_is_kept_until_something_changes(folder, monkeypatch):
    file = many(folder, 14)
    os.mkdir(folder / "elsewhere")
    first = check_file(file, image_root=folder)
    looked = []
    real = check.check_row
    monkeypatch.setattr(check, "check_row", lambda *given: looked.append(1) or real(*given))

    def again(rules=None, **options):
        looked.clear()
        report = check_file(file, rules, image_root=folder, **options)
        return len(looked), report.to_json() == first.to_json()

    assert again() == (0, True)
    assert again(fresh=True) == (14, True)
    assert again(CheckRules(max_characters=10)) == (14, True)
    assert again(CheckRules(images="skip"))[0] == 14
    assert again(CheckRules(measure=lambda sides: [1], max_length=5)) == (14, True)  # cannot say what it depends on
    picture(1).save(folder / "gone0.png")  # the folder of images has changed
    assert again() == (14, False)
    with file.open("a") as stream:
        stream.write("\n")
    assert again()[0] == 14
    assert again()[0] == 0


def test_a_verdict_on_a_folder_that_no_file_system_names_is_kept(folder):
    write_lines(folder / "half.jsonl", [row(image="\ud800/a.png"), row()])
    for _ in range(2):
        (problem,) = check_file(folder / "half.jsonl").problems
        assert (problem.row, problem.field) == (1, "query.images[0]")


def test_ranks_of_a_node_look_once(folder):
    file = many(folder, 20)
    code = (
        "from rime_fast.data import check; real = check.check_row\n"
        "looked = []; check.check_row = lambda *given: looked.append(1) or real(*given)\n"
        f"print(len(looked if (found := check.check_file({str(file)!r})) else []), found.good_rows)"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": paths}
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    found = sorted(tuple(map(int, rank.communicate()[0].split())) for rank in ranks)
    assert found == [(0, 17), (20, 17)]


def test_a_sample(folder):
    file = many(folder)
    report = check_file(file, sample=20)
    assert (report.rows, report.of) == (20, 60)
    assert report.summary().endswith("a sample of 60")
    assert set(map(str, report.problems)) < set(map(str, check_file(file).problems))
    assert check_file(file, sample=100).of is None
    with pytest.raises(ValueError, match="write_good and sample exclude each other"):
        check_file(file, sample=3, write_good=folder / "good.jsonl")


def test_the_pairs_know_their_tokens(folder):
    made = Collator(processor(), "rewrite", config())
    file = write_lines(folder / "rows.jsonl", [row(), row(image="gone.png"), row(text="cat " * 9)])
    rules = CheckRules(max_length=300, measure=made.measure)
    dataset, _ = open_pairs(file, rules=rules, on_bad_row="skip")
    assert dataset.tokens.tolist() == [sum(made.measure([p.query, p.target])) for p in dataset]
    estimated, _ = open_pairs(file, on_bad_row="skip")
    assert estimated.tokens[1] > estimated.tokens[0]


def test_tags_in_a_rewrite_are_found_without_a_limit(folder):
    file = write_lines(folder / "rows.jsonl", [row(rewrite="a </rewrite> b"), row(rewrite="a <rewrite>")])
    report = check_file(file, CheckRules(images="skip"))
    assert [problem.field for problem in report.problems] == ["query.rewrite"] * 2
    assert report.problems[0].problem.startswith("holds '</rewrite>'")


def test_a_token_in_two_parts_is_named_at_the_first(folder):
    parts = [{"image": "good.png"}, {"text": "see <gen_"}, {"text": "emb>"}]
    raw = row()
    raw["query"] = {"content": parts, "rewrite": "r"}
    (problem,) = check_file(write_lines(folder / "rows.jsonl", [raw])).problems
    assert (problem.field, problem.problem[:17]) == ("query.content[1].text", "holds '<gen_emb>'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": Side("a", rewrite="b </rewrite>")}, "query.rewrite: holds '</rewrite>'"),
        ({"target": Side("a <|im_end|>", rewrite="b")}, r"target.text: holds '<\|im_end\|>'"),
        ({"target": Side("\ud800", rewrite="b")}, "target.text: holds half a surrogate pair"),
        ({"negatives": [Side("a"), Side("<gen_emb>")]}, r"negatives\[1\].text: holds '<gen_emb>'"),
        ({"positives": [Side("<gen_emb>", rewrite="b")]}, r"targets\[1\].text: holds '<gen_emb>'"),
        ({"query": Side(5, rewrite="b")}, "query.text: is a number; expected text"),
        ({"query": Side("a", "good.png", rewrite="b")}, "query.images: is text; expected a list of images"),
        ({"target": "a"}, "target: is text; expected a Side"),
    ],
)
def test_pairs_of_the_caller_are_checked_like_rows(change, message):
    good = Pair(Side("a", rewrite="b"), Side("c", rewrite="d"))
    pairs = [good, replace(good, **change)]
    with pytest.raises(DataError, match=f"^dataset, row 2, {message}"):
        open_pairs(pairs)
    assert len(open_pairs(pairs, on_bad_row="skip")[0]) == 1


def test_command_options_for_files_from_outside(folder, capsys):
    (folder / "rows").mkdir()
    file = write_lines(folder / "rows" / "rows.jsonl", [row(image="../good.png"), row(image=None)])
    assert run_check(CheckOptions(files=[str(file)])) == 1
    assert "row 1, query.image: ../good.png is outside of image_root" in capsys.readouterr().out
    assert run_check(CheckOptions(files=[str(file)], allow_outside=True)) == 0
    assert run_check(CheckOptions(files=[str(file)], allow_outside=True, max_image_pixels=100)) == 1
    assert "image too large" in capsys.readouterr().out
    assert run_check(CheckOptions(files=[str(file)], allow_outside=True, sample=1, workers=1, fresh=True)) == 0
    assert "a sample of 2" in capsys.readouterr().out
    url = write_lines(folder / "url.jsonl", [row(image=f"file://{folder}/good.png")])
    assert [run_check(CheckOptions(files=[str(url)], allow_urls=allowed)) for allowed in (False, True)] == [1, 0]
