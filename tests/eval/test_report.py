"""The report: parsed as a reader's browser would, checked for its numbers, its pictures and its escapes."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rime_fast.data.records import Side
from rime_fast.eval import curves, plots
from rime_fast.eval.report import render_html, write_report
from rime_fast.eval.thumbnails import data_uri, thumbnails

VOID = {"meta", "img", "br", "hr", "link", "input", "source"}
PIXEL = data_uri(Image.new("RGB", (2, 2), "red"))


class Page(HTMLParser):
    """Collects elements and text; fails on a tag that closes wrongly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"closes nothing: {tag}"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.seen if name == tag]


def mutual(gain: float = 0.0) -> dict:
    cost = {
        "disc": {"query_seconds": 0.01, "target_seconds": 0.02, "query_tokens": 0.0, "target_tokens": 0.0},
        "gen": {"query_seconds": 0.11, "target_seconds": 0.12, "query_tokens": 9.25, "target_tokens": 4.5},
    }
    cells = {}
    for q in ("disc", "gen"):
        for t in ("disc", "gen"):
            hit = 0.2 + 0.5 * (q == "gen") + gain
            cells[f"{q}-{t}"] = {"hit@1": hit, "mrr": hit + 0.1, "ndcg@10": hit + 0.15} | {
                f"{side}_{what}": cost[mode][f"{side}_{what}"]
                for side, mode in (("query", q), ("target", t))
                for what in ("tokens", "seconds")
            }
    side = {"row": 0, "id": None, "text": "a < b & <script>alert(1)</script>", "images": [PIXEL], "rewrite": "1 2 <x>"}
    wrong = side | {"row": 5, "text": "five", "images": [], "score": 0.9, "correct": False}
    right = side | {"row": 7, "text": "seven", "images": [], "score": 0.8, "correct": True}
    ranks = {"disc-disc": 9, "gen-gen": 2}
    example = {"query": side, "answers": [right], "cell": "gen-gen", "ranks": ranks, "retrieved": [wrong, right]}
    return {
        "cells": cells,
        "cost": cost,
        "missing_gen": {"query": 3, "target": 0},
        "format_errors": {"query": 0, "target": 0},
        "n_queries": 64,
        "n_candidates": 100,
        "mean_pool": 100.0,
        "examples": [example],
    }


def report() -> dict:
    joint = [
        {"step": s, "loss": 5 / s, "ce/query": 2 / s, "contrast/gen-gen": 3 / s, "hit@1/gen-gen": 0.1, "grad_norm": 1.0}
        for s in range(1, 60)
    ]
    refine = [{"step": s, "loss": 0.1, "reward/total": s / 9, "rewrite_tokens": 12 - s / 9} for s in range(1, 9)]
    return {
        "title": "A & B",
        "lead": "what <this> is",
        "facts": {"seed": 0, "loss": 0.123456789, "model": "tiny"},
        "phases": [
            {"name": "sft", "label": "Joint training", "mutual": mutual(), "log_history": joint},
            {"name": "refine", "label": "Refine-RL", "mutual": mutual(0.1), "log_history": refine},
        ],
        "points": [{"label": "CoT", "tokens": 61.0, "accuracy": 0.7}],
        "tables": [{"title": "Seconds", "columns": ["phase", "s"], "rows": [["train", 12.5]], "note": "wall clock"}],
        "extra": {"seed": 0, "sft": {"gen-gen": 0.7}},
    }


def test_page_is_well_formed_self_contained_and_escaped(tmp_path):
    json_path, html_path = write_report(tmp_path / "new", report())
    html = html_path.read_text()
    page = Page(html)
    assert len(html) > 50_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "script" not in {tag for tag, _ in page.seen}
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "$" not in page.text
    for text in ("A & B", "what <this> is", "0.1235", "Joint training", "Refine-RL", "12.5", "wall clock", "rank 9"):
        assert text in page.text
    assert "of 164 generations 3 never reached <gen_emb>" in page.text
    assert json_path.parent == html_path.parent


def _width(uri: str) -> int:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).width


def test_the_first_screen_shows_the_change_and_rewrites_before_and_after():
    source = report()
    for phase, gain in zip(source["phases"], (0.0, 0.1), strict=True):
        phase["mutual"] = mutual(gain)
    for phase, rewrite in zip(source["phases"], ("72 and so", "72441"), strict=True):
        example = phase["mutual"]["examples"][0]
        example["query"] = example["query"] | {"rewrite": rewrite}
    html = render_html(source)
    first_screen = re.sub(r"<[^>]+>", " ", html[: html.index("<section")])
    assert re.search(r"70.0% →\s+80.0%\s+hit@1 gen-gen", first_screen)
    assert first_screen.index("72 and so") < first_screen.index("72441")
    source["phases"] = source["phases"][1:]
    assert "→" not in render_html(source)


def test_every_kind_of_reward_term_has_its_own_scale():
    entry = {"step": 1, "reward/total": 1.0, "reward/rank": 60.0, "reward/score": 0.05, "reward/format": 1.0}
    panels = {panel.title: panel for panel in curves.refine_panels([entry])}
    assert list(panels) == ["Reward", "Reward terms", "Rank of the own anchor", "Shares"]
    assert panels["Reward terms"].series == {"score": ([1.0], [0.05])}
    assert panels["Rank of the own anchor"].log


def test_every_picture_is_a_png_with_a_description():
    page = Page(render_html(report()))
    figures = [one for one in page.all("img") if one.get("class") == "plot"]
    assert len(figures) == 4  # heat maps, accuracy against tokens, training curves, Refine-RL curves
    for one in figures:
        assert one["alt"]
        kind, data = one["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert "gen-gen 0.800" in figures[0]["alt"]
    narrow = [one["srcset"] for one in page.all("source")]  # the same four, for a telephone's width
    assert len(narrow) == 4
    assert all(base64.b64decode(one.split(",", 1)[1]).startswith(b"\x89PNG") for one in narrow)
    for one, wide in zip(narrow, figures, strict=True):
        assert _width(one) < _width(wide["src"])


def test_table_shows_the_measured_numbers():
    text = re.sub(r"<[^>]+>", " ", render_html(report()))
    assert re.search(r"gen-disc\s+0\.700\s+0\.800\s+0\.850\s+9\.2\s+0\.0\s+0\.11\s+0\.02", text)


def test_examples_mark_the_right_candidate():
    page = Page(render_html(report()))
    assert sum(attributes.get("class") == "correct" for attributes in page.all("li")) == 1


def test_json_holds_the_numbers_and_no_pictures(tmp_path):
    source = report()
    source["phases"][0]["log_history"].append({"step": 99, "loss": math.nan, "grad_norm": np.float32(2)})
    path, _ = write_report(tmp_path, source)
    loaded = json.loads(path.read_text())
    assert loaded["sft"] == {"gen-gen": 0.7}
    assert loaded["phases"][1]["mutual"]["cells"]["gen-gen"]["hit@1"] == pytest.approx(0.8)
    assert loaded["phases"][0]["log_history"][-1] == {"step": 99, "loss": None, "grad_norm": 2.0}
    assert "base64" not in path.read_text()


def test_smallest_report():
    page = Page(render_html({"title": "nothing yet"}))
    assert "nothing yet" in page.text
    assert not page.all("section")


@pytest.mark.parametrize("bad", [{"title": "x", "phase": []}, {"lead": "no title"}])
def test_unknown_key_or_missing_title(tmp_path, bad):
    with pytest.raises(ValueError, match="expected 'title' and any of title, lead, facts, phases"):
        write_report(tmp_path, bad)


def test_curves_go_to_their_panels():
    history = report()["phases"]
    titles = [panel.title for panel in curves.training_panels(history[0]["log_history"])]
    assert titles == ["Loss", "Cross-entropy (nats a token)", "Contrastive terms", "In-batch hit@1", "Gradient norm"]
    assert curves.training_panels(history[1]["log_history"]) == []
    evaluated = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}]
    assert list(curves.training_panels(evaluated)[0].series) == ["loss", "loss (eval)"]
    panels = curves.refine_panels(history[1]["log_history"])
    assert [panel.title for panel in panels] == ["Reward", "Decoded tokens a rewrite"]
    assert panels[0].series == {"total": ([float(s) for s in range(1, 9)], [s / 9 for s in range(1, 9)])}
    assert curves.training_panels([]) == curves.refine_panels([]) == []


def test_running_mean_by_hand():
    assert plots.running_mean([1.0, 2.0, 6.0, math.nan]) == pytest.approx([1.5, 3.0, 4.0, 6.0])


def test_thumbnails_shrink_sample_frames_and_survive_broken_files(tmp_path):
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 600, 3), dtype=np.uint8))
    shown = thumbnails(Side(images=[big, str(tmp_path / "gone.png"), big]))
    assert len(shown) == 2
    data = base64.b64decode(shown[0].split(",", 1)[1])
    assert len(data) < 60_000
    assert len(thumbnails(Side(video=[big] * 9))) == 4
    assert thumbnails(Side(text="only text")) == []


def test_a_name_that_is_no_unicode_loses_no_report(tmp_path):
    _, page = write_report(tmp_path, {"title": "a \ud800 b", "facts": {"model": "runs/\udcff"}})
    assert "runs/\\udcff" in page.read_text(encoding="utf-8")
