"""Options read from source agree with the dataclasses; values of every kind arrive with the right type."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

from rime_fast.cli import load
from rime_fast.cli.options import Group, UsageError, parse_arguments, read_fields, read_yaml
from rime_fast.cli.training import TrainingOptions
from rime_fast.cli.values import build, coerce
from rime_fast.trainers import config as configs

EXAMPLES = Path(__file__).parents[2] / "examples"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Sample:
    """What the tests parse into."""

    name: str = field(metadata={"help": "A name."})
    rate: float = field(default=1e-3, metadata={"help": "100%% of it."})
    steps: int | None = None
    on: bool = False
    off: bool | None = None
    many: list[str] = field(default_factory=list)
    extra: dict | str | None = None
    colour: Colour | str = "red"
    level: Literal["a", "b"] = "a"
    hidden: int = field(default=0, init=False)


def known():
    return read_fields(__import__("pathlib").Path(__file__), "Sample")


def test_source_tells_names_defaults_and_help():
    options = known()
    assert list(options) == ["name", "rate", "steps", "on", "off", "many", "extra", "colour", "level"]
    assert (options["name"].default, options["name"].help) == (None, "A name.")
    assert (options["rate"].default, options["rate"].help) == ("0.001", "100% of it.")
    assert options["many"].is_list
    assert options["off"].is_flag
    assert not options["steps"].is_flag


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--name x", {"name": "x"}),
        ("--name=x --rate=1e-4", {"name": "x", "rate": 1e-4}),
        ("--name x --rate -2", {"name": "x", "rate": -2.0}),
        ("--name x --steps 5", {"steps": 5}),
        ("--name x --steps none", {"steps": None}),
        ("--name x --on", {"on": True}),
        ("--name x --on false --off no", {"on": False, "off": False}),
        ("--on --name x", {"on": True, "name": "x"}),
        ("--name x --many a b --many c", {"many": ["a", "b", "c"]}),
        ("--name none", {"name": "none"}),
        ("--name x --level b", {"level": "b"}),
        ("--name x --colour blue", {"colour": Colour.BLUE}),
        ("--name x --colour green", {"colour": "green"}),
        ("--name=", {"name": ""}),
    ],
)
def test_command_line_values(words, expected):
    made = build(Sample, parse_arguments(words.split(), known()))
    for name, value in expected.items():
        assert getattr(made, name) == value
        assert type(getattr(made, name)) is type(value)


def test_json_becomes_a_mapping():
    values = parse_arguments(["--name", "x", "--extra", '{"a": 1}'], known())
    assert build(Sample, values).extra == {"a": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nam x", "unknown option --nam; did you mean --name"),
        ("--zzzzzz x", "unknown option --zzzzzz; --help lists them"),
        ("--name", r"--name needs a value \(str\)"),
        ("--name a --name b", "--name is given twice"),
        ("x", "unexpected 'x'; options are written --name value"),
        ("--rate 3", "--name is required"),
        ("--name x --rate abc", "--rate is 'abc'; expected a number"),
        ("--name x --steps 1.5", "--steps is '1.5'; expected a whole number or none"),
        ("--name x --level c", "--level is 'c'; expected 'a' or 'b'"),
        ("--name x --on --off maybe", "unexpected 'maybe'"),
    ],
)
def test_wrong_use_is_named(words, message):
    with pytest.raises(UsageError, match=message):
        build(Sample, parse_arguments(words.split(), known()))


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_yaml_values(tmp_path):
    text = "name: no\nrate: 1e-4\nsteps: null\non: true\nmany: [a, b]\nextra: {a: 1}\n"
    made = build(Sample, read_yaml(write(tmp_path, text), known()))
    assert made == Sample(name="no", rate=1e-4, steps=None, on=True, many=["a", "b"], extra={"a": 1})


def test_dashes_are_underscores(tmp_path):
    options = {"two_words": known()["rate"]}
    assert parse_arguments(["--two-words", "1"], options) == {"two_words": "1"}
    assert read_yaml(write(tmp_path, "two-words: 1"), options) == {"two_words": 1}


def test_empty_yaml_is_no_option(tmp_path):
    assert read_yaml(write(tmp_path, "# nothing\n"), known()) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratte: 1", r"config.yaml: unknown key 'ratte'; did you mean rate\?"),
        ("rate: 1\nrate: 2", "key 'rate' is given twice"),
        ("- rate", "holds a list; expected lines of name: value"),
        ("rate: [1", "is not YAML"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        read_yaml(write(tmp_path, text), known())


def test_missing_yaml_file():
    with pytest.raises(UsageError, match=r"--config nowhere\.yaml: No such file"):
        read_yaml("nowhere.yaml", known())


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [(3.0, int, 3), (True, int | bool, True), ("1e3", float, 1000.0), (7, str, "7"), (["a"], Any, ["a"])],
)
def test_coerce(value, hint, expected):
    found = coerce(value, hint, "x")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("value", "hint"), [(True, int), (None, str), ([1], float), ("{", dict), ("{x}", dict)])
def test_coerce_refuses(value, hint):
    with pytest.raises(UsageError):
        coerce(value, hint, "x")


def test_trainer_options_by_source_equal_the_real_dataclasses():
    """The fast reader and the imported classes must agree, or help and checks would lie."""
    from dataclasses import fields

    from rime_fast.cli.refine import COMMAND as refine
    from rime_fast.cli.train import COMMAND as train
    from rime_fast.cli.training import TrainingOptions
    from rime_fast.trainers.config import RefineConfig, RimeConfig

    for command, config in ((train, RimeConfig), (refine, RefineConfig)):
        real = {f.name for f in (*fields(config), *fields(TrainingOptions)) if f.init and not f.name.startswith("_")}
        assert set(command.options()) == real
        assert all(option.help for group in command.groups for option in group.options().values())


def test_every_real_default_survives_being_written_out():
    """Each default of the trainer configs, typed on the command line, comes back as itself."""
    from dataclasses import MISSING, fields
    from typing import get_type_hints

    from rime_fast.trainers.config import RefineConfig, RimeConfig

    for config in (RimeConfig, RefineConfig):
        hints = get_type_hints(config)
        for one in fields(config):
            if one.init and one.default is not MISSING and isinstance(one.default, (bool, int, float, str)):
                assert coerce(str(one.default), hints[one.name], one.name) in (one.default, str(one.default)), one.name


def test_group_with_a_choice_of_fields():
    group = Group("t", "rime_fast.cli.training", "TrainingOptions", only=("report", "model"))
    assert list(group.options()) == ["report", "model"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_example_files_are_options_that_fit(path):
    """Every key of examples/*.yaml is an option of its command and its value has the declared type (tests/trainers
    builds the configs)."""
    name = "refine" if path.stem.startswith("refine") else "train"
    values = import_module(f"rime_fast.cli.{name}").COMMAND.read(["--config", str(path)])
    assert build(TrainingOptions, values).train_data
    hints = get_type_hints(configs.RimeConfig if name == "train" else configs.RefineConfig)
    for key, value in values.items():
        if key in hints:
            coerce(value, hints[key], key)


@pytest.mark.parametrize(("name", "config"), [("train", configs.RimeConfig), ("refine", configs.RefineConfig)])
def test_every_field_of_a_config_is_an_option(name, config):
    """The command line reads fields from source, part by part: a part that it is not given would be refused there."""
    from transformers import TrainingArguments

    command = import_module(f"rime_fast.cli.{name}").COMMAND
    ours = {f.name for f in fields(config)} - {f.name for f in fields(TrainingArguments)}
    assert ours <= {option for group in command.groups for option in group.options()}


@pytest.mark.parametrize("words", ["--fsdp", "--fsdp true", "--config"])
def test_fsdp_is_switched_on_by_command_line_and_yaml(words, tmp_path):
    """TrainingArguments declares it as text, of which "true" is none that it knows."""
    given = words.split() + [write(tmp_path, "fsdp: true\n")] * (words == "--config")
    values = load("train").read([*given, "--output_dir", str(tmp_path)])
    assert build(configs.RimeConfig, values).fsdp is True


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_either_name_warns_of_nothing(name, tmp_path):
    """transformers renamed it after the oldest release that we take; the pages have the name that all releases know."""
    if name not in load("train").options():
        pytest.skip("transformers has no such name yet")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = build(configs.RimeConfig, load("train").read([f"--{name}", "--output_dir", str(tmp_path)]))
    assert args.gradient_checkpointing
    assert not build(configs.RimeConfig, {"output_dir": str(tmp_path)}).gradient_checkpointing
