"""`make gpu`: build csrc, run the GPU tests, the benchmarks and a sanitizer smoke; one merged JSON, under 8 minutes.

Runs from a plain source tree with the Python that starts it and installs nothing: a missing peer or tool is a printed
skip. Every part has a share of the time; what one leaves over goes to the next, and a slow one is cut off at its share,
so that it cannot eat the rest. Benchmarks write their JSON case by case, so a part that is cut off still counts.
Without a CUDA device every GPU part says "skipped: no device" and the benchmarks run once at tiny CPU sizes, so that
the script itself is proven end to end.

    python3 benchmarks/run_gpu.py [--output DIR] [--minutes 8]

OUTPUT gets a log a part, bench.json (all rows, the schema of `make bench`), figures and summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Shares of the whole time, in the order of the parts; they add up to 1.
SHARES = {"build": 0.20, "tests": 0.25, "kernels": 0.25, "steps": 0.22, "sanitizer": 0.08}
STEPS = "grad_cache or step"  # pytest's -k: the benchmarks of whole steps; everything else is a kernel's
COMPARISON = {"kernels": 6, "steps": 20}  # seconds one comparison may take before it leaves rounds out


class Session:
    """Runs the parts in order inside their shares of the time and keeps what happened to each."""

    def __init__(self, output: Path, minutes: float) -> None:
        self.output, self.total, self.begin = output, 60 * minutes, time.monotonic()
        self.parts: list[dict[str, object]] = []
        output.mkdir(parents=True, exist_ok=True)

    def skip(self, name: str, reason: str) -> None:
        print(f"{name}: skipped: {reason}", flush=True)
        self.parts.append({"part": name, "status": "skipped", "reason": reason})

    def limit(self, name: str) -> float:
        """Seconds until the shares of the parts up to this one are used up."""
        names = list(SHARES)
        until = sum(SHARES[one] for one in names[: names.index(name) + 1]) if name in SHARES else 1.0
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
        with log.open("w") as stream:
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
        print("\n".join(log.read_text(errors="replace").splitlines()[-12:]))
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
    arguments = parser.parse_args()
    if find_spec("torch") is None or find_spec("transformers") is None:
        print("torch and transformers are needed; nothing is installed by this script")
        return 2
    session = Session(arguments.output.resolve(), arguments.minutes)

    import torch

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "none"
    print(f"device: {name}; torch {torch.__version__}; CUDA {torch.version.cuda}", flush=True)
    for old in session.output.glob("*.json"):
        old.unlink()  # of an earlier run: they would be merged
    build(session, torch.cuda.get_device_capability() if cuda else None)
    if find_spec("pytest") is None:
        for part in ("tests", "kernels", "steps", "sanitizer"):
            session.skip(part, "pytest not found")
    elif cuda:
        files = gpu_tests()
        session.run("tests", [*pytest(), *files, "-m", "gpu and not slow"])
        session.bench("kernels", "--rime-device", "cuda", select=f"not ({STEPS})")
        session.bench("steps", "--rime-device", "cuda", select=STEPS)
        if shutil.which("compute-sanitizer"):
            checked = ["compute-sanitizer", "--error-exitcode", "1", *pytest(), *files, "-m", "gpu", "-k", "test_smoke"]
            session.run("sanitizer", checked)
        else:
            session.skip("sanitizer", "compute-sanitizer not found")
    else:
        for part in ("tests", "kernels", "steps", "sanitizer"):
            session.skip(part, "no device")
        session.bench("cpu_tiny", "--rime-tiny")
    collect(session)
    summary = session.output / "summary.json"
    summary.write_text(json.dumps({"device": name, "parts": session.parts}, indent=1) + "\n")
    print(f"summary: {summary}; {time.monotonic() - session.begin:.0f} s in all")
    return 0 if all(part["status"] in ("ok", "skipped") for part in session.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
