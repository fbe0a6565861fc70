"""The exported folder, as every engine reads it."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.processing_utils import ProcessorMixin

from rime_fast.cli import main
from rime_fast.cli.embed import read_items
from rime_fast.data.records import Side
from rime_fast.data.templates import get_template
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.model.card import write_card
from rime_fast.model.tiny import FAMILIES
from rime_fast.serve.export import CHAT_TEMPLATE, export_model
from rime_fast.serve.parity import _messages, stock_embeddings
from tests.serve.conftest import CHAT, picture, save_model

LAYOUT = {
    "model.safetensors",
    "config.json",
    "chat_template.jinja",
    CHAT_TEMPLATE,
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "config_sentence_transformers.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "README.md",
}


def stock_text_embedding(folder, text):
    """[D]: the last state of a rendered prompt, normalised."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        hidden = model(**ids).last_hidden_state
    return torch.nn.functional.normalize(hidden[0, -1], dim=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_makes_our_embedding_from_the_folder(family, items_file, tmp_path):
    save_model(tmp_path / "model", family)
    folder = export_model(tmp_path / "model", tmp_path / "out", dims=[16, 8, 32])
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} >= LAYOUT
    sides = read_items(str(items_file), None)
    wanted = RimeEmbedder.from_pretrained(tmp_path / "model").encode(sides)
    torch.testing.assert_close(stock_embeddings(str(folder), sides), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(RimeEmbedder.from_pretrained(folder).encode(sides), wanted, rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["is_matryoshka"] is True
    assert config["matryoshka_dimensions"] == [8, 16, 32]
    again = export_model(folder, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["matryoshka_dimensions"] == [8, 16, 32]


@pytest.mark.parametrize("template", ["rewrite", "cot"])
@pytest.mark.parametrize("system", ["own", None])
def test_the_folders_template_is_ours_up_to_the_token(template, system, tmp_path):
    changes = {} if system == "own" else {"system": None}
    ours = get_template(template, **changes)
    save_model(tmp_path / "model")
    folder = export_model(tmp_path / "model", tmp_path / "out", template=ours)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = (folder / CHAT_TEMPLATE).read_text()
    for side in (
        Side("a shoe"),
        Side(" two\nlines "),
        Side("x", [picture(16, 16)] * 2),
        Side(images=[picture(16, 16)]),
    ):
        text = tokenizer.apply_chat_template(_messages(side), chat_template=chat, tokenize=False)
        assert text == ours.render_disc(side).removesuffix("\n")
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(plain, chat_template=chat, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\n<disc_emb>"
    # the template for generation is what it was
    assert (folder / "chat_template.jinja").read_text() == CHAT
    conversation = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == "user: hello"


class NoVideo(dict):
    """In the place of the stock processors' video part, the one part that needs torchvision."""

    model_input_names = ("pixel_values_videos", "video_grid_thw")


@pytest.fixture
def without_torchvision(monkeypatch):
    """Where torchvision is missing (its wheels on PyPI do not load beside a CPU torch), stock processors are made
    without their video part: text and pictures go the way they go anywhere."""
    if find_spec("torchvision"):
        return
    checked = ProcessorMixin.check_argument_for_proper_class

    def check(self, name, argument):
        return NoVideo if isinstance(argument, NoVideo) else checked(self, name, argument)

    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *_, **__: NoVideo())
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", check)


@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_transformers_makes_our_embedding(family, items_file, tmp_path, without_torchvision):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    from rime_fast.serve.parity import differences, folder_embeddings

    save_model(tmp_path / "model", family)
    folder = str(export_model(tmp_path / "model", tmp_path / "out"))
    sides = read_items(str(items_file), None)
    embedder = RimeEmbedder.from_pretrained(tmp_path / "model")
    largest = differences(embedder.encode(sides), folder_embeddings(folder, sides, batch_size=4), sides)
    print(family, largest)
    assert set(largest) == {"text", "image", "both", "all"}
    assert largest["all"] <= 1e-6
    image = picture(37, 53)
    mixed = ["a red shoe", image, {"text": "which one", "image": image}]
    for batch in ([mixed[0]], [mixed[1]], [mixed[2]], mixed):
        found = SentenceTransformer(folder, device="cpu").encode(batch, convert_to_tensor=True)
        torch.testing.assert_close(found, embedder.encode(batch), rtol=0, atol=1e-6)


def test_the_command(model_dir, items_file, tmp_path, capsys):
    report = tmp_path / "report.json"
    cells = {"disc-disc": {"hit@1": 0.5, "mrr": 0.6, "ndcg@10": 0.7, "query_tokens": 0}}
    report.write_text(json.dumps({"phases": [{"mutual": {"cells": cells}}]}))
    folder = tmp_path / "out"
    words = [
        "export",
        str(model_dir),
        "--to",
        "vllm",
        "--output_dir",
        str(folder),
        "--dims",
        "8",
        "--report",
        str(report),
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"vllm serve {folder} --runner pooling" in out
    card = (folder / "README.md").read_text()
    assert "| disc-disc hit@1 | 0.5 |" in card
    assert f"Started from: {model_dir}" in card
    assert 'SentenceTransformer("out")' in card
    assert main(["export", "--check", str(folder), str(items_file)]) == 0
    assert re.search(r"6 items by .*transformers.*, largest difference \d\.\d\de-0[78]: equal", capsys.readouterr().out)
    chat = folder / CHAT_TEMPLATE
    chat.write_text(chat.read_text().replace("helpful", "brief"))
    assert main(["export", "--check", str(folder), str(items_file), "--tolerance", "1e-6"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_an_adapter_is_exported_merged(model_dir, items_file, tmp_path):
    peft = pytest.importorskip("peft")
    from rime_fast.model.dual_mode import DualModeModel
    from rime_fast.model.processor import RimeProcessor

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(DualModeModel.from_pretrained(model_dir), config).save_pretrained(tmp_path / "adapter")
    RimeProcessor.from_pretrained(model_dir).save_pretrained(tmp_path / "adapter")
    folder = export_model(tmp_path / "adapter", tmp_path / "out")
    side = read_items(str(items_file), None)[2]
    wanted = RimeEmbedder.from_pretrained(tmp_path / "adapter").encode([side])
    assert not torch.allclose(wanted, RimeEmbedder.from_pretrained(model_dir).encode([side]), atol=1e-3)
    torch.testing.assert_close(stock_embeddings(str(folder), [side]), wanted, rtol=0, atol=1e-6)
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["export"], 2, "--model is required"),
        (["export", "{model}", "--to", "onnx"], 2, "--to is 'onnx'"),
        (["export", "a", "b"], 2, "--model is ['a', 'b']; expected text or none"),
        (["export", "{model}", "--output_dir", "{model}"], 1, "output_dir is the model's own folder"),
        (["export", "{model}", "--output_dir", "{tmp}/out", "--dims", "64"], 1, "dims has 64; expected 1 to 32"),
        (["export", "{model}", "--report", "/none.json"], 2, "--report /none.json"),
        (["export", "--check", "x"], 2, "--check has 1 values"),
        (["export", "--check", "http://localhost:1/v1", "f.txt"], 2, "needs the directory of its model"),
    ],
)
def test_wrong_use_is_named(words, code, message, model_dir, tmp_path, capsys):
    words = [word.format(model=model_dir, tmp=tmp_path) for word in words]
    assert main(words) == code
    assert message in capsys.readouterr().err


def test_a_model_without_a_discriminative_embedding_is_not_exported(model_dir, tmp_path):
    """Think-Then-Embed's: its <disc_emb> is in the tokenizer and was never trained."""
    shutil.copytree(model_dir, tmp_path / "tte")
    for template, trained in (("tte", "rewrite"), ("rewrite", "tte")):
        write_card(tmp_path / "tte", {"template": trained})
        with pytest.raises(ValueError, match="template is 'tte', which trains no <disc_emb>"):
            export_model(tmp_path / "tte", tmp_path / "out", template=template)
    assert not (tmp_path / "out").exists()
