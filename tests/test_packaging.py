"""The package installs and runs with neither a compiler nor CUDA: pure torch, and it says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("rime_fast", "csrc", "setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")


def _tree(destination: Path) -> Path:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, destination / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            destination.mkdir(exist_ok=True)
            shutil.copy(source, destination / name)
    return destination


def _wheel(tree: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command = [*pip, "-w", str(out), str(tree)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def test_wheel_without_any_tool_is_pure_torch_and_works(tmp_path):
    """PATH holds no compiler: the wheel builds, installs and computes, with the reason told."""
    tree = _tree(tmp_path / "tree")
    done = _wheel(tree, tmp_path / "out", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import torch, rime_fast, pathlib\n"
        f"assert pathlib.Path(rime_fast.__file__).is_relative_to({str(site)!r})\n"
        "from rime_fast.ops import native\n"
        "assert not native.available() and 'not built' in native.why_not()\n"
        "h, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)\n"
        "targets, pools = torch.tensor([1, -100, 3, 2, -100]), {'gen': torch.tensor([4])}\n"
        "out = rime_fast.fused_logprob_pool(h, w, targets, pools=pools)\n"
        "(out.logp.sum() + out.embeddings['gen'].sum()).backward()\n"
        "q = torch.randn(4, 8)\n"
        "print(rime_fast.contrastive_loss({'d': q}, {'d': q}, terms=[('d', 'd', 1.0)]).loss.item())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr


def test_forced_build_without_a_compiler_is_an_error(tmp_path):
    done = _wheel(_tree(tmp_path / "tree"), tmp_path / "out", PATH=str(tmp_path), RIME_FAST_BUILD="1")
    assert done.returncode != 0
    assert "cmake" in done.stderr + done.stdout


@pytest.mark.slow
def test_isolated_install_says_how_to_get_the_kernels(tmp_path):
    """`pip install .` with build isolation has no torch in its build environment: still succeeds."""
    tree = _tree(tmp_path / "tree")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", str(tmp_path / "out"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "--no-build-isolation" in done.stdout + done.stderr
