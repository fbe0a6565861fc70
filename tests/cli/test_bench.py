"""rime-fast bench: one operator at the user's shape; wrong use; words that moved to benchmarks/."""

from __future__ import annotations

import pytest

from benchmarks.lib.stored import load
from rime_fast import cli
from rime_fast.bench import logprob
from rime_fast.cli import bench_micro

SIZES = {
    "logprob": ["--tokens", "24", "--hidden", "8", "--vocab", "50", "--ignored", "0.5", "--peaked"],
    "contrastive": ["--pairs", "32", "--width", "8", "--terms", "4"],
    "reward": ["--items", "2", "--group", "4", "--anchors", "16", "--width", "8"],
}


@pytest.mark.parametrize("op", SIZES)
def test_one_operator_at_a_shape(op, tmp_path, capsys, monkeypatch):
    few = {"ours_forward": logprob.ours_forward, "eager": logprob.eager}
    monkeypatch.setattr(logprob, "losses", lambda shape, cuda: few)
    if op == "logprob":
        monkeypatch.setattr(bench_micro, "third_party", lambda op, shape: {})  # TRL alone takes seconds to import
    output = tmp_path / "rows.json"
    words = ["bench", op, *SIZES[op], "--device", "cpu", "--rounds", "1"]
    assert cli.main(words + ["--output", str(output)] * (op == "reward")) == 0
    text = capsys.readouterr().out
    assert "auto takes " in text
    assert "  not triton: " in text
    assert "floor" in text
    assert "eager" in text
    if op == "contrastive":
        assert "skipped: contrastive 32x8x4-random inf_cl: No module named 'inf_cl'" in text
    if op == "reward":
        stored = load(output)
        assert {row.bench for row in stored.rows} == {"reward", "ceiling"}
        assert all(row.error_fp64 < 1e-6 for row in stored.rows if row.impl.startswith("ours"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "logprob", "--dtype", "int8"], "--dtype is 'int8'; expected bf16, fp16, fp32 or auto"),
        (["bench", "logprob", "--vocabulary", "7"], "unknown option --vocabulary; did you mean --vocab"),
        (["bench", "logprob", "--ignored", "1"], "0 <= --ignored < 1"),
        (["bench", "reward", "--group", "1"], "--group >= 2"),
        (["bench", "reward", "--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["bench", "reward", "--device", "tpu"], "--device is 'tpu'"),
        (
            ["bench", "scale", "--gpus", "8"],
            "scale is a command of the source checkout now: python -m benchmarks.",
        ),
        (["bench", "--compare", "a.json", "b.json"], "python -m benchmarks.compare --help"),
        (["bench", "--plot=a.json"], "python -m benchmarks.plot --help"),
    ],
)
def test_wrong_use(words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_an_installed_package_has_no_suite_and_says_what_it_has(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("rime_fast.cli.bench.BENCHMARKS", tmp_path / "benchmarks")
    assert cli.main(["bench"]) == 2
    assert "Without one: rime-fast bench logprob, contrastive or reward" in capsys.readouterr().err


def test_an_impossible_backend_ends_before_the_measurement(monkeypatch, capsys):
    monkeypatch.setenv("RIME_FAST_BACKEND", "reward=warp")
    assert cli.main(["bench", "reward", *SIZES["reward"], "--device", "cpu"]) == 1
    assert "RIME_FAST_BACKEND for reward is 'warp'" in capsys.readouterr().err
