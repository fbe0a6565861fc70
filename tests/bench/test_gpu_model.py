"""The page of predictions is what its script makes, for every case that the GPU benchmarks have."""

from __future__ import annotations

import pytest

from benchmarks import bench_contrastive, bench_logprob_pool, gpu_model
from benchmarks.gpu_model import CARDS, Work


def test_the_committed_page_is_what_the_script_says(tmp_path, monkeypatch, capsys):
    page = gpu_model.PAGE.read_text()
    copy = tmp_path / "page.md"
    copy.write_text(page)
    monkeypatch.setattr(gpu_model, "PAGE", copy)
    gpu_model.main(["--write"])
    assert copy.read_text() == page, "python -m benchmarks.gpu_model --write"
    gpu_model.main([])
    assert capsys.readouterr().out.strip() in page


def test_every_measured_row_of_ours_has_its_prediction():
    known = gpu_model.measured(gpu_model.STORED)
    predicted = {(bench, case, impl) for bench, case, impl, _ in gpu_model.predictions()}
    benches = {"logprob_pool", "contrastive", "decode_step", "joint_step", "attention"}
    for device, bench, case, impl in known:
        assert device in CARDS
        if case.startswith("M") or case.endswith("prompt1024") or case.endswith("prompt256"):
            continue  # the first rows of an H100, whose cases had other names
        if bench in benches and impl in ("ours", "ours_forward", "ours_recompute", "ours_triton", "floor"):
            assert (bench, case, impl) in predicted, (bench, case, impl)


def test_cases_are_the_benchmarks_own_and_a_faster_memory_is_never_slower():
    cases = {case for _, case, _, _ in gpu_model.predictions()}
    assert {str(shape) for shape in bench_contrastive.SHAPES["cuda"]} <= cases
    assert {str(s) for s in bench_logprob_pool.SHAPES["cuda"] if not (s.frozen or s.entropy)} <= cases
    h100, h200 = CARDS.values()
    assert all(work.ms(h200) <= work.ms(h100) for *_, work in gpu_model.predictions())


def test_a_step_takes_the_longer_of_card_and_host():
    card = CARDS["NVIDIA H200"]
    assert Work(790e9, 4.3e9, 0).ms(card) == pytest.approx(2.0)
    assert Work(790e9, 4.3e9, 1000).ms(card) == pytest.approx(4.0)
    assert Work(790e9, 4.3e9, 1000, ahead=False).ms(card) == pytest.approx(10.0)
    assert Work(7900e9, 0, 100, ahead=False).ms(card) == Work(7900e9, 0, 100).ms(card) == pytest.approx(10.2)
