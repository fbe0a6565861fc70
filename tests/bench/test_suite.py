"""Every benchmark once at its tiny size, in this process: our rows within their bounds, peers there or named."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import bench_attention, bench_contrastive, bench_logprob_pool, bench_reward
from benchmarks.lib import decode_step, growth, joint_step, peers, refine_step, ume_r1, widths
from benchmarks.lib.stored import load
from rime_fast.bench import ceiling, contrastive, logprob, reward
from rime_fast.bench.harness import FLOOR, Results, compare

ROOT = Path(__file__).parents[2]
# name -> what benchmarks/bench_*.py calls, shape, implementations that must have run, bound of our error
HEAD, CONTRAST, REWARD = bench_logprob_pool.SHAPES, bench_contrastive.SHAPES, bench_reward.SHAPES
UME = bench_reward.UME_SHAPES
SUITE = {
    "attention": (bench_attention.measure, bench_attention.SHAPES["tiny"][0], {"ours"}, 0.0),
    "decode_step": (decode_step.measure, decode_step.SHAPES["tiny"][0], {FLOOR, "ours"}, 0.0),
    "ceiling": (ceiling.measure, ceiling.SHAPES["tiny"][0], {"copy", "gemm"}, 0.0),
    "logprob": (
        logprob.measure,
        bench_logprob_pool.SHAPES["tiny"][0],
        {FLOOR, "ours_forward", "ours_recompute", "eager"},
        1e-5,
    ),
    "contrastive": (
        contrastive.measure,
        CONTRAST["tiny"][-1],
        {FLOOR, "ours", "eager", "open_clip"},
        1e-5,
    ),
    "contrastive_growth": (growth.measure_growth, bench_contrastive.GROWTH["tiny"][0], {"ours"}, 0.0),
    "contrastive_widths": (
        widths.measure_widths,
        bench_contrastive.WIDTHS["tiny"][0],
        {FLOOR, "ours", "ours_widest", "a loss a width"},
        1e-5,
    ),
    "reward": (reward.measure, REWARD["tiny"][0], {FLOOR, "ours_mean", "eager"}, 1e-6),
    "reward_ume_r1": (
        ume_r1.measure_ume_r1,
        bench_reward.UME_SHAPES["tiny"][0],
        {FLOOR, "ours_ume_r1", "ume_r1 loop"},
        1e-6,
    ),
    "joint_step": (joint_step.measure, joint_step.SHAPES["tiny"][0], {"ours", "ours_kept", joint_step.PLAIN}, 1e-3),
    "joint_step, one pass": (joint_step.measure, joint_step.SHAPES["tiny"][1], {"ours", joint_step.PLAIN}, 1e-3),
    "refine_step": (refine_step.measure, refine_step.SHAPES["tiny"][0], {"ours"}, 1e-3),
}


@pytest.mark.parametrize("name", SUITE)
def test_tiny_case(name, tmp_path):
    measure, shape, wanted, bound = SUITE[name]
    results = Results(seconds=1.0)
    third_party = {"peers": getattr(peers, name)(shape)} if hasattr(peers, name) else {}
    found = measure(shape, "cpu", torch.float32, results, 1, **third_party)
    assert wanted <= set(found)
    assert all(row.median_ms > 0 and row.first_call_s is not None for row in found.values())
    ours = {impl: row for impl, row in found.items() if impl.startswith("ours")}
    if bound:
        known = {impl: row.error_fp64 for impl, row in ours.items() if row.error_fp64 is not None}
        assert known
        assert all(error < bound for error in known.values()), known
    if FLOOR in found:
        assert all(row.ratio_to_floor is not None for row in found.values())
    assert all(one.reason for one in results.skipped)
    results.write(tmp_path / "rows.json")
    stored = load(tmp_path / "rows.json")
    assert stored.rows == results.rows
    assert stored.environment["torch"] == torch.__version__
    if name.startswith("joint_step"):
        parts = {row.impl for row in stored.rows if row.bench == "joint_step_parts"}
        named = ("vision", "LLM forward", "head", "contrast", "backward", "optimiser")
        assert {f"ours/{part}" for part in named} <= parts


def test_ours_must_run_and_a_peer_may_be_missing():
    def absent() -> None:
        raise ImportError("no such package\nsecond line")

    def changed() -> None:
        raise AttributeError("module has no attribute 'loss'")

    results, impls = Results(), {"ours": lambda: None, "peer": absent, "other version": changed}
    assert list(compare("op", "a", impls, shape={}, rounds=1, results=results)) == ["ours"]
    assert [(one.impl, one.reason) for one in results.skipped] == [
        ("peer", "no such package"),
        ("other version", "AttributeError: module has no attribute 'loss'"),
    ]
    for name in ("ours", FLOOR):
        with pytest.raises(ImportError):
            compare("op", "a", {name: absent}, shape={}, rounds=1)


@pytest.mark.parametrize(("step", "ours"), [(False, 5), (True, 2)])
def test_a_time_limit_leaves_rounds_out(step: bool, ours: int):
    """What is left: the first call and the one whose memory is read, and three rounds of an operator of ours."""
    calls: list[str] = []
    impls = {name: partial(calls.append, name) for name in ("ours", "peer")}
    rows = compare("op", "a", impls, shape={}, rounds=50, results=Results(seconds=0.0), step=step)
    assert (calls.count("ours"), calls.count("peer")) == (ours, 2)
    assert all(row.median_ms > 0 for row in rows.values())


def test_every_benchmark_file_measures_through_one_harness():
    """The cases hold shapes and bounds; what is measured is in rime_fast/bench or benchmarks/lib, as above."""
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert any((node.module or "").startswith(("rime_fast.bench", "benchmarks.lib")) for node in nodes), path


def test_without_a_checkout_torchs_own_forms_remain(monkeypatch, tmp_path):
    from rime_fast.cli import bench_micro

    shape = bench_logprob_pool.SHAPES["tiny"][0]
    assert set(bench_micro.third_party("logprob", shape)["peers"]) == set(peers.logprob(shape))
    monkeypatch.setattr(bench_micro, "PEERS", tmp_path / "peers.py")
    assert bench_micro.third_party("logprob", shape) == {}
    assert {"eager", "F.linear_cross_entropy"} < set(logprob.losses(shape, False))
    assert "compile" in logprob.losses(replace(shape, peaked=True), False)
