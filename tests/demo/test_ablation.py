"""The ablation: one real cell in its smallest form, resuming, and the arithmetic of the claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rime_fast.demo import ablation
from rime_fast.demo.ablation_plot import plot_ablation
from rime_fast.demo.ablation_report import PHASES, summarise, summary
from rime_fast.demo.phases import Sizes

TINY = Sizes(sft_steps=2, sft_batch=4, refine_steps=1, refine_batch=2, n_test=8)
PAIRS = ("disc-disc", "disc-gen", "gen-disc", "gen-gen")


def made_up(gen: float, disc: float, gen_disc: float, tokens: float) -> dict[str, Any]:
    hits = {"disc-disc": disc, "disc-gen": disc, "gen-disc": gen_disc, "gen-gen": gen}
    return {"hit@1": hits, "query_tokens": tokens, "format_errors": {"query": 0, "target": 0}}


def made_up_cells(refined: float = 0.95) -> dict[tuple[str, int], Any]:
    cells: dict[tuple[str, int], Any] = {}
    for seed in (0, 1):
        cells["full", seed] = {
            "sft": made_up(0.90 + 0.02 * seed, 0.15, 0.90, 14.0),
            "refine": made_up(refined, 0.15, 0.94, 9.0),
            "seconds": {"sft": 1.0, "refine": 1.0},
        }
        for name, one in (
            ("no_cma", made_up(0.92, 0.15, 0.10, 14.0)),
            ("cot", made_up(0.92, 0.15, 0.90, 33.0)),
            ("control", made_up(0.20, 0.15, 0.20, 14.0)),
        ):
            cells[name, seed] = {"sft": one, "seconds": {"sft": 1.0}}
    return cells


def test_means_deviations_and_claims() -> None:
    report = summarise(made_up_cells(), (0, 1), 8)
    assert report["sft"]["gen-gen"]["mean"] == pytest.approx(0.91)
    assert report["sft"]["gen-gen"]["std"] == pytest.approx(0.02 / 2**0.5)
    assert report["sft"]["gen-gen"]["values"] == [0.90, 0.92]
    assert report["rewrite_tokens"]["cot"]["mean"] == 33.0
    assert all(claim["holds"] for claim in report["claims"]), report["claims"]
    assert {claim["claim"][0] for claim in report["claims"]} == set("abcd")


def test_a_claim_that_does_not_hold_is_said_so() -> None:
    report = summarise(made_up_cells(refined=0.88), (0, 1), 8)  # shorter, but worse by 0.03
    failing = [claim["claim"][0] for claim in report["claims"] if not claim["holds"]]
    assert failing == ["c", "c"]


def test_deviation_of_a_sample() -> None:
    assert summary([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert summary([1.0])["std"] == 0.0


def test_plot_is_a_png(tmp_path: Path) -> None:
    plot_ablation(summarise(made_up_cells(), (0, 1), 8), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_cells_are_run_written_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real cells in this process, then a second call that must find them all."""
    started: list[str] = []

    def here(out: Path, name: str, seed: int, fast: bool) -> int:
        started.append(f"{name}-{seed}")
        ablation.run_cell(name, seed, out, TINY)
        return 0

    monkeypatch.setattr(ablation, "_spawn", here)
    monkeypatch.setattr(ablation, "WORKERS", 1)
    monkeypatch.setattr(ablation, "FAST", TINY)
    report = ablation.run_ablation(tmp_path, seeds=(5,), fast=True)
    assert sorted(started) == sorted(f"{name}-5" for name in ablation.CELLS)
    for key in PHASES:
        assert set(report[key]) == set(PAIRS)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "ablation.png").exists()
    (tmp_path / "cells" / "cot-5.json").unlink()
    started.clear()
    ablation.run_ablation(tmp_path, seeds=(5,), fast=True)
    assert started == ["cot-5"]


def test_a_failed_cell_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "_spawn", lambda out, name, seed, fast: int(name == "cot"))
    with pytest.raises(RuntimeError, match="cot-0"):
        ablation.run_ablation(tmp_path, seeds=(0,), fast=True)


def test_an_unknown_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name is 'poem'"):
        ablation.run_cell("poem", 0, tmp_path, TINY)
