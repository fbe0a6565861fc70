"""Builds csrc through CMake when it can; otherwise installs the pure-torch package and says so.

What is built: C++ row kernels for the CPU whenever cmake, a C++ compiler and torch are importable in the build
environment (`pip install --no-build-isolation .`), and the CUDA kernels as well when nvcc and a CUDA torch are there.

Environment: RIME_FAST_BUILD=0 skips the build, =1 makes a failed build an error (default: warn and go on);
RIME_FAST_CUDA_ARCHS="80;90a;100" overrides the CUDA targets; RIME_FAST_CUDA=0 builds for the CPU only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _tool(name: str) -> str | None:
    """On PATH, or beside this Python (pip-installed cmake and ninja of a venv that is not activated)."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


class CMakeBuild(build_ext):
    """One CMake project, one shared library next to the package: rime_fast/_C.so (no Python ABI in it)."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("RIME_FAST_BUILD", "auto")
        if mode == "0":
            return
        try:
            self._cmake(ext)
        except Exception as error:
            if mode == "1":
                raise
            print(f"rime-fast: compiled kernels not built ({error}); pure torch will be used", file=sys.stderr)

    def _cmake(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError as error:
            raise RuntimeError("torch is not importable here; use `pip install --no-build-isolation .`") from error
        cmake = _tool("cmake")
        if cmake is None:
            raise RuntimeError("cmake not found")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
            f"-DTORCH_DIR={Path(torch.__file__).parent}",
            f"-DRIME_OUTPUT_DIR={output.parent}",
            f"-DRIME_CUDA={'OFF' if os.environ.get('RIME_FAST_CUDA') == '0' or torch.version.cuda is None else 'ON'}",
        ]
        if archs := os.environ.get("RIME_FAST_CUDA_ARCHS"):
            configure.append(f"-DRIME_CUDA_ARCHS={archs}")
        if ninja := _tool("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)


setup(ext_modules=[Extension("rime_fast._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
