"""docs/serving.md as typed: its commands in order, its client against its server."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from rime_fast.cli import main
from rime_fast.data.records import Side
from rime_fast.data.templates import get_template
from rime_fast.eval.embedder import RimeEmbedder
from tests.serve.conftest import picture
from tests.serve.test_export import stock_text_embedding
from tests.serve.test_serve import Server

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines() if line.strip()
]


@pytest.fixture
def place(model_dir, tmp_path, monkeypatch):
    shutil.copytree(model_dir, tmp_path / "runs" / "sft")
    picture(30, 40).save(tmp_path / "shoe.png")
    (tmp_path / "catalogue.jsonl").write_text(
        '{"text": "a red shoe"}\n{"image": "shoe.png", "id": 7}\n{"text": "it"}\n'
    )
    (tmp_path / "queries.txt").write_text("a red shoe\nblue\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_and_the_client(place, capsys):
    assert len(COMMANDS) == 8
    for line in COMMANDS:
        words = shlex.split(line)
        assert words.pop(0) == "rime-fast"
        if words[0] == "serve":
            served = [word for word in words[1:] if word not in ("--port", "8000")]
        else:
            more = ["--max_new_tokens", "4"] if "gen" in words else []
            assert main([*words, *more]) == 0, line
    assert (place / "runs" / "found.html").is_file()
    server = Server(*served, "--max_new_tokens", "4")
    client = next(block for block in re.findall(r"```python fragment\n(.*?)```", PAGE, re.S) if "OpenAI" in block)
    space: dict = {}
    exec(client.replace("http://localhost:8000/v1", server.url), space)
    assert server.stop()[0] == 0
    wanted = RimeEmbedder.from_pretrained("runs/sft", max_new_tokens=4).encode(["a red shoe"])
    torch.testing.assert_close(torch.tensor([space["d"].data[0].embedding]), wanted, rtol=0, atol=1e-5)


def test_generating_then_embedding_is_mode_gen(place):
    """Route of the engines without a state at <gen_emb>: generate, then embed prompt, response and token."""
    main(["export", "runs/sft", "--output_dir", "runs/export"])
    embedder = RimeEmbedder.from_pretrained("runs/sft", max_new_tokens=4)
    template = get_template("rewrite")
    text = template.render_prompt(Side("a red shoe")) + template.render_response(Side("a red shoe", rewrite="red shoe"))
    batch = embedder.collator.collate_sides([Side("a red shoe", rewrite="red shoe")])
    keys = ("input_ids", "lengths", "position_ids", "mm_token_type_ids", "gen_index")
    with torch.no_grad():
        gen = embedder.model(**{key: batch[key] for key in keys}).embeddings["gen"]
    torch.testing.assert_close(stock_text_embedding(place / "runs" / "export", text), gen[0], rtol=0, atol=1e-6)
