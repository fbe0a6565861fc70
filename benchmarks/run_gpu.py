"""`make gpu`: build csrc, run the GPU tests, the benchmarks and a sanitizer smoke; one JSON per part, under 8 minutes.

Runs from a plain source tree with the Python that starts it and installs nothing: a missing peer or tool is a printed
skip. Without a CUDA device every GPU part says "skipped: no device" and the benchmarks run once at tiny CPU sizes, so
that the script itself is proven end to end.

    python3 benchmarks/run_gpu.py [--output DIR] [--minutes 8]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZER_TESTS = ["tests/ops", "-m", "gpu and not slow", "-k", "smoke"]


class Session:
    """Runs the parts in order inside one time limit and keeps what happened to each."""

    def __init__(self, output: Path, minutes: float) -> None:
        self.output, self.deadline = output, time.monotonic() + 60 * minutes
        self.parts: list[dict[str, object]] = []
        output.mkdir(parents=True, exist_ok=True)

    def skip(self, name: str, reason: str) -> None:
        print(f"{name}: skipped: {reason}", flush=True)
        self.parts.append({"part": name, "status": "skipped", "reason": reason})

    def run(self, name: str, command: list[str], **environment: str) -> bool:
        """Run one part; its log goes to OUTPUT/NAME.log. A part cut off by the time limit is reported as such."""
        left = self.deadline - time.monotonic()
        if left < 5:
            self.skip(name, "no time left")
            return False
        print(f"{name}: {' '.join(command)}", flush=True)
        start, log = time.monotonic(), self.output / f"{name}.log"
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("w") as stream:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, timeout=left,
                    env={**os.environ, "PYTHONPATH": paths, **environment},
                ).returncode  # fmt: skip
                status = "ok" if code == 0 else f"failed (exit {code})"
            except subprocess.TimeoutExpired:
                status = "cut off by the time limit"
        seconds = time.monotonic() - start
        print("\n".join(log.read_text(errors="replace").splitlines()[-12:]))
        print(f"{name}: {status} in {seconds:.0f} s", flush=True)
        self.parts.append({"part": name, "status": status, "seconds": round(seconds, 1)})
        return status == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="where logs and JSON go")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the whole run")
    arguments = parser.parse_args()
    session = Session(arguments.output.resolve(), arguments.minutes)

    import torch

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "none"
    print(f"device: {name}; torch {torch.__version__}; CUDA {torch.version.cuda}", flush=True)
    python = sys.executable
    build_environment = {"RIME_FAST_BUILD": "1"}
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        # One target only: the build is inside the time limit. Hopper's own instructions need the "a" target.
        build_environment["RIME_FAST_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    if shutil.which("cmake") is None:
        session.skip("build", "cmake not found; the pure-torch and Triton paths are tested")
    else:
        session.run("build", [python, "setup.py", "build_ext", "--inplace"], **build_environment)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if cuda:
        session.run("tests", [*pytest, "tests", "-m", "gpu"])
        json_file = str(session.output / "bench.json")
        session.run("bench", [*pytest, "benchmarks", "--rime-device", "cuda", "--rime-json", json_file])
        if shutil.which("compute-sanitizer"):
            checked = ["compute-sanitizer", "--error-exitcode", "1", *pytest, *SANITIZER_TESTS]
            session.run("sanitizer", checked)
        else:
            session.skip("sanitizer", "compute-sanitizer not found")
    else:
        for part in ("tests", "bench", "sanitizer"):
            session.skip(part, "no device")
        tiny = str(session.output / "bench_cpu_tiny.json")
        session.run("bench_cpu_tiny", [*pytest, "benchmarks", "--rime-tiny", "--rime-json", tiny])
    summary = session.output / "summary.json"
    summary.write_text(json.dumps({"device": name, "parts": session.parts}, indent=1) + "\n")
    print(f"summary: {summary}")
    return 0 if all(part["status"] in ("ok", "skipped") for part in session.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
