"""``rime-fast eval --suite`` from the command line: every layout of MMEB-V2 in one run with both modes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rime_fast.cli import main
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens
from tests.eval.suites.layout import GOLDENS, write_beir, write_goldens, write_mrmr, write_uvrb, write_v1
from tests.eval.suites.test_run import kept
from tests.eval.test_report import Page


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer(["find the picture of a cat in the video that shows it"])
    made = tiny_model("qwen2_vl", tokenizer=tokenizer, init_std=0.12)
    add_embedding_tokens(made, tokenizer)
    made.save_pretrained(folder)
    tiny_processor(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return str(write_goldens(tmp_path_factory.mktemp("mmeb")))


def command(suite: str, root: str, model: str, out: Path, *words: str) -> list[str]:
    base = ["eval", "--suite", suite, "--root", root, "--model", model, "--output_dir", str(out)]
    return [*base, "--protocol", "plain", "--device", "cpu", "--max_new_tokens", "4", *words]


def test_every_layout_in_one_command(root, model, tmp_path, capsys):
    words = command("mmeb-v2", root, model, tmp_path, "--tasks", ",".join(GOLDENS), "--modes", "disc,gen")
    board = tmp_path / "board.json"
    assert main([*words, "--dims", "16", "32", "--leaderboard", str(board)]) == 0
    printed = capsys.readouterr().out
    assert "image.RET" not in printed  # a group is there when all its tasks are
    assert "gen: " in printed
    assert "without <gen_emb>" in printed
    home = tmp_path / "mmeb-v2"
    summary = json.loads((home / "summary.json").read_text())
    assert summary["tasks"].keys() == GOLDENS.keys()
    assert all(
        task["cells"].keys() == {"disc-disc", "disc-gen", "gen-disc", "gen-gen"} for task in summary["tasks"].values()
    )
    assert summary["protocol"]["name"] == "plain"
    page = Page((home / "report.html").read_text())
    assert "24 of 78 tasks" in page.text
    for name in GOLDENS:
        assert name in page.text
    assert [image["alt"].split(":")[0] for image in page.all("img")] == [
        "best score of each group",
        "score by share of queries that decode",
    ]
    entry = json.loads(board.read_text())["metrics"]
    assert entry["image"]["N24News"] == "FILE_N/A"
    assert entry["video"]["MVBench"]["num_data"] == 20


@pytest.mark.parametrize(
    ("suite", "writer", "tasks"),
    [
        ("mmeb-v1", write_v1, "ImageNet-1K,MSCOCO_t2i"),
        ("mrmr", write_mrmr, ""),
        ("uvrb", write_uvrb, "MSRVTT,MS-TI"),
        ("beir", write_beir, ""),
    ],
)
def test_other_suites(suite, writer, tasks, model, tmp_path, capsys):
    words = command(suite, str(writer(tmp_path / "data")), model, tmp_path / "out", "--modes", "disc")
    words += ["--tasks", tasks] if tasks else []
    assert main(words) == 0
    assert "disc: 0.0 tokens" in capsys.readouterr().out
    assert (tmp_path / "out" / suite / "report.html").exists()


def test_shards_by_option_and_a_limited_run(root, model, tmp_path, capsys):
    few = ("--tasks", "WebQA,OK-VQA", "--modes", "disc")
    assert main(command("mmeb-v2", root, model, tmp_path / "one", *few)) == 0
    for shard in ("1/2", "0/2"):
        assert main(command("mmeb-v2", root, model, tmp_path / "two", *few, "--shard", shard)) == 0
    assert {k: v for k, v in kept(tmp_path / "one").items() if "report" not in k} == {
        k: v for k, v in kept(tmp_path / "two").items() if "report" not in k
    }
    limited = command("mmeb-v2", root, model, tmp_path / "three", *few, "--limit", "1")
    assert main(limited) == 0
    assert "PARTIAL (1 queries a task)" in capsys.readouterr().out
    assert main([*limited, "--leaderboard", str(tmp_path / "x.json")]) == 2
    assert "--leaderboard needs all queries" in capsys.readouterr().err


@pytest.mark.dist
def test_under_torchrun(root, model, tmp_path):
    words = command("mmeb-v2", root, model, tmp_path, "--tasks", "WebQA,OK-VQA", "--modes", "disc")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "rime_fast.cli", *words],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    assert (tmp_path / "mmeb-v2" / "summary.json").exists()


def test_check_names_gaps(root, tmp_path, capsys):
    words = ["eval", "--suite", "mmeb-v2", "--root", root, "--check", "--tasks"]
    assert main([*words, "OK-VQA,MSVD,K700"]) == 1
    printed = capsys.readouterr().out
    assert "1 queries; the published set has 1,000" in printed
    assert "no table of VLM2Vec/Kinetics-700" in printed
    assert "note: repeated names in lists: 1" in printed
    beir = str(write_beir(tmp_path))
    assert main(["eval", "--suite", "beir", "--root", beir, "--check"]) == 0
    assert "1 of 1 tasks are complete" in capsys.readouterr().out


def test_list_of_suites(capsys):
    assert main(["eval", "suites"]) == 0
    assert "mmeb-v2" in capsys.readouterr().out
    assert main(["eval", "suites", "--suite", "mmeb-v2"]) == 0
    assert "78 tasks, 83,530 queries" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "mmeb-v3", "--root", "."], "--suite is 'mmeb-v3'; expected mmeb-v2"),
        (["--suite", "mmeb-v2"], "--root is required"),
        (["--suite", "mmeb-v2", "--root", "/nowhere"], "--root /nowhere: no such directory"),
        (["--suite", "mmeb-v2", "--root", "."], "--model is required"),
        (["--suite", "mmeb-v2", "--root", ".", "--check", "--tasks", "X"], "tasks names 'X'"),
        (["--suite", "mmeb-v2", "--root", ".", "--check", "--protocol", "qwen3"], "protocol is 'qwen3'"),
        (["--suite", "mmeb-v2", "--root", ".", "--model", "x", "--shard", "2/2"], "--shard is '2/2'; expected i/n"),
        (["--model", "x", "--data", "y", "--ties", "official"], "--ties goes with --suite"),
    ],
)
def test_wrong_use(words, message, capsys):
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err
