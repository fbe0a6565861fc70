"""The curves: the arithmetic of the report, and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rime_fast.demo import curves
from rime_fast.demo.arms import run_arm
from rime_fast.demo.curves_report import plot_curves, summarise
from rime_fast.demo.phases import FAST


def cell(seed: int, hits: list[float], steps: tuple[int, ...] = (0, 10)) -> dict[str, Any]:
    points = [
        {"step": s, "hit@1": h, "query_tokens": 14.0 - s / 10, "seconds": s * (1.0 + seed)}
        for s, h in zip(steps, hits, strict=True)
    ]
    return {"seed": seed, "points": points}


def test_a_curve_is_the_mean_over_seeds() -> None:
    found = summarise({"ume_r1": [cell(0, [0.5, 0.7]), cell(1, [0.6, 0.6])]})["curves"]["ume_r1"]
    assert found["steps"] == [0, 10]
    assert found["hit@1"]["mean"] == pytest.approx([0.55, 0.65])
    assert found["hit@1"]["std"] == pytest.approx([0.1 / 2**0.5, 0.1 / 2**0.5])
    assert found["hit@1"]["seeds"] == {"0": [0.5, 0.7], "1": [0.6, 0.6]}
    assert found["query_tokens"]["mean"] == [14.0, 13.0]
    assert found["gain"]["values"] == pytest.approx([0.2, 0.0])
    assert found["seconds"]["mean"] == [0.0, 15.0]


def test_seeds_measured_at_other_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="ume_r1"):
        summarise({"ume_r1": [cell(0, [0.5, 0.7]), cell(1, [0.6, 0.6], (0, 5))]})


def test_the_picture_is_made_from_the_report(tmp_path: Path) -> None:
    report = summarise({"refine": [cell(0, [0.5, 0.7]), cell(1, [0.6, 0.6])]})
    (tmp_path / "curves.json").write_text(json.dumps(report))
    assert curves.main(["--plot", str(tmp_path / "curves.json"), "--output_dir", str(tmp_path)]) == 0
    plot_curves(report, tmp_path / "direct.png")
    assert (tmp_path / "refine_curves.png").stat().st_size == (tmp_path / "direct.png").stat().st_size


def test_an_unknown_arm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'poem'"):
        run_arm("poem", None, None, tmp_path, seed=0, sizes=FAST)
