"""Builds and runs CUDA kernels on the CPU (cuda_on_host.h), with the sanitizers that the compiler has."""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which("g++")
FLAGS = ("-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-clobbered", "-fno-sanitize-recover=all")


@lru_cache
def sanitizers() -> str:
    """address,undefined, as far as this compiler links them."""
    found = []
    for name in ("address", "undefined"):
        command = [str(CXX), "-x", "c++", "-", f"-fsanitize={name}", "-o", "/dev/null"]
        if subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode == 0:
            found.append(name)
    return ",".join(found)


def build(source: Path, out: Path, *flags: str, sanitize: str | None = None) -> None:
    """Compile ``source``; sanitize: which sanitizers, every one there is by default."""
    checks = sanitizers() if sanitize is None else sanitize
    more = [f"-fsanitize={checks}", *(["-fsanitize-sections=cuda_shared"] if "address" in checks else [])]
    command = [str(CXX), *FLAGS, f"-I{ROOT / 'csrc'}", *(more if checks else []), *flags, str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_on_host(source: Path, folder: Path, cases: str) -> None:
    """Build ``source`` as a program and run its "quick" or "full" cases, with threads in one or three orders."""
    binary = folder / source.stem
    build(source, binary)
    for seed in (1,) if cases == "quick" else (1, 2, 3):
        done = subprocess.run([str(binary), str(seed), cases], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith("ok")
