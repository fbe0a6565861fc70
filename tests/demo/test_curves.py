"""The curves: real cells in their smallest form, resuming, and the arithmetic of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rime_fast.demo import curves
from rime_fast.demo.curves_report import plot_curves, summarise
from rime_fast.demo.phases import Sizes

TINY = Sizes(sft_batch=4, refine_batch=2, n_test=8)
PANELS = {"short": curves.Panel(1, 2, 2), "later": curves.Panel(1, 3, 2, ("anchors_sft",))}


def cell(seed: int, hits: list[float], steps: tuple[int, ...] = (0, 10)) -> dict[str, Any]:
    points = [{"step": s, "hit@1": h, "query_tokens": 14.0 - s / 10} for s, h in zip(steps, hits, strict=True)]
    return {"reward": "ume_r1", "seed": seed, "points": points, "seconds": 1.0 + seed}


def test_a_curve_is_the_mean_over_seeds() -> None:
    found = summarise({"short": [cell(0, [0.5, 0.7]), cell(1, [0.6, 0.6])]})["curves"]["short"]["ume_r1"]
    assert found["steps"] == [0, 10]
    assert found["hit@1"]["mean"] == pytest.approx([0.55, 0.65])
    assert found["hit@1"]["std"] == pytest.approx([0.1 / 2**0.5, 0.1 / 2**0.5])
    assert found["hit@1"]["seeds"] == {"0": [0.5, 0.7], "1": [0.6, 0.6]}
    assert found["query_tokens"]["mean"] == [14.0, 13.0]
    assert found["gain"]["values"] == pytest.approx([0.2, 0.0])
    assert found["seconds"]["mean"] == 1.5


def test_seeds_measured_at_other_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="short, ume_r1"):
        summarise({"short": [cell(0, [0.5, 0.7]), cell(1, [0.6, 0.6], (0, 5))]})


def test_cells_are_run_written_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "FAST", TINY)
    monkeypatch.setattr(curves, "FAST_PANELS", PANELS)
    trained: list[int] = []
    joint = curves.joint_training
    monkeypatch.setattr(
        curves, "joint_training", lambda *a, **k: (trained.append(k["sizes"].sft_steps), joint(*a, **k))[1]
    )
    report = curves.run_curves(tmp_path, seeds=(4,), panels=tuple(PANELS), fast=True)
    assert trained == [1]  # one joint training for the three rewards and both panels
    assert set(report["curves"]["short"]) == set(curves.REWARDS)
    assert set(report["curves"]["later"]) == {"anchors_sft"}
    assert report["curves"]["later"]["anchors_sft"]["steps"] == [0, 2, 3]
    firsts = set()
    for curve in report["curves"]["short"].values():
        assert curve["steps"] == [0, 2]
        firsts.add(curve["hit@1"]["seeds"]["4"][0])
    assert len(firsts) == 1  # one start
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "refine_curves.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "cells" / "short-ume_r1-4.json").read_text())
    assert kept["log"]

    monkeypatch.setattr(curves, "run_cell", lambda *a, **k: pytest.fail("run again"))
    again = curves.run_curves(tmp_path, seeds=(4,), panels=tuple(PANELS), fast=True)
    assert again["curves"] == report["curves"]


def test_the_picture_is_made_from_the_report(tmp_path: Path) -> None:
    report = summarise({"short": [cell(0, [0.5, 0.7]), cell(1, [0.6, 0.6])]})
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert curves.main(["--plot", str(tmp_path / "report.json"), "--output_dir", str(tmp_path)]) == 0
    plot_curves(report, tmp_path / "direct.png")
    assert (tmp_path / "refine_curves.png").stat().st_size == (tmp_path / "direct.png").stat().st_size


def test_an_unknown_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'poem'"):
        curves.run_cell(PANELS["short"], "poem", 0, tmp_path, TINY)
