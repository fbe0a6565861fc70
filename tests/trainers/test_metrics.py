"""Device-side sums, the training clock, and the learnable temperature."""

from __future__ import annotations

import io
import math
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from rime_fast.trainers.callbacks import MetricSums, ProgressCallback, StepClock, clock, summary
from rime_fast.trainers.temperature import LearnableTemperature

CPU = torch.device("cpu")


def test_means_and_totals():
    sums = MetricSums()
    sums.add({"a": torch.tensor(1.0), "b": torch.tensor(10.0)})
    sums.add({"a": torch.tensor(3.0), "b": torch.tensor(20.0)})
    sums.add({"c": torch.tensor(5, dtype=torch.int64), "a": torch.tensor(8.0, requires_grad=True)})
    sums.count(tokens=7)
    sums.count(tokens=5, samples=2)
    assert sums.drain(CPU) == {"a": 4.0, "b": 15.0, "c": 5.0, "tokens": 12.0, "samples": 2.0}
    assert sums.drain(CPU) == {}


def test_means_over_tokens_weigh_by_tokens():
    sums = MetricSums()
    for value, tokens in ((1.0, 30), (4.0, 10), (2.0, 60)):
        sums.add({"kl": torch.tensor(value)}, weight=tokens)
        sums.add({"reward": torch.tensor(value)})
    found = sums.drain(torch.device("cpu"))
    assert found == {"kl": pytest.approx(1.9), "reward": pytest.approx(7 / 3)}


def test_off_a_terminal_each_log_is_one_line(tmp_path):
    written = io.StringIO()
    progress = ProgressCallback("refine-rl", console=Console(file=written, width=80))
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9)
    numbers = {f"eval_number_{i}": 0.5 for i in range(9)}
    for logs in ({"loss": 1.0}, numbers):
        progress.warning = "long " * 40 + "end"
        progress.on_log(None, state, None, logs=logs)
    lines = written.getvalue().splitlines()
    assert [line.split(": ")[0] for line in lines] == ["refine-rl"] * 4
    assert lines[0].endswith("long end")
    assert lines[3].endswith("eval_number_8 0.5")


def test_or_only_what_is_finite_counts():
    sums = MetricSums(finite=True)
    sums.add({"a": torch.tensor(1.0), "b": torch.tensor(math.nan)}, weight=3)
    sums.add({"a": torch.tensor(math.inf), "b": torch.tensor(math.nan)}, weight=5)
    sums.add({"a": torch.tensor(5.0)})
    found = sums.drain(CPU)
    assert found["a"] == 2.0
    assert math.isnan(found["b"])


@pytest.mark.parametrize("finite", [False, True])
def test_adding_reads_nothing_back(monkeypatch, finite):
    def forbidden(*_: object) -> None:
        raise AssertionError("a host read in the step")

    sums = MetricSums(finite)
    for name in ("item", "tolist", "nonzero", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    sums.add({"a": torch.ones(())})
    sums.add({"a": torch.ones(())})
    monkeypatch.undo()
    assert sums.drain(CPU) == {"a": 1.0}


def test_clock_leaves_pauses_out():
    watch = StepClock()
    with watch.paused():
        time.sleep(0.2)
    time.sleep(0.02)
    assert 0.015 < watch.lap() < 0.15
    assert watch.lap() < 0.05


def test_progress_line_shows_terms_and_rates():
    line = summary(
        {
            "loss": 1.234567,
            "ce/query": 0.5,
            "contrast/gen-gen": 2.0,
            "epoch": 1.0,
            "samples_per_second": 1234.4,
            "tokens_per_second": 98765.0,
        }
    )
    assert line == "loss 1.23  ce/query 0.5  contrast/gen-gen 2  1,234 samples/s  98,765 tokens/s"
    assert (clock(75), clock(3661)) == ("01:15", "1:01:01")


def fitted(steps: int, temperature: LearnableTemperature) -> float:
    for _ in range(steps):
        (temperature.value() - 0.5).square().backward()
        temperature.step(1.0)
    return float(temperature.value())


def test_temperature_learns_and_resumes_to_the_bit(tmp_path):
    straight = LearnableTemperature(0.02, 0.05, CPU)
    want = fitted(60, straight)
    assert 0.3 < want < 0.7
    half = LearnableTemperature(0.02, 0.05, CPU)
    fitted(25, half)
    half.save(tmp_path)
    again = LearnableTemperature(0.9, 0.05, CPU)
    again.load(tmp_path)
    assert fitted(35, again) == want


def test_temperature_stays_in_range_and_follows_the_schedule(tmp_path):
    temperature = LearnableTemperature(0.02, 10.0, CPU)
    for _ in range(3):
        temperature.value().backward()
        temperature.step(1.0)
    assert math.isclose(float(temperature.value()), 0.005, rel_tol=1e-6)
    temperature.value().backward()
    temperature.step(0.0)
    assert math.isclose(float(temperature.value()), 0.005, rel_tol=1e-6)
    with pytest.raises(FileNotFoundError, match="learnable_temperature=False"):
        temperature.load(tmp_path)
