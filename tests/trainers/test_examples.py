"""The example settings are settings that exist, with values that their configs accept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from rime_fast.cli.training import TrainingOptions
from rime_fast.cli.values import build
from rime_fast.trainers.config import RefineConfig, RimeConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
YAMLS = sorted(EXAMPLES.glob("*.yaml"))


def names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_setting_of_an_example_exists_and_fits(path, tmp_path):
    values = yaml.safe_load(path.read_text())
    config = RefineConfig if path.stem.startswith("refine") else RimeConfig
    assert set(values) <= names(TrainingOptions) | names(config)
    built = build(config, values | {"output_dir": str(tmp_path)})
    for name in set(values) & names(config) - {"output_dir"}:
        found = getattr(built, name)
        assert found == type(found)(values[name]), name


def test_there_is_an_example_for_each_trainer_and_stage():
    assert {path.stem for path in YAMLS} >= {"sft", "refine", "lora"}
    for stage in (1, 2, 3):
        plan = json.loads((EXAMPLES / f"zero{stage}.json").read_text())
        assert plan["zero_optimization"]["stage"] == stage
        assert "optimizer" not in plan  # the trainer's own settings decide
