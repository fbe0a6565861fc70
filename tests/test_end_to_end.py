"""The whole way by the command line, on a tiny model made here: train -> resume -> refine -> eval -> embed.

Real images (coloured squares), real files, the commands as a user types them. About a minute on two cores.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rime_fast import cli
from rime_fast.data.templates import get_template
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
QUESTION = "which colour is this ?"
COMMON = ["--progress", "plain", "--seed", "7", "--dataloader_num_workers", "0", "--report_to", "none"]
TRAIN = ["--learning_rate", "1e-3", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "3"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a base model, training pairs, a retrieval set and settings."""
    root = tmp_path_factory.mktemp("work")
    texts = [get_template("rewrite").instruction, QUESTION, *COLOURS, "a square that is", "system user assistant"]
    tokenizer = tiny_tokenizer(texts)
    model = tiny_model("qwen2_vl", tokenizer=tokenizer, hidden=32, vision_hidden=16, seed=3)
    add_embedding_tokens(model, tokenizer)
    model.save_pretrained(root / "base")
    tiny_processor(tokenizer).save_pretrained(root / "base")
    pairs, queries = [], []
    for i, colour in enumerate(COLOURS):
        for shade in range(3):
            square = Image.new("RGB", (16, 16), colour)
            square.putpixel((shade, shade), (128, 128, 128))
            square.save(root / f"{colour}{shade}.png")
            query = {"text": QUESTION, "image": f"{colour}{shade}.png"}
            if shade < 2:
                asked = query | {"rewrite": f"a {colour} square"}
                pairs.append({"query": asked, "target": {"text": colour, "rewrite": colour}})
            else:
                queries.append({"query": query, "correct": i})
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    retrieval = {"name": "colours", "candidates": [{"text": colour} for colour in COLOURS], "queries": queries}
    (root / "test.json").write_text(json.dumps(retrieval))
    (root / "sft.yaml").write_text(f"model: {root}/base\ntrain_data: [{root}/pairs.jsonl]\nmax_steps: 6\n")
    return root


def run(work: Path, *words: object) -> int:
    return cli.main([str(word).replace("@", f"{work}/") for word in words])


def losses(directory: Path) -> dict[int, float]:
    state = json.loads((directory / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


@pytest.fixture(scope="module")
def sft(work) -> Path:
    """Six steps of joint training; settings partly from a file."""
    words = ["--output_dir", "@sft", "--eval_data", "@pairs.jsonl", *TRAIN, *COMMON]
    code = run(work, "train", "--config", "@sft.yaml", *words)
    assert code == 0
    return work / "sft"


@pytest.fixture(scope="module")
def refined(work, sft) -> Path:
    """Two steps of Refine-RL on top."""
    code = run(
        work,
        "refine",
        "--model",
        "@sft",
        "--train_data",
        "@pairs.jsonl",
        "--output_dir",
        "@refine",
        "--max_steps",
        2,
        "--num_generations",
        2,
        "--max_completion_length",
        12,
        "--learning_rate",
        "1e-4",
        "--per_device_train_batch_size",
        4,
        "--logging_steps",
        1,
        *COMMON,
    )
    assert code == 0
    return work / "refine"


def test_training_leaves_a_model_its_state_and_a_report(work, sft):
    assert {"model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"} <= set(names(sft))
    assert {"checkpoint-3", "checkpoint-6", "trainer_state.json", "report.html", "report.json"} <= set(names(sft))
    curve = losses(sft)
    assert list(curve) == [1, 2, 3, 4, 5, 6]
    assert curve[6] < curve[1]
    history = json.loads((sft / "trainer_state.json").read_text())["log_history"]
    for name in ("ce/query", "contrast/gen-disc", "hit@1/gen-gen", "samples_per_second", "tokens_per_second"):
        assert name in history[0]
    assert any("eval_loss" in entry for entry in history)
    assert '"Joint training"' in (sft / "report.json").read_text()


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_resume_continues_the_same_curve(work, sft):
    """From the middle checkpoint on: the same losses to the last bit, the same weights."""
    (work / "resumed").mkdir()
    shutil.copytree(sft / "checkpoint-3", work / "resumed" / "checkpoint-3")
    code = run(
        work,
        "train",
        "--config",
        "@sft.yaml",
        "--output_dir",
        "@resumed",
        "--resume_from_checkpoint",
        "last",
        "--report",
        "false",
        *TRAIN,
        *COMMON,
    )
    assert code == 0
    assert losses(work / "resumed") == losses(sft)
    before, after = load_file(sft / "model.safetensors"), load_file(work / "resumed" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_refine_logs_its_reward_and_changes_the_model(sft, refined):
    history = json.loads((refined / "trainer_state.json").read_text())["log_history"]
    assert all(name in history[0] for name in ("reward/total", "rewrite_tokens", "kl"))
    before, after = load_file(sft / "model.safetensors"), load_file(refined / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "Refine-RL" in (refined / "report.html").read_text()


def test_eval_compares_both_models_in_one_report(work, sft, refined, capsys):
    code = run(
        work,
        "eval",
        "--model",
        "@sft",
        "@refine",
        "--data",
        "@test.json",
        "--output_dir",
        "@eval",
        "--max_new_tokens",
        12,
        "--examples",
        4,
        "--dims",
        "8,full",
    )
    assert code == 0
    assert "gen-disc @ 8" in capsys.readouterr().out
    report = json.loads((work / "eval" / "report.json").read_text())
    assert [phase["label"] for phase in report["phases"]] == ["sft", "refine"]
    for phase in report["phases"]:
        cells = phase["mutual"]["cells"]
        assert set(cells) == {"disc-disc", "disc-gen", "gen-disc", "gen-gen"}
        for cell in cells.values():
            assert 0 <= cell["hit@1"] <= cell["mrr"] <= 1
        assert (phase["mutual"]["n_queries"], phase["mutual"]["n_candidates"]) == (8, 8)
        assert set(phase["mutual"]["dims"]["8"]) == set(cells)
        assert phase["mutual"]["cost"]["disc"]["query_tokens"] == 0
        assert 1 <= phase["mutual"]["cost"]["gen"]["query_tokens"] <= 12
        assert phase["log_history"]
    html = (work / "eval" / "report.html").read_text()
    assert html.count('<article class="card">') == 4
    assert "data:image/png;base64" in html


def test_embed_writes_what_the_embedder_makes(work, sft, capsys):
    (work / "items.jsonl").write_text(
        "".join(json.dumps({"id": c, "text": QUESTION, "image": f"{c}2.png"}) + "\n" for c in COLOURS[:3])
    )
    code = run(
        work,
        "embed",
        "--model",
        "@sft",
        "--data",
        "@items.jsonl",
        "--mode",
        "both",
        "--output_dir",
        "@index",
        "--max_new_tokens",
        12,
    )
    assert code == 0
    found = load_file(work / "index" / "embeddings.safetensors")
    lines = [json.loads(line) for line in (work / "index" / "items.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == COLOURS[:3]
    embedder = RimeEmbedder.from_pretrained(sft, max_new_tokens=12)
    items = [{"text": QUESTION, "image": str(work / f"{c}2.png")} for c in COLOURS[:3]]
    gen, rewrites = embedder.encode(items, mode="gen", return_rewrites=True)
    torch.testing.assert_close(found["disc"], embedder.encode(items), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["gen"], gen, rtol=0, atol=1e-6)
    assert [line["rewrite"] for line in lines] == rewrites
    assert all(line["tokens"] >= 1 for line in lines)


def test_bad_rows_stop_before_the_first_step(work, capsys):
    rows = (work / "pairs.jsonl").read_text().splitlines()[:4]
    broken = json.loads(rows[1])
    broken["query"]["image"] = "gone.png"
    rows[1] = json.dumps(broken)
    (work / "bad.jsonl").write_text("\n".join(rows) + "\n")
    words = ["train", "--model", "@base", "--train_data", "@bad.jsonl", "--output_dir", "@bad", "--max_steps", 1]
    words += ["--per_device_train_batch_size", 2, *COMMON]
    assert run(work, *words) == 1
    message = capsys.readouterr().err
    assert "bad.jsonl, row 2, query.images[0]: missing image" in message
    assert run(work, *words, "--on-bad-row", "skip") == 0


def test_ctrl_c_saves_a_checkpoint_and_says_where(work):
    """A real signal to a real process: exit code 130, the checkpoint's folder in the message, resumable."""
    words = ["train", "--config", f"{work}/sft.yaml", "--output_dir", f"{work}/stopped", "--max_steps", "4000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rime_fast.cli", *words, *TRAIN, *COMMON, "--save_strategy", "no"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "joint training: 2/" in line:
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=300)
    text = "".join(lines) + rest
    assert process.returncode == 130, text
    saved = next((work / "stopped").glob("checkpoint-*"))
    assert str(saved) in text
    assert (saved / "trainer_state.json").is_file()


def test_lora_leaves_a_merged_model_and_the_adapter(work):
    pytest.importorskip("peft")
    words = ["--output_dir", "@lora", "--max_steps", 1, "--lora_rank", 2, "--report", "false", *TRAIN, *COMMON]
    assert run(work, "train", "--config", "@sft.yaml", *words) == 0
    assert (work / "lora" / "adapter" / "adapter_config.json").is_file()
    rows = RimeEmbedder.from_pretrained(work / "lora").encode([QUESTION, "red"])
    assert torch.isfinite(rows).all()
    adapter = RimeEmbedder.from_pretrained(work / "lora" / "adapter").encode([QUESTION, "red"])
    torch.testing.assert_close(adapter, rows, rtol=0, atol=1e-5)
    names_on_disk = load_file(work / "lora" / "model.safetensors").keys()
    assert not [name for name in names_on_disk if "lora" in name or "base_model" in name]


def test_resuming_where_nothing_is_starts_fresh(work, capsys):
    """A requeued job always passes it."""
    words = ["--output_dir", "@nothing", "--max_steps", 1, "--resume_from_checkpoint", "last", *TRAIN, *COMMON]
    assert run(work, "train", "--config", "@sft.yaml", *words) == 0
    assert "no checkpoint there, a fresh start" in capsys.readouterr().err
