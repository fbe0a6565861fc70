"""Result files: what got worse between two of them, the figures of one, and the clock behind a step's parts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from benchmarks import compare, plot
from benchmarks.lib import plots
from benchmarks.lib.comparison import compare_files
from benchmarks.lib.parts import PartClock
from benchmarks.lib.stored import load, merge
from rime_fast.bench import harness
from rime_fast.bench.harness import Results, Row


def row(impl: str, median: float, **figures) -> Row:
    values = {"bench": "op", "case": "a", "shape": {}, **figures}
    return Row(impl=impl, median_ms=median, p20_ms=median, p80_ms=median, **values)


def write(path, rows, **environment):
    Results(rows=rows).write(path)
    body = json.loads(path.read_text())
    body["environment"] |= environment
    path.write_text(json.dumps(body))
    return path


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (compare.main, ["a.json"], "expected two JSON files, got 1"),
        (compare.main, ["a.json", "b.json", "--threshold", "0"], "--threshold is 0.0"),
        (plot.main, [], "--file is required"),
    ],
)
def test_wrong_use(main, words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["compare", "plot", "scale"])
def test_help_teaches(name, capsys):
    from importlib import import_module

    module = import_module("benchmarks.scale.__main__" if name == "scale" else f"benchmarks.{name}")
    assert module.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"python -m benchmarks.{name}")
    assert "Examples" in text


def test_ratios_to_the_floor_hold_on_any_machine(tmp_path, capsys):
    before = [row("ours", 10, ratio_to_floor=1.2), row("eager", 20, ratio_to_floor=2.4)]
    after = [row("ours", 99, ratio_to_floor=1.25), row("eager", 99, ratio_to_floor=3.0)]
    a, b = write(tmp_path / "a.json", before, device="x"), write(tmp_path / "b.json", after, device="y")
    found = compare_files(a, b)
    assert [(change.impl, change.figure) for change in found.worse] == [("eager", "x floor")]
    assert found.same == 1
    assert compare.main([str(a), str(b)]) == 0  # a slower peer is not our regression
    assert compare.main([str(a), str(b), "--threshold", "0.03"]) == 1
    assert "2 worse (1 ours)" in capsys.readouterr().out


def test_steps_compare_to_the_plain_recipe_then_by_median(tmp_path):
    before, after = [row("ours", 10), row("plain step", 40)], [row("ours", 40), row("plain step", 80)]
    a, b = write(tmp_path / "a.json", before, device="x"), write(tmp_path / "b.json", after, device="y")
    found = compare_files(a, b)
    assert [(change.figure, change.factor) for change in found.worse] == [("x plain step", 2.0)]
    assert found.without == [("op", "a", "plain step")]  # another machine: no median is comparable
    same = write(tmp_path / "c.json", after, device="x")
    assert {change.figure for change in compare_files(a, same).worse} == {"x plain step", "ms"}


def test_memory_errors_and_rows_that_come_and_go(tmp_path):
    a = [row("ours", 1, peak_mib=10, error_fp64=1e-5), row("ours_b", 1, peak_mib=1, error_fp64=1e-9), row("old", 1)]
    b = [row("ours", 1, peak_mib=20, error_fp64=3e-5), row("ours_b", 1, peak_mib=2, error_fp64=5e-9), row("new", 1)]
    found = compare_files(write(tmp_path / "a.json", a), write(tmp_path / "b.json", b))
    assert {(change.impl, change.figure) for change in found.worse} == {("ours", "MiB"), ("ours", "error")}
    assert found.gone == [("op", "a", "old")]
    assert found.new == [("op", "a", "new")]
    back = compare_files(tmp_path / "b.json", tmp_path / "a.json")
    assert {(change.impl, change.figure) for change in back.better} == {("ours", "MiB"), ("ours", "error")}


def test_nan_error_is_worse(tmp_path):
    a, b = (write(tmp_path / f"{x}.json", [row("ours", 1, error_fp64=x)]) for x in (1e-5, math.nan))
    assert [change.figure for change in compare_files(a, b).worse] == ["error"]


def test_files_that_are_no_results_are_named(tmp_path, capsys):
    good, bad, other = write(tmp_path / "a.json", [row("ours", 1)]), tmp_path / "b.json", tmp_path / "c.json"
    bad.write_text("{")
    other.write_text('{"schema": 9}')
    for path, message in ((bad, "b.json is not JSON"), (other, "expected benchmark results of schema 1, got 9")):
        assert compare.main([str(good), str(path)]) == 1
        assert message in capsys.readouterr().err
    assert compare.main([str(good), str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_merged_files_keep_every_row(tmp_path):
    parts = [write(tmp_path / f"{i}.json", [row(f"ours{i}", i + 1)], device=f"d{i}") for i in range(2)]
    merge(parts, tmp_path / "all.json")
    found = load(tmp_path / "all.json")
    assert [r.impl for r in found.rows] == ["ours0", "ours1"]
    assert found.environment["device"] == "d0"


# --- figures ---------------------------------------------------------------------------------------------------------


def full_run() -> list[Row]:
    rows = [
        row("copy", 1, bench="ceiling", gbytes_s=20.0),
        row("gemm", 1, bench="ceiling", tflops=0.1, shape={"dtype": "float32"}),
        row("floor", 10, ratio_to_floor=1.0, tflops=0.08, gbytes_s=2.0),
        row("ours", 12, ratio_to_floor=1.2, tflops=0.07, gbytes_s=1.7, peak_mib=3.0),
        row("eager", 30, ratio_to_floor=3.0, tflops=0.03, gbytes_s=0.7, peak_mib=90.0),
    ]
    for n in (100, 200, 400):
        shape = {"pairs": n, "width": 8, "dtype": "float32"}
        rows.append(row("ours", 1e-4 * n**2, bench="op_growth", case=str(n), shape=shape, peak_mib=n / 50))
    parts = [f"{impl}/{part}" for impl in ("ours", "plain") for part in ("head", "other")]
    return rows + [row(name, 3, bench="step_parts") for name in parts]


def test_every_figure_is_drawn_from_the_file(tmp_path, capsys):
    source = write(tmp_path / "run.json", full_run())
    assert plot.main([str(source), "--output", str(tmp_path / "plots")]) == 0
    written = capsys.readouterr().out.split()
    names = ["roofline", "floor_ratios", "memory", "growth", "step_parts"]
    assert written == [str(tmp_path / "plots" / f"run_{name}.png") for name in names]
    for path in written:
        assert Image.open(path).size[0] > 500
    one = write(tmp_path / "one.json", [row("ours", 1)])
    assert plot.main([str(one)]) == 2
    assert "no rows that a figure is made of" in capsys.readouterr().err


def test_the_roofline_is_as_high_as_the_fastest_floor(tmp_path):
    faster = row("floor", 5, ratio_to_floor=1.0, tflops=0.2, gbytes_s=4.0, shape={"dtype": "float32"})
    drawn = plots.roofline(load(write(tmp_path / "run.json", [*full_run(), faster])))
    assert drawn is not None
    assert max(drawn.axes[0].lines[0].get_ydata()) == pytest.approx(0.2)


def test_a_floor_is_made_by_the_fastest_library(monkeypatch):
    a, b = torch.randn(5, 3), torch.randn(3, 4)
    monkeypatch.setattr(harness, "has_onednn", lambda: True)
    monkeypatch.setattr(harness, "fast_product", lambda a, b: 2 * (a @ b))
    for blas, onednn, factor in ((2.0, 1.0, 2), (1.0, 2.0, 1)):
        taken = iter([[blas, 9.0], [onednn, 9.0]])
        monkeypatch.setattr(harness, "_FASTEST", {})
        monkeypatch.setattr(harness.timeit, "repeat", lambda *args, taken=taken, **kwargs: next(taken))
        assert torch.equal(harness.library_product(a, b), factor * (a @ b))
        assert torch.equal(harness.library_product(a, b), factor * (a @ b))  # remembered
    assert torch.equal(harness.library_product(a.double(), b.double()), a.double() @ b.double())  # never oneDNN's


def test_a_gpu_is_busy_until_the_host_has_issued_a_call(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(harness, "_filler", lambda: (torch.ones(1, 1), torch.ones(1, 1), 0.5))
    monkeypatch.setattr(torch, "mm", lambda *args, out: log.append("product"))
    monkeypatch.setattr(harness, "_flush", lambda: log.append("flush"))
    measured = ["event", "call", "event", "wait"]
    for ahead, products in ((0.0, 0), (3.0, 8), (1e9, 121)):  # at most 50 ms
        log.clear()
        taken, issued = harness._time_once(lambda: log.append("call"), "cuda", ahead)
        assert log == ["product"] * products + ["flush", *measured]
        assert taken == 2.5
        assert issued >= 0


def test_growth_curves_find_what_varies_and_fit_its_slope():
    points = [(n, 3.0 * n**1.5) for n in (10, 100, 1000)]
    assert plots.fitted_slope(points) == pytest.approx(1.5)
    assert math.isnan(plots.fitted_slope(points[:1]))
    rows = [one for one in full_run() if one.bench == "op_growth"]
    rows.append(row("ours", 1, bench="op_growth", shape={"pairs": 400, "width": 16, "dtype": "float32"}))
    varied = plots._varied(rows)
    assert {name: sorted(one.shape[name] for one in line) for name, line in varied.items()} == {
        "pairs": [100, 200, 400],
        "width": [8, 16],
    }


# --- the clock of a step ---------------------------------------------------------------------------------------------


def test_clock_counts_each_moment_once(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("benchmarks.lib.parts.time.perf_counter", lambda: next(times))
    clock = PartClock("cpu")
    clock.mark("ignored")  # not started: takes no time
    clock.start()
    module = torch.nn.Identity()
    with clock.watching({"head": module}):
        module(torch.zeros(1))  # 1 to 3
    with clock.part("backward"):  # 6 to 10
        pass
    assert clock.totals() == {"other": 1.0e3 + 3.0e3 + 5.0e3, "head": 2.0e3, "backward": 4.0e3}
