"""``rime-fast doctor``: true lines where things are there, honest ones where they are not, exit code 0 always."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from rime_fast import cli, doctor
from rime_fast.ops import native


def by_name(findings: doctor.Findings) -> dict[str, doctor.Part]:
    return {part.name: part for part in findings.parts}


def test_findings_agree_with_the_installation():
    parts = by_name(doctor.examine())
    assert torch.__version__ in parts["torch"].found
    assert (parts["CUDA"].state == "ok") == torch.cuda.is_available()
    assert (parts["compiled CPU kernels"].state == "ok") == native.available()
    assert parts["transformers"].state == "ok"
    for part in parts.values():
        assert part.state in ("ok", "missing", "off")
        assert part.state != "missing" or (part.found and part.cost and part.remedy)


def test_operators_are_listed_with_reasons():
    choices = [choice for choice in doctor.examine().operators if choice.device == "cpu"]
    assert {choice.operator for choice in choices} == {"logprob", "contrastive", "reward"}
    for choice in choices:
        assert choice.backend in ("chunked", "reference")
        assert {"reference", "chunked", "triton", "cuda"} == {choice.backend, *choice.passed_over}
        assert all(choice.passed_over.values())


def test_environment_override_shows(monkeypatch):
    monkeypatch.setenv("RIME_FAST_BACKEND", "reference")
    findings = doctor.examine()
    assert {choice.backend for choice in findings.operators if choice.device == "cpu"} == {"reference"}
    assert findings.environment["RIME_FAST_BACKEND"] == "reference"


def test_impossible_override_is_told_not_raised(monkeypatch):
    monkeypatch.setenv("RIME_FAST_BACKEND", "warp")
    choices = doctor.examine().operators
    assert {choice.backend for choice in choices} == {"none"}
    assert "warp" in choices[0].passed_over["all"]


def test_missing_parts_name_their_cost(monkeypatch):
    hidden = {"peft", "sklearn", "deepspeed"}
    real = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name, *rest: None if name in hidden else real(name, *rest))
    monkeypatch.setattr(native, "why_not", lambda cuda=False: "not built here")
    parts = by_name(doctor.examine())
    assert (parts["peft"].state, parts["peft"].cost) == ("missing", "no LoRA (--lora_rank)")
    assert parts["scikit-learn"].remedy == "pip install 'rime-fast[demo]'"
    assert parts["compiled CPU kernels"].found == "not built here"


def test_tables_and_json(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "compiled CPU kernels" in text
    assert "contrastive" in text
    assert cli.main(["doctor", "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert {"version", "parts", "operators", "environment"} <= set(loaded)


@pytest.mark.parametrize(
    "missing", [["torch"], ["transformers", "accelerate", "datasets", "peft", "deepspeed", "matplotlib"]]
)
def test_bare_environment_exits_0(missing):
    """Imports of what is missing fail as in a bare environment; doctor still answers, and says so."""
    code = f"""
import sys, importlib.util
missing = {missing!r}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Refuse())
from rime_fast.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in missing:
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert "missing" in line
