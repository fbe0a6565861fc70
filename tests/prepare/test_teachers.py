"""Teachers without a server: tiny models in this process, and a stand-in for vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rime_fast.data.records import Pair, Side
from rime_fast.data.templates import get_template
from rime_fast.model.tiny import FAMILIES, tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens
from rime_fast.prepare.local_teacher import LocalTeacher, RimeTeacher, load_local
from rime_fast.prepare.prompts import load_prompts
from rime_fast.prepare.rewrite import rewrite_rows
from rime_fast.prepare.rewrite_work import RewriteOptions
from rime_fast.prepare.teachers import VllmTeacher


def save(folder, family="qwen2_vl", trained_here=False):
    tokenizer = tiny_tokenizer([get_template("rewrite").instruction, "what is this a thing system user assistant"])
    model = tiny_model(family, tokenizer=tokenizer, hidden=32, vision_hidden=16, seed=3, init_std=0.15)
    if trained_here:
        add_embedding_tokens(model, tokenizer)
    model.save_pretrained(folder)
    tiny_processor(tokenizer).save_pretrained(folder)
    return folder


def sides():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    return [
        Pair(Side("what is this ?", [picture]), Side("a thing")),
        Pair(Side("what <|im_end|> is"), Side("a thing ü")),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_is_asked_by_the_prompts(tmp_path, family):
    teacher = load_local(str(save(tmp_path / "m", family)), template="rewrite", max_pixels=4096)
    assert isinstance(teacher, LocalTeacher)
    report = rewrite_rows(sides(), teacher, tmp_path / "o.parquet", RewriteOptions(max_tokens=6))
    assert report["unique_sides"] == 4
    assert report["accepted"] + sum(report["rejected"].values()) == 4


def test_a_model_trained_here_writes_its_own_rewrites(tmp_path):
    teacher = load_local(str(save(tmp_path / "m", trained_here=True)), template="rewrite", max_pixels=4096)
    assert isinstance(teacher, RimeTeacher)
    report = rewrite_rows(sides(), teacher, tmp_path / "o.parquet", RewriteOptions(max_tokens=6))
    assert report["accepted"] + sum(report["rejected"].values()) == 4
    with pytest.raises(ValueError, match="with_truth"):
        rewrite_rows(sides(), teacher, tmp_path / "p.parquet", RewriteOptions(with_truth=True))


def test_vllm_through_its_interface(tmp_path):
    seen = {}

    class Stand:
        def __init__(self, **options):
            seen["options"] = options

        def chat(self, messages, parameters, use_tqdm):
            seen["messages"], seen["parameters"] = messages, parameters
            text = "<think>Look.</think>\nAnswer: a thing of some kind"
            return [
                SimpleNamespace(outputs=[SimpleNamespace(text=text, finish_reason="stop", token_ids=[1, 2])])
                for _ in messages
            ]

    teacher = VllmTeacher("big", llm=Stand, sampling_params=lambda **options: options)
    report = rewrite_rows(sides(), teacher, tmp_path / "o.parquet", RewriteOptions())
    assert report["accepted"] == 4
    assert seen["options"]["limit_mm_per_prompt"] == {"image": 16}
    assert seen["parameters"] == {"max_tokens": 512, "temperature": 0.0, "seed": 0}
    kinds = [[part["type"] for part in message[-1]["content"]] for message in seen["messages"]]
    assert ["text", "image_url", "text"] in kinds


def test_prompts_of_ones_own(tmp_path):
    assert load_prompts().task("OK-VQA") == "visual question"
    path = tmp_path / "p.yaml"
    for text, message in (("tsks: {}", "unknown key 'tsks'"), ("form: odd", "form is"), ("truth: x", "answer")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_prompts(path)
    path.write_text("form: plain\ntasks: {mine: {datasets: [Set 1], query: Say it.}}")
    own = load_prompts(path)
    assert (own.form, own.task("set-1"), own.tasks["mine"]["query"]) == ("plain", "mine", "Say it.")
