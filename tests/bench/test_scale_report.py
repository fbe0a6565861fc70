"""``python -m benchmarks.scale``: tables, JSON, curves."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.scale.__main__ import main
from benchmarks.scale.plots import PANELS, plot_scale
from benchmarks.scale.report import ScaleOptions, make_report

DOCS = Path(__file__).parents[2] / "docs" / "measurements"


def test_the_command_prints_and_writes(tmp_path, capsys):
    words = ["--gpus", "8", "64", "--model", "qwen3-vl-2b", "--output", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "MODELLED, NOT MEASURED" in printed
    report = json.loads((tmp_path / "scale-qwen3-vl-2b.json").read_text())
    assert [row["gpus"] for row in report["joint"]] == [8, 64]
    row = report["joint"][1]
    assert row["seconds"] == pytest.approx(sum(part["seconds"] for part in row["parts"].values()))
    assert f"{1e3 * row['seconds']:.1f}" in printed
    title = f"{report['model']['parameters'] / 1e9:.2f} billion parameters"
    assert title in printed
    drawing = ElementTree.parse(tmp_path / "scale-qwen3-vl-2b.svg").getroot()
    assert drawing.tag.endswith("svg")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "12"], "gpus is 12"),
        (["--model", "qwen2-vl-72b"], "expected one of qwen2-vl-2b"),
        (["--strategy", "fsdp"], "strategy is 'fsdp'"),
        (["--matmul", "1.2"], "matmul is 1.2"),
        (["--kept", "-1"], "kept is -1.0"),
        (["--gpu", "8"], "unknown option --gpu; did you mean --gpus"),
    ],
)
def test_bad_options_say_what_is_expected(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_figures_come_from_the_json_alone(tmp_path):
    """The same file, the same drawing, to the byte; every panel has its curves."""
    report = make_report(ScaleOptions(gpus=[8]))
    drawings = []
    for name in "ab":
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report))
        drawings.append(plot_scale(path).read_bytes())
    assert drawings[0] == drawings[1]
    assert all(report["curves"][panel[0]] for panel in PANELS)


@pytest.mark.parametrize("model", ["qwen2-vl-2b", "qwen2-vl-7b"])
def test_the_committed_page_is_what_the_code_says(model):
    """docs/measurements/scale-*.json against the model of today; docs/scale.md quotes these files."""
    stored = json.loads((DOCS / f"scale-{model}.json").read_text())
    options = ScaleOptions(**stored["options"])
    fresh = json.loads(json.dumps(make_report(options)))
    assert fresh == stored, f"python -m benchmarks.scale --model {model} --output docs/measurements"
