"""The demo from end to end in its fast form: every phase runs, and the report has the promised keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rime_fast.demo.phases import FULL
from rime_fast.demo.run import run_demo

CELLS = {"disc-disc", "disc-gen", "gen-disc", "gen-gen"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out, seed=3, fast=True)


def test_report_json_has_the_promised_keys(demo: tuple[Path, dict[str, Any]]) -> None:
    out, numbers = demo
    report = json.loads((out / "report.json").read_text())
    for phase in ("sft", "refine"):
        assert set(report[phase]) == CELLS
        assert all(0 <= value <= 1 for value in report[phase].values())
        assert report[phase] == numbers[phase]
        assert report["rewrite_tokens"][phase] > 0
    assert report["seed"] == 3
    assert report["n_test"] == numbers["n_test"]
    assert all(report["seconds"][name] > 0 for name in ("sft", "eval_sft", "refine", "eval_refine"))
    assert FULL.n_test >= 512


def test_report_html_stands_alone(demo: tuple[Path, dict[str, Any]]) -> None:
    text = (demo[0] / "report.html").read_text()
    assert text.count("data:image/png;base64,") > 10  # plots and example images
    assert "Refine-RL" in text
    assert "<script src" not in text
    assert 'href="http' not in text


def test_both_models_are_stock_checkpoints(demo: tuple[Path, dict[str, Any]]) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    for phase in ("sft", "refine"):
        model = Qwen2VLForConditionalGeneration.from_pretrained(demo[0] / phase)
        assert sum(p.numel() for p in model.parameters()) < 1_500_000
