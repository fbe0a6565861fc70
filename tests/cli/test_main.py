"""The command line from outside: help without torch, exit codes, messages. Commands that train: test_end_to_end.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rime_fast import cli
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

NAMES = list(cli.COMMANDS)


def run(*words: str) -> int:
    return cli.main(list(words))


def test_overview_names_every_command(capsys):
    assert run() == 0
    text = capsys.readouterr().out
    for name in NAMES:
        assert f"  {name}" in text


@pytest.mark.parametrize("name", NAMES)
def test_help_teaches(name, capsys):
    assert run(*name.split(), "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"rime-fast {name}")
    assert "Examples" in text
    assert f"rime-fast {name}" in text.split("Examples")[1]
    assert "--config" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_example_parses(name):
    """The options in the examples exist and have values (files are not opened)."""
    from shlex import split

    command = cli.load(name)
    for _, line in command.examples:
        words = split(line.split(" > ")[0])
        start = words.index("rime_fast.cli") + 1 if "rime_fast.cli" in words else words.index("rime-fast") + 1
        rest = words[start + len(name.split()) :]
        if "--config" in rest:
            at = rest.index("--config")
            del rest[at : at + 2]
        command.read(rest)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--lerning_rate", "1"], ["--version"]])
def test_no_torch_for_help_and_mistakes(words):
    """Help and a mistyped option import neither torch nor transformers, so they answer at once."""
    code = (
        "import sys; from rime_fast.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_commands_help_imports_nothing_heavy():
    """What keeps every --help under a second, wherever it runs."""
    code = (
        "import sys; from rime_fast import cli; "
        "[cli.main([*name.split(), '--help_all']) for name in cli.COMMANDS]; "
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'PIL', 'rich', 'datasets'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "rime-fast trian: no such command; did you mean rime-fast train?"),
        (["train", "--lerning_rate", "1"], "unknown option --lerning_rate; did you mean --learning_rate"),
        (["train", "--model", "x"], "--train_data is required"),
        (["eval", "--model", "x"], "--data is required"),
        (
            ["embed", "--model", "x", "--data", "y.txt", "--mode", "fast"],
            "--mode is 'fast'; expected disc, gen, latent, both",
        ),
        (
            ["embed", "--model", "x", "--data", "y", "--precision", "int4"],
            "--precision is 'int4'; expected float32, int8",
        ),
        (
            ["embed", "--model", "/", "--data", "y", "--precision", "int8", "--anchors", "both"],
            "--precision goes without",
        ),
        (["eval", "--suite", "beir", "--root", "/", "--model", "/", "--dims", "int8"], "--dims int8 goes with --data"),
        (["train", "--config", "no.yaml"], "--config no.yaml: No such file"),
        (["doctor", "extra"], "unexpected 'extra'"),
        (["data", "check", "--images", "head"], "--files is required"),
        (["eval", "--model", "./nowhere", "--data", "x"], "--model ./nowhere: no such directory"),
        (["train", "--model", "no/such/dir", "--train_data", "x"], "--model no/such/dir: no such directory"),
    ],
)
def test_wrong_use_exits_2_and_names_it(words, message, capsys):
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_bad_yaml_key_is_named_with_its_file(tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    path.write_text("model: x\ntrain_data: [y]\ncross_wieght: 0\n")
    assert run("train", "--config", str(path)) == 2
    assert "sft.yaml: unknown key 'cross_wieght'; did you mean cross_weight" in capsys.readouterr().err


def test_bad_value_and_failed_check_of_a_config(tmp_path, capsys):
    base = ["train", "--model", "x", "--train_data", "y", "--output_dir", str(tmp_path)]
    assert run(*base, "--learning_rate", "fast") == 2
    assert "--learning_rate is 'fast'; expected a number" in capsys.readouterr().err
    assert run(*base, "--temperature", "0") == 2
    assert "temperature is 0.0; expected a number > 0" in capsys.readouterr().err


def test_command_line_wins_over_later_over_earlier_file(tmp_path):
    from rime_fast.cli.train import COMMAND

    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\nlearning_rate: 1e-3\nmax_steps: 5\n")
    second.write_text("seed: 2\nlearning_rate: 1e-4\n")
    values = COMMAND.read(["--seed", "3", "--config", str(first), "--config", str(second)])
    assert values == {"seed": "3", "learning_rate": "1e-4", "max_steps": 5}


EMBEDDING = ("embed", "eval", "mine", "export", "search", "serve")


@pytest.mark.parametrize("name", [*EMBEDDING, "train", "refine", "data check"])
def test_every_command_that_opens_images_for_a_model_takes_their_limit(name):
    assert "max_image_pixels" in cli.load(name).options()


@pytest.mark.parametrize("command", ["embed", "eval", "mine"])
def test_the_limit_of_pixels_reaches_the_images(command, tmp_path, capsys):
    tokenizer = tiny_tokenizer(["which one red"])
    model = tiny_model("qwen2_vl", tokenizer=tokenizer)
    add_embedding_tokens(model, tokenizer)
    model.save_pretrained(tmp_path / "m")
    tiny_processor(tokenizer).save_pretrained(tmp_path / "m")
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    side = {"text": "which one", "image": "a.png"}
    row = {"embed": side, "mine": {"query": side, "target": {"text": "red"}}}
    row["eval"] = {"query": side, "candidates": [{"text": "red"}], "correct": 0}
    (tmp_path / "d.jsonl").write_text(json.dumps(row[command]) + "\n")
    words = [command, "--model", str(tmp_path / "m"), "--data", str(tmp_path / "d.jsonl"), "--max_image_pixels", "599"]
    words += ["--output", str(tmp_path / "o.jsonl")] if command == "mine" else ["--output_dir", str(tmp_path / "o")]
    assert run(*words) == 1
    assert "30 x 20 pixels; at most 599 are decoded" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["embed"], ["embed", "--anchors", "both"], ["eval"]], ids=str)
def test_a_folder_that_cannot_be_written_is_told_of_before_the_model_is_loaded(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    side = {"text": "a"}
    row = {"query": side, "target": side} if "--anchors" in command else side
    row = {"query": side, "candidates": [side], "correct": 0} if command == ["eval"] else row
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--model", str(tmp_path), "--data", str(tmp_path / "d.jsonl"), "--output_dir", str(tmp_path / "file")]
    assert run(*command, *words) == 1
    assert f"output_dir '{tmp_path / 'file'}' cannot be written" in capsys.readouterr().err


def test_interrupt_exits_130(monkeypatch, capsys):
    from rime_fast.cli import doctor

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor.COMMAND.__class__, "main", interrupted)
    assert run("doctor") == 130
    assert "interrupted" in capsys.readouterr().err


def test_failure_is_one_line_and_a_traceback_on_request(monkeypatch, tmp_path, capsys):
    data = tmp_path / "test.json"
    data.write_text('{"queries": 3, "candidates": []}')
    words = ["eval", "--model", str(tmp_path), "--data", str(data)]
    assert run(*words) == 1
    message = capsys.readouterr().err
    assert "test.json, queries: is a number; expected a list" in message
    assert "Traceback" not in message
    assert "RIME_FAST_DEBUG=1" in message
    monkeypatch.setenv("RIME_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="expected a list"):
        run(*words)


# --- data check ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    good = {
        "query": {"text": "what?", "image": "red.png", "rewrite": "red"},
        "target": {"text": "red", "rewrite": "red"},
    }
    bad = {"query": {"text": "what?", "image": "gone.png", "rewrite": "red"}, "target": {"text": "x", "rewrite": " "}}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good)))
    return path


def test_data_check_names_file_row_and_field(pairs, capsys):
    assert run("data", "check", str(pairs)) == 1
    text = capsys.readouterr().out
    assert "pairs.jsonl, row 2, query.images[0]: missing image" in text
    assert "pairs.jsonl, row 2, target.rewrite: empty rewrite" in text
    assert "2 of 3 rows are good" in text


def test_data_check_writes_the_good_rows(pairs, tmp_path, capsys):
    good, report = tmp_path / "good.jsonl", tmp_path / "check.json"
    assert run("data", "check", str(pairs), "--write_good", str(good)) == 1
    assert run("data", "check", "--report", str(report), "--files", str(good), "--images", "head") == 0
    loaded = json.loads(report.read_text())
    assert (loaded[0]["rows"], loaded[0]["bad_rows"]) == (2, 0)
    assert "2 of 2 rows are good" in capsys.readouterr().out


def test_data_check_refuses_unknown_strictness(pairs, capsys):
    assert run("data", "check", str(pairs), "--images", "some") == 2
    assert "images is 'some'" in capsys.readouterr().err


# --- the documentation ------------------------------------------------------------------------------------------------


def documented_lines() -> list[str]:
    """Every rime-fast line of a bash block in README.md, three pages of docs/ and the overview."""
    root = Path(__file__).parents[2]
    pages = ("README.md", "docs/cli.md", "docs/benchmarks.md", "docs/serving.md")
    text = "\n".join((root / page).read_text() for page in pages)
    blocks = [part.split("```")[0] for part in text.split("```bash")[1:]]
    lines = [line.strip() for block in [*blocks, cli.overview().split("report:")[1]] for line in block.splitlines()]
    return [line for line in lines if "rime-fast" in line or "rime_fast.cli" in line]


@pytest.mark.parametrize("line", documented_lines())
def test_documented_lines_are_accepted(line, monkeypatch):
    """The command exists and takes these options; configs (examples/) are read, data and models are not."""
    from shlex import split

    monkeypatch.chdir(Path(__file__).parents[2])
    words = split(line.split(" > ")[0], comments=True)
    rest = words[words.index("rime_fast.cli" if "rime_fast.cli" in words else "rime-fast") + 1 :]
    name, rest = cli._command(rest)
    cli.load(name).read(rest)


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_what_can_be_typed(name, capsys):
    """Defaults are values, not expressions of the source; kinds are no Python; one word is no list."""
    assert run(*name.split(), "--help_all") == 0
    text = capsys.readouterr().out
    defaults = re.findall(r"\(default: ([^)]*)\)", " ".join(text.split()))
    assert not [one for one in defaults if re.search(r"<<|\d \* \d|made at|^$", one)]
    kinds = re.findall(r"^  --\w+ (\S.*?)(?:  |$)", text, re.M)
    assert not [one for one in kinds if re.search(r"Literal|Strategy|None|Any|Names", one)]
    positional = cli.load(name).positional
    if positional:
        assert ("..." in text.splitlines()[0].split("[")[0]) == cli.load(name).options()[positional].is_list
