"""Builds csrc through CMake when it can; otherwise installs the pure-torch package and says so.

What is built: C++ row kernels for the CPU whenever cmake, a C++ compiler and torch are importable in the build
environment (`pip install --no-build-isolation .`), and the CUDA kernels as well when nvcc and a CUDA torch are there.
The library holds no Python symbols and of torch only the stable ABI's, so a wheel with it is py3-none-PLATFORM, one for
every Python and torch of the range; a wheel without it is py3-none-any.

Environment: RIME_FAST_BUILD=0 skips the build, =1 makes a failed build an error (default: warn and go on);
RIME_FAST_CUDA_ARCHS="80;90a;100" overrides the CUDA targets; RIME_FAST_CUDA=0 builds for the CPU only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, __version__, setup

if int(__version__.split(".")[0]) < 77:  # without build isolation pip does not look at pyproject.toml's
    raise SystemExit(f"rime-fast: setuptools is {__version__}; expected 77 or later: pip install -U setuptools")
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _tool(name: str) -> str | None:
    """Beside this Python (what pip installed, also where the venv is not activated), or on PATH: a system's own cmake
    may be older than its nvcc."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _has_cuda() -> bool:
    """Whether the CUDA kernels are to be tried."""
    try:
        import torch
    except ImportError:
        return False  # _cmake says so
    return torch.version.cuda is not None and os.environ.get("RIME_FAST_CUDA") != "0"


class CMakeBuild(build_ext):
    """One CMake project, one shared library next to the package: rime_fast/_C.so (no Python ABI in it)."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("RIME_FAST_BUILD", "auto")
        if mode == "0":
            return
        for cuda in (True, False) if _has_cuda() else (False,):
            try:
                self._cmake(ext, cuda)
                return
            except Exception as error:
                if mode == "1":
                    raise
                rest = "once more for the CPU alone" if cuda else "pure torch will be used"
                print(f"rime-fast: compiled kernels not built ({error}); {rest}", file=sys.stderr)

    def _cmake(self, ext: Extension, cuda: bool) -> None:
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
            "-DCMAKE_SKIP_RPATH=ON",  # torch is imported first; no path of the building machine in a wheel
            f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
            f"-DTORCH_DIR={Path(torch.__file__).parent}",
            f"-DRIME_OUTPUT_DIR={output.parent}",
            f"-DRIME_CUDA={'ON' if cuda else 'OFF'}",
        ]
        if archs := os.environ.get("RIME_FAST_CUDA_ARCHS"):
            configure.append(f"-DRIME_CUDA_ARCHS={archs}")
        if ninja := _tool("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)


class BuildPy(build_py):
    """The settings of examples/ travel inside the package, where rime_fast.data.examples finds them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree(str(ROOT / "examples"), str(Path(self.build_lib, "rime_fast", "examples")))


class Wheel(bdist_wheel):
    """Tagged by what is in it, which is known only after the build."""

    def run(self) -> None:
        self.run_command("build")
        built = Path(self.get_finalized_command("build").build_lib)
        self.root_is_pure = not (built / "rime_fast" / "_C.so").is_file()
        if self.root_is_pure:
            self.distribution.ext_modules = []  # or everything would go into the platform's part of the wheel
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


setup(
    ext_modules=[Extension("rime_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy, "bdist_wheel": Wheel},
)
