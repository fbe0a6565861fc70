"""What the pages say to type works: Python blocks run, commands are understood, targets of make exist.

A block that cannot run here (another engine, a server, a benchmark's data, a name that only the text explains) begins
with ```python fragment; test_docs.py still compiles it and looks up its names.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from safetensors.torch import save_file

from rime_fast import RefineConfig, RimeConfig, RimeEmbedder
from rime_fast.cli import COMMANDS, load
from rime_fast.cli.options import parse_arguments, read_yaml
from rime_fast.cli.values import build, coerce
from rime_fast.data.examples import example
from rime_fast.data.sources import write_rows
from rime_fast.data.templates import get_template
from rime_fast.eval.index import EmbeddingIndex
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = re.compile(r"```python\n(.*?)```", re.S)
SHELL = re.compile(r"```(?:bash|sh|shell)\n(.*?)```", re.S)


# --- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Iterator[Path]:
    """A folder that holds, tiny, what the pages' examples read; the working directory of the blocks."""
    root = tmp_path_factory.mktemp("desk")
    words = [get_template("rewrite").instruction, "a text red shoe tabby cat Find this animal. what is this ?"]
    tokenizer = tiny_tokenizer(words)
    model = tiny_model("qwen2_vl", tokenizer=tokenizer, hidden=32, layers=1, vision_hidden=16, vision_layers=1)
    add_embedding_tokens(model, tokenizer)
    for name in ("runs/sft", "runs/demo/sft", "runs/refine"):
        model.save_pretrained(root / name)
        tiny_processor(tokenizer).save_pretrained(root / name)
    Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8)).save(root / "cat.png")
    pairs = [
        {"query": {"text": f"a {i}", "rewrite": "cat"}, "target": {"text": f"b {i}", "rewrite": "a cat"}}
        for i in range(32)
    ]
    (root / "RIME-SFT").mkdir()
    for name in ("pairs.json", "RIME-SFT/docs.json"):
        (root / name).write_text(json.dumps(pairs))
    for name in ("pairs.jsonl", "a.jsonl", "b.parquet", "MMEB-train/ImageNet_1K/train.parquet"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(root / name, iter(pairs))
    bare = [{side: {"text": pair[side]["text"]} for side in ("query", "target")} for pair in pairs[:6]]
    write_rows(root / "raw.jsonl", iter(bare))
    rows = torch.nn.functional.normalize(torch.randn(7, 32), dim=1)
    EmbeddingIndex(rows, items=[{"id": str(i)} for i in range(7)]).save(root / "runs" / "index")
    for name, mode in (("embedded", "disc"), ("queries", "gen")):
        (root / "runs" / name).mkdir()
        save_file({mode: rows}, root / "runs" / name / "embeddings.safetensors")
    before = os.getcwd()
    os.chdir(root)
    yield root
    os.chdir(before)


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    """What torchrun gives, with one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pages_with_blocks() -> list[Any]:
    return [pytest.param(page, id=page.stem) for page in PAGES if RUNS.search(page.read_text())]


@pytest.mark.parametrize("page", pages_with_blocks())
def test_the_blocks_of_a_page_run(page, desk, request):
    """In their order, in one namespace."""
    space: dict[str, Any] = {}
    if page.stem == "data":  # "a processor and a model"
        embedder = RimeEmbedder.from_pretrained("runs/sft")
        space = {"processor": embedder.processor, "model": embedder.model}
    for text in RUNS.findall(page.read_text()):
        if "dist.get_rank()" in text:
            request.getfixturevalue("one_rank")
        text = text.replace("Qwen/Qwen2-VL-2B-Instruct", "runs/sft")
        text = re.sub(r"^ *deepspeed=.*\n", "        use_cpu=True,\n", text, flags=re.M)  # needs a launcher
        exec(compile(text, str(page), "exec"), space)
    if page.stem == "api":
        assert space["hidden"].grad.shape == space["hidden"].shape
        assert space["keys"]["gen"].grad is not None
        assert space["advantages"].mean(dim=1).abs().max() < 1e-5


# --- commands --------------------------------------------------------------------------------------------------------


def typed() -> list[Any]:
    """(page, words after the program) of every call of our command line on the pages and in the command's own help."""
    found = []
    texts = [(page.name, text) for page in PAGES for text in SHELL.findall(page.read_text())]
    texts += [(f"{name} --help", line) for name in COMMANDS for _, line in load(name).examples]
    for place, text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if any(sign in words for sign in ("|", ">", "&&")):
                words = words[: min(words.index(sign) for sign in ("|", ">", "&&") if sign in words)]
            if "rime-fast" in words:
                words = words[words.index("rime-fast") + 1 :]
            elif "rime_fast.cli" in words:
                words = words[words.index("rime_fast.cli") + 1 :]
            else:
                continue
            found.append(pytest.param(words, id=f"{place}: {' '.join(words)[:60]}"))
    return found


@pytest.mark.parametrize("words", typed())
def test_commands_are_understood(words, tmp_path):
    """The command is there, its options have these names and take these values; settings files in the tree hold, and a
    trainer's settings are made of them."""
    name = max((one for one in COMMANDS if words[: len(one.split())] == one.split()), key=len, default=None)
    assert name is not None, f"no such command: {words}"
    command = load(name)
    rest = [word for word in words[len(name.split()) :] if word not in ("--help", "--help_all")]
    given = parse_arguments(rest, command.options(), command.positional)
    values: dict[str, Any] = {}
    for path in given.pop("config", []):
        if Path(found := example(path)).is_file():
            values |= read_yaml(found, command.options())
    values |= given
    for group in command.groups:
        hints = get_type_hints(getattr(importlib.import_module(group.module), group.cls))
        for option in group.options().keys() & values.keys():
            coerce(values[option], hints[option], f"--{option}")
    if trainer := {"train": RimeConfig, "refine": RefineConfig}.get(name):
        values.pop("deepspeed", None)  # needs a launcher
        build(trainer, values | {"output_dir": str(tmp_path)})


def test_targets_of_make_exist():
    text = "\n".join(page.read_text() for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "Makefile"])
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.M))
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert len(named) > 5
    assert named <= there, named - there


def test_modules_that_pages_start_exist():
    text = "\n".join(page.read_text() for page in [*PAGES, ROOT / "CONTRIBUTING.md"])
    for module in set(re.findall(r"python -m ((?:rime_fast|benchmarks|tests)[\w.]*)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_what_blocks_there_are_is_known():
    """No fence of another spelling hides a block from these tests."""
    known = {"python", "python fragment", "bash", "sh", "json", "yaml", "jsonl", "dockerfile", "console", "text", ""}
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.M)[::2]
        assert set(fences) <= known, (page.name, set(fences) - known)
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S):
            yaml.safe_load(text)
