"""`make gpu`: build csrc, run the GPU tests, the benchmarks and a sanitizer smoke; one archive, under 8 minutes.

Runs from a plain source tree with the Python that starts it and installs nothing: a missing peer or tool is a printed
skip. Every part has a share of the time; what one leaves over goes to the next, and a slow one is cut off at its share,
so that it cannot eat the rest. Benchmarks write their JSON case by case, so a part that is cut off still counts.
Without a CUDA device every GPU part says "skipped: no device" and the benchmarks run once at tiny CPU sizes, so that
the script itself is proven end to end.

    python3 benchmarks/run_gpu.py [--part build,tests,first-minute,kernels,steps,sanitizer,ncu] [--minutes 8]

A short time on a card is used in pieces by --part: the parts asked for share the minutes. first-minute is the first
case of every benchmark of a kernel; ncu counts some launches of each operator, and runs only when asked for. A test
that fails is printed at once, and kept in tests.log whatever ends the run.

OUTPUT gets a log a part, bench.json (all rows, the schema of `make bench`), figures, summary.json, and all of them in
gpu.tar.gz; the table of all rows is printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Shares of the whole time, in the order of the parts; they add up to 1 (ncu: of the time it is asked for in).
SHARES = {"build": 0.12, "tests": 0.24, "first-minute": 0.10, "kernels": 0.24, "steps": 0.22, "sanitizer": 0.08}
EXTRA = {"ncu": 0.3}
STEPS = "grad_cache or step"  # pytest's -k: the benchmarks of whole steps; everything else is a kernel's
# Seconds that one comparison may take before it leaves rounds out.
COMPARISON = {"first-minute": 2, "kernels": 4, "steps": 20}


class Session:
    """Runs the parts in order inside their shares of the time and keeps what happened to each."""

    def __init__(self, output: Path, minutes: float, chosen: Sequence[str] = ()) -> None:
        """chosen: the parts that share the time; all but ncu where it is empty."""
        self.output, self.total, self.begin = output, 60 * minutes, time.monotonic()
        known = SHARES | EXTRA
        self.shares = {name: share for name, share in known.items() if name in (chosen or SHARES)}
        self.shares = {name: share / sum(self.shares.values()) for name, share in self.shares.items()}
        self.parts: list[dict[str, object]] = []
        output.mkdir(parents=True, exist_ok=True)

    def skip(self, name: str, reason: str) -> None:
        print(f"{name}: skipped: {reason}", flush=True)
        self.parts.append({"part": name, "status": "skipped", "reason": reason})

    def limit(self, name: str) -> float:
        """Seconds until the shares of the parts up to this one are used up."""
        names = list(self.shares)
        until = sum(self.shares[one] for one in names[: names.index(name) + 1]) if name in names else 1.0
        return until * self.total - (time.monotonic() - self.begin)

    def run(self, name: str, command: list[str], **environment: str) -> bool:
        """Run one part; its log goes to OUTPUT/NAME.log. A part cut off by the time limit is reported as such."""
        limit = self.limit(name)
        if limit < 1:
            self.skip(name, "no time left")
            return False
        print(f"{name} (at most {limit:.0f} s): {' '.join(command)}", flush=True)
        start, log = time.monotonic(), self.output / f"{name}.log"
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("a") as stream:  # a part may be several commands
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    env={**os.environ, "PYTHONPATH": paths, **environment},
                ).returncode
                status = "ok" if code == 0 else f"failed (exit {code})"
            except subprocess.TimeoutExpired:
                status = "cut off by the time limit"
        seconds = time.monotonic() - start
        print("\n".join(log.read_text(errors="replace").splitlines()[-40 if status != "ok" else -12 :]))
        print(f"{name}: {status} in {seconds:.0f} s", flush=True)
        self.parts.append({"part": name, "status": status, "seconds": round(seconds, 1)})
        return status == "ok"

    def bench(self, name: str, *words: str, select: str = "") -> None:
        """One part of the benchmarks, with its rows in OUTPUT/NAME.json."""
        deadline = max(self.limit(name) - 20, 1)  # a case that begins by then is given time to end
        words += ("--rime-deadline", f"{deadline:.0f}", "--rime-json", str(self.output / f"{name}.json"))
        if name in COMPARISON:
            words += ("--rime-seconds", str(COMPARISON[name]))
        self.run(name, [*pytest(), "benchmarks", *words, *(("-k", select) if select else ())])


def pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def parallel() -> list[str]:
    """The tests wait for Triton's compiler, which is single-threaded; a failure is printed when it happens."""
    words = ["-p", "benchmarks.lib.failures", "--tb=short", "--durations", "10"]
    if find_spec("xdist"):
        words += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 2)))]
    return words + (["--timeout", "120"] if find_spec("pytest_timeout") else [])


def gpu_tests() -> list[str]:
    """The test files with GPU tests: the others need packages that a GPU node may not have."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    chosen = [path for path in files if path.parent.name == "gpu" or "mark.gpu" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in chosen]


def build(session: Session, capability: tuple[int, int] | None) -> None:
    """csrc in place, for this card alone: the build is inside the time limit."""
    missing = next((tool for tool in ("cmake", "c++") if shutil.which(tool) is None), None)
    if missing:
        session.skip("build", f"{missing} not found; the pure-torch and Triton paths are tested")
        return
    if find_spec("setuptools") is None:
        session.skip("build", "setuptools not found; the pure-torch and Triton paths are tested")
        return
    environment = {"RIME_FAST_BUILD": "1"}
    if capability is not None:
        major, minor = capability
        # Hopper's own instructions need the "a" target
        environment["RIME_FAST_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    session.run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], **environment)


def count(session: Session) -> None:
    """Hardware counters of a few launches of each operator; clocks are left alone."""
    if shutil.which("ncu") is None:
        session.skip("ncu", "ncu not found")
        return
    bench = "from rime_fast.cli import main; main({words})"
    for operator, words in {
        "logprob": ["--tokens", "2048", "--hidden", "1536"],
        "contrastive": ["--pairs", "8192", "--width", "1536"],
        "reward": ["--anchors", "65536"],
    }.items():
        program = bench.format(words=["bench", operator, *words, "--dtype", "bf16"])
        ncu = ["ncu", "--clock-control", "none", "--set", "basic", "-k", "regex:_kernel", "--launch-count", "12"]
        session.run(
            "ncu", [*ncu, "--log-file", str(session.output / f"ncu-{operator}.txt"), sys.executable, "-c", program]
        )


def collect(session: Session) -> None:
    """OUTPUT/bench.json of all parts' rows, and its figures."""
    from benchmarks.lib.stored import merge

    paths = [session.output / f"{part['part']}.json" for part in session.parts]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        return
    merged = session.output / "bench.json"
    merge(paths, merged)
    print(f"rows: {merged}")
    try:
        from benchmarks.lib.plots import plot_file

        for path in plot_file(merged, session.output):
            print(f"figure: {path}")
    except ImportError as error:
        session.skip("figures", str(error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="where logs and JSON go")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the whole run")
    parser.add_argument("--part", default=",".join(SHARES), help=f"which parts: of {', '.join(SHARES | EXTRA)}")
    arguments = parser.parse_args()
    chosen = [name for name in SHARES | EXTRA if name in arguments.part.split(",")]
    if unknown := set(arguments.part.split(",")) - set(chosen):
        parser.error(f"--part: no part is called {', '.join(sorted(unknown))}")
    if find_spec("torch") is None or find_spec("transformers") is None:
        print("torch and transformers are needed; nothing is installed by this script")
        return 2
    session = Session(arguments.output.resolve(), arguments.minutes, chosen)

    import torch

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "none"
    print(f"device: {name}; torch {torch.__version__}; CUDA {torch.version.cuda}", flush=True)
    for old in (*session.output.glob("*.json"), *session.output.glob("*.log")):
        old.unlink()  # of an earlier run: they would be merged
    if "build" in chosen:
        build(session, torch.cuda.get_device_capability() if cuda else None)
    reason = "pytest not found" if find_spec("pytest") is None else "" if cuda else "no device"
    for part in chosen:
        if part != "build":
            session.skip(part, reason) if reason else on_card(session, part)
    if reason == "no device":
        session.bench("cpu_tiny", "--rime-tiny")
    collect(session)
    summary = session.output / "summary.json"
    summary.write_text(json.dumps({"device": name, "parts": session.parts}, indent=1) + "\n")
    archive = session.output / "gpu.tar.gz"
    with tarfile.open(archive, "w:gz") as whole:
        for path in sorted(session.output.iterdir()):
            if path != archive:
                whole.add(path, path.name)
    print(f"summary: {summary}; all of it: {archive}; {time.monotonic() - session.begin:.0f} s in all")
    show(session)
    return 0 if all(part["status"] in ("ok", "skipped") for part in session.parts) else 1


def on_card(session: Session, part: str) -> None:
    """Run one part on the device."""
    if part in ("tests", "sanitizer"):
        command = [*pytest(), *gpu_tests(), "-m", "gpu and not slow"]
        if part == "tests":
            # inductor's compile workers would keep pytest from ending for minutes
            session.run(part, [*command, *parallel()], TORCHINDUCTOR_COMPILE_THREADS="1")
        elif shutil.which("compute-sanitizer"):
            session.run(part, ["compute-sanitizer", "--error-exitcode", "1", *command, "-k", "test_smoke"])
        else:
            session.skip(part, "compute-sanitizer not found")
    elif part == "ncu":
        count(session)
    else:
        first = ("--rime-first", "1") if part == "first-minute" else ()
        session.bench(part, "--rime-device", "cuda", *first, select=STEPS if part == "steps" else f"not ({STEPS})")


def show(session: Session) -> None:
    """Print the table of all rows, last: what a terminal keeps is its end."""
    from benchmarks.lib.stored import load
    from rime_fast.bench.table import print_rows

    merged = session.output / "bench.json"
    if merged.is_file():
        stored = load(merged)
        print_rows(stored.rows, stored.skipped)


if __name__ == "__main__":
    sys.exit(main())
