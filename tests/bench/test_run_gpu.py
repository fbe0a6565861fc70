"""make gpu: shares of the time, cut-off parts, one merged file; the conftest's deadline. No part of it needs a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.lib.stored import load
from rime_fast.bench.harness import Results, Row

ROOT = Path(__file__).parents[2]


def by_path(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_gpu():
    return by_path("run_gpu")


def test_shares_are_the_whole_time_and_leftovers_move_on(run_gpu, tmp_path, monkeypatch):
    assert sum(run_gpu.SHARES.values()) == pytest.approx(1.0)
    clock = [100.0]
    monkeypatch.setattr(run_gpu.time, "monotonic", lambda: clock[0])
    session = run_gpu.Session(tmp_path, minutes=8)
    assert session.limit("build") == pytest.approx(run_gpu.SHARES["build"] * 480)
    clock[0] += 10  # the build took 10 s: the tests get their own share and what was left
    both = run_gpu.SHARES["build"] + run_gpu.SHARES["tests"]
    assert session.limit("tests") == pytest.approx(both * 480 - 10)
    assert session.limit("sanitizer") == pytest.approx(470)
    clock[0] = 100.0
    session = run_gpu.Session(tmp_path, minutes=2, chosen=["kernels", "ncu"])  # who is asked for shares the time
    share = run_gpu.SHARES["kernels"] / (run_gpu.SHARES["kernels"] + run_gpu.EXTRA["ncu"])
    assert session.limit("kernels") == pytest.approx(120 * share)
    assert session.limit("ncu") == pytest.approx(120)


def test_a_slow_part_is_cut_off_and_the_next_one_runs(run_gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_gpu, "SHARES", {"build": 0.25, "tests": 0.75})
    session = run_gpu.Session(tmp_path, minutes=8 / 60)
    assert not session.run("build", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert session.run("tests", [sys.executable, "-c", "print('here')"])
    assert not session.run("other", [sys.executable, "-c", "raise SystemExit(3)"])
    assert [part["status"] for part in session.parts] == ["cut off by the time limit", "ok", "failed (exit 3)"]
    assert (tmp_path / "tests.log").read_text() == "here\n"


def test_without_a_device_every_gpu_part_says_so(run_gpu, tmp_path, capsys, monkeypatch):
    """main() end to end, but for the build (it would touch this tree) and the benchmarks themselves."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(run_gpu, "build", lambda session, capability: session.skip("build", "not in a test"))

    def bench(self, name, *words, select=""):
        Results(rows=[Row("op", name, "ours", {}, 1, 1, 1, peak_mib=2)]).write(self.output / f"{name}.json")
        self.parts.append({"part": name, "status": "ok"})

    monkeypatch.setattr(run_gpu.Session, "bench", bench)
    monkeypatch.setattr(sys, "argv", ["run_gpu.py", "--output", str(tmp_path)])
    assert run_gpu.main() == 0
    text = capsys.readouterr().out
    for part in ("tests", "first-minute", "kernels", "steps", "sanitizer"):
        assert f"{part}: skipped: no device" in text
    assert "op cpu_tiny" in text[text.index("summary:") :]  # the table comes last
    assert load(tmp_path / "bench.json").rows[0].impl == "ours"
    assert (tmp_path / "bench_memory.png").is_file()
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [part["part"] for part in parts] == [*run_gpu.SHARES, "cpu_tiny"]
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        assert {"bench.json", "summary.json", "bench_memory.png"} <= set(archive.getnames())
    monkeypatch.setattr(sys, "argv", ["run_gpu.py", "--part", "tests,kernel"])
    with pytest.raises(SystemExit):
        run_gpu.main()
    assert "no part is called kernel" in capsys.readouterr().err


def test_on_a_card_each_part_runs_its_own(run_gpu, tmp_path, monkeypatch):
    """The commands that a device would get; none of them is run here."""
    session, commands = run_gpu.Session(tmp_path, 8, [*run_gpu.SHARES, "ncu"]), {}
    monkeypatch.setattr(session, "run", lambda name, command, **env: commands.setdefault(name, " ".join(command)))
    monkeypatch.setattr(run_gpu.shutil, "which", lambda tool: tool)
    for part in [*run_gpu.SHARES, "ncu"][1:]:
        run_gpu.on_card(session, part)
    assert list(commands) == ["tests", "first-minute", "kernels", "steps", "sanitizer", "ncu"]
    for word in ("tests/gpu/test_steps.py", "benchmarks.lib.failures"):
        assert word in commands["tests"]
    assert "--rime-first 1" in commands["first-minute"]
    assert "--rime-first" not in commands["kernels"]
    assert commands["steps"].endswith(f"-k {run_gpu.STEPS}")
    assert commands["sanitizer"].startswith("compute-sanitizer")
    assert commands["sanitizer"].endswith("test_smoke")
    assert "--clock-control none" in commands["ncu"]


def test_a_failing_test_is_told_at_once(tmp_path):
    """Also where the run is cut off before its summary."""
    (tmp_path / "test_it.py").write_text(
        "def test_wrong():\n    assert 1 == 2\n\n\ndef test_long():\n    raise KeyboardInterrupt\n"
    )
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.lib.failures"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "FAILED test_it.py::test_wrong" in done.stderr
    assert "assert 1 == 2" in done.stderr


def test_every_operator_and_step_has_gpu_tests_and_a_smoke(run_gpu):
    """What make gpu and compute-sanitizer collect."""
    files = run_gpu.gpu_tests()
    assert "tests/gpu/test_steps.py" in files
    for name in ("logprob", "contrastive", "reward"):
        found = [path for path in files if name in Path(path).name]
        assert any("def test_smoke" in (ROOT / path).read_text() for path in found), name


def test_after_the_deadline_no_case_begins_and_the_file_says_so(tmp_path):
    conftest = by_path("conftest")
    options = {"--rime-deadline": 30.0, "--rime-json": str(tmp_path / "rows.json")}
    config = SimpleNamespace(rime_began=time.monotonic(), rime_results=Results(), getoption=options.get)
    item = SimpleNamespace(config=config, name="test_head[T32]", path=Path("bench_logprob_pool.py"))
    conftest.pytest_runtest_setup(item)  # begins
    config.rime_began -= 31
    with pytest.raises(pytest.skip.Exception, match="no time left of 30 s"):
        conftest.pytest_runtest_setup(item)
    conftest.pytest_runtest_teardown(item)
    stored = load(tmp_path / "rows.json")
    assert [(one.bench, one.case) for one in stored.skipped] == [("logprob_pool", "test_head[T32]")]
