"""The ablation: real cells in their smallest form, resuming, and the arithmetic of the claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rime_fast.demo import ablation, curves
from rime_fast.demo.ablation_plot import plot_ablation
from rime_fast.demo.ablation_report import ROWS, summarise, summary
from rime_fast.demo.arms import ARMS, REWARDS
from rime_fast.demo.phases import Sizes

TINY = Sizes(sft_steps=2, sft_batch=4, refine_steps=1, refine_batch=2, n_test=8, more_steps=1, measurements=1)
PAIRS = ("disc-disc", "disc-gen", "gen-disc", "gen-gen")


def made_up(gen: float, disc: float = 0.15, gen_disc: float | None = None, tokens: float = 9.0) -> dict[str, Any]:
    hits = {"disc-disc": disc, "disc-gen": disc, "gen-disc": gen if gen_disc is None else gen_disc, "gen-gen": gen}
    return {"hit@1": hits, "query_tokens": tokens, "format_errors": 0, "seconds": {"train": 1.0, "eval": 0.5}}


def made_up_cells(refined: float = 0.95) -> dict[tuple[str, int], Any]:
    cells: dict[tuple[str, int], Any] = {}
    for seed in (0, 1):
        cells |= {(name, seed): made_up(0.25) for name in ARMS}
        cells |= {(name, seed): made_up(refined) for name in ("refine", "anchors_policy", "ume_r1")}
        cells["noisy", seed] = made_up(0.24 + 0.02 * seed, disc=0.15 + 0.02 * seed)
        cells["best_of_8", seed] = made_up(0.96)
        cells["whole", seed] = made_up(0.98)
        cells["clean", seed] = made_up(0.92, tokens=14.0)
        cells["no_cma", seed] = made_up(0.92, gen_disc=0.10, tokens=14.0)
        cells["cot", seed] = made_up(0.92, tokens=33.0)
        cells["control", seed] = made_up(0.20, tokens=14.0)
    return cells


def test_means_deviations_and_claims() -> None:
    report = summarise(made_up_cells(), (0, 1), 8)
    assert report["sft"]["gen-gen"]["mean"] == pytest.approx(0.25)
    assert report["sft"]["gen-gen"]["std"] == pytest.approx(0.02 / 2**0.5)
    assert report["sft"]["gen-gen"]["values"] == pytest.approx([0.24, 0.26])
    assert report["rewrite_tokens"]["cot"]["mean"] == 33.0
    assert all(claim["holds"] for claim in report["claims"]), report["claims"]
    assert {claim["claim"][0] for claim in report["claims"]} == set("abcd")


def test_a_claim_that_does_not_hold_is_said_so() -> None:
    report = summarise(made_up_cells(refined=0.60), (0, 1), 8)  # better, by less than was promised
    failing = [claim["claim"] for claim in report["claims"] if not claim["holds"]]
    assert failing == ["c. Refine-RL teaches what retrieves: refine gen-gen - sft gen-gen"]


def test_a_control_that_does_as_well_fails_its_claim() -> None:
    cells = made_up_cells()
    cells |= {("random", seed): made_up(0.90) for seed in (0, 1)}
    failing = [claim["claim"] for claim in summarise(cells, (0, 1), 8)["claims"] if not claim["holds"]]
    assert failing == ["c. and not by its compute or form: refine gen-gen - random gen-gen"]


def test_deviation_of_a_sample() -> None:
    assert summary([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert summary([1.0])["std"] == 0.0


def test_plot_is_a_png(tmp_path: Path) -> None:
    plot_ablation(summarise(made_up_cells(), (0, 1), 8), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_cells_are_run_written_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real cells in this process; then calls that must find them: the ablation's own, and the curves'."""
    started: list[str] = []

    def here(out: Path, name: str, seed: int, fast: bool) -> int:
        started.append(f"{name}-{seed}")
        ablation.run_cell(name, seed, out, TINY)
        return 0

    monkeypatch.setattr(ablation, "_spawn", here)
    monkeypatch.setattr(ablation, "WORKERS", 1)
    monkeypatch.setattr(ablation, "FAST", TINY)
    monkeypatch.setattr(curves, "FAST", TINY)
    report = ablation.run_ablation(tmp_path, seeds=(5,), fast=True)
    assert started[0] == "noisy-5"  # where the arms begin
    assert sorted(started) == sorted(f"{name}-5" for name in ablation.CELLS)
    for key in ROWS:
        assert set(report[key]) == ({"gen-gen"} if key == "best_of_8" else set(PAIRS))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "ablation.png").exists()
    (tmp_path / "cells" / "cot-5.json").unlink()
    started.clear()
    ablation.run_ablation(tmp_path, seeds=(5,), fast=True)
    assert started == ["cot-5"]

    started.clear()
    found = curves.run_curves(tmp_path, seeds=(5,), fast=True)
    assert not started
    assert set(found["curves"]) == set(ARMS)
    starts = {curve["hit@1"]["seeds"]["5"][0] for curve in found["curves"].values()}
    assert len(starts) == 1
    assert json.loads((tmp_path / "curves.json").read_text()) == found
    assert (tmp_path / "refine_curves.png").read_bytes().startswith(b"\x89PNG")
    rewards = {
        name: json.loads((tmp_path / "cells" / f"{name}-5.json").read_text())["log"][0]["reward/total"]
        for name in REWARDS
    }
    assert rewards.pop("anchors_policy") == rewards["refine"]  # in the first step the policy is the start
    assert len(set(rewards.values())) == len(rewards), rewards  # every other arm is rewarded by something else


def test_a_failed_cell_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "_spawn", lambda out, name, seed, fast: int(name == "noisy"))
    with pytest.raises(RuntimeError, match="noisy-0"):
        ablation.run_ablation(tmp_path, seeds=(0,), fast=True)


def test_an_unknown_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name is 'poem'"):
        ablation.run_cell("poem", 0, tmp_path, TINY)
