"""``rime-fast doctor``: what is active in this installation, what is missing, and what that costs.

Nothing here fails: a missing part is a line of the answer. ``examine`` gathers, ``show`` prints; the operators' lines
come from the same tables that choose at run time (ops/dispatch.py).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from rime_fast import __version__

VARIABLES = (
    "RIME_FAST_BACKEND",
    "RIME_FAST_CPU",
    "RIME_FAST_BUILD",
    "RIME_FAST_CUDA_ARCHS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True)
class Part:
    """One part of the installation. state: "ok" (in use), "missing" (its lack costs something here), "off" (no use on
    this machine)."""

    name: str
    state: str
    found: str
    cost: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Choice:
    """The backend an operator takes on a device, and why not the others ({backend: reason})."""

    operator: str
    device: str
    backend: str
    passed_over: dict[str, str]


@dataclass(frozen=True)
class Findings:
    """All that ``doctor`` knows."""

    version: str
    python: str
    machine: str
    parts: list[Part]
    operators: list[Choice]
    environment: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data, for ``--json``."""
        return asdict(self)


def examine() -> Findings:
    """Look at this installation. Imports torch where it is there; never raises for a missing part."""
    parts = [*_torch_parts()]
    cuda = _cuda_available()
    parts += [*_compiled_parts(cuda), *_library_parts(cuda), *_build_parts(cuda)]
    return Findings(
        version=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        parts=parts,
        operators=[*_operator_choices(cuda)],
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _torch_parts() -> Iterator[Part]:
    torch = _try_import("torch")
    if isinstance(torch, str):
        yield Part("torch", "missing", torch, "nothing runs without it", "pip install torch")
        return
    yield Part("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} CPU threads")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        major, minor = torch.cuda.get_device_capability()
        yield Part("CUDA", "ok", f"{torch.version.cuda}, {', '.join(names)} (sm_{major}{minor})")
    elif torch.version.cuda is None:
        yield Part("CUDA", "missing", "this torch is built for the CPU", "everything runs on the CPU", "a CUDA torch")
    else:
        cost = "everything runs on the CPU"
        yield Part(
            "CUDA", "missing", f"torch has CUDA {torch.version.cuda} but sees no GPU", cost, "driver, nvidia-smi"
        )


def _cuda_available() -> bool:
    torch = _try_import("torch")
    return not isinstance(torch, str) and torch.cuda.is_available()


def _compiled_parts(cuda: bool) -> Iterator[Part]:
    native = _try_import("rime_fast.ops.native")
    reason = native if isinstance(native, str) else native.why_not()
    build = "pip install --no-build-isolation . with cmake and a C++ compiler"
    if reason is None:
        try:
            yield Part("compiled CPU kernels", "ok", f"{native.cpu_level()}, {native.LIBRARY}")
        except RuntimeError as error:
            cost, words = "they raise this error", ", ".join(native.CPU_LEVELS)
            yield Part("compiled CPU kernels", "missing", str(error).split("\n")[0], cost, f"one of {words}, or none")
    else:
        yield Part("compiled CPU kernels", "missing", reason, "on the CPU the operators run as plain torch", build)
    reason = native if isinstance(native, str) else native.why_not(cuda=True)
    if reason is None:
        yield Part("compiled CUDA kernels", "ok" if cuda else "off", "built" if cuda else "built, but no GPU is seen")
    else:
        cost = "on CUDA the operators run as Triton or torch, as listed below"
        state = "missing" if cuda else "off"
        yield Part("compiled CUDA kernels", state, reason, cost if cuda else "", f"{build}, and nvcc" if cuda else "")


def _library_parts(cuda: bool) -> Iterator[Part]:
    def part(name: str, module: str, *, used: bool, cost: str, extra: str, check: bool = False) -> Part:
        found = _version(name, module)
        broken = _try_import(module) if check and found is not None else None
        if isinstance(broken, str):
            return Part(name, "missing" if used else "off", f"{found}, but {broken}", cost if used else "", extra)
        if found is None:
            return Part(
                name, "missing" if used else "off", "not installed", cost if used else "", extra if used else ""
            )
        return Part(name, "ok" if used else "off", found if used else f"{found}, used on CUDA only")

    yield part(
        "triton", "triton", used=cuda, cost="on CUDA no Triton kernels: torch instead", extra="pip install triton"
    )
    sdpa = "attention 'auto' takes torch's own varlen flash kernel (FlashAttention-2)"
    gpu = "pip install 'rime-fast[gpu]'"
    yield part("flash-attn", "flash_attn", used=cuda, cost=sdpa, extra=gpu, check=cuda)
    liger = "no fused RMSNorm, RoPE and SwiGLU (use_liger_kernel)"
    yield part("liger-kernel", "liger_kernel", used=cuda, cost=liger, extra=gpu)
    for name, module, cost, extra in (
        ("transformers", "transformers", "no models, no trainers", "pip install transformers"),
        ("accelerate", "accelerate", "no trainers", "pip install accelerate"),
        ("datasets", "datasets", "no training on datasets.Dataset", "pip install datasets"),
        ("peft", "peft", "no LoRA (--lora_rank)", "pip install 'rime-fast[peft]'"),
        ("deepspeed", "deepspeed", "no ZeRO (--deepspeed)", "pip install 'rime-fast[deepspeed]'"),
        ("scikit-learn", "sklearn", "no demo (its digit scans)", "pip install 'rime-fast[demo]'"),
        ("matplotlib", "matplotlib", "no figures in reports", "pip install matplotlib"),
    ):
        yield part(name, module, used=True, cost=cost, extra=extra)


def _build_parts(cuda: bool) -> Iterator[Part]:
    cmake, compiler = shutil.which("cmake"), next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    nvcc = shutil.which("nvcc")
    found = ", ".join(path or f"no {name}" for name, path in (("cmake", cmake), ("C++ compiler", compiler)))
    found += f", {nvcc or 'no nvcc'}"
    lacking = not (cmake and compiler) or (cuda and not nvcc)
    cost = "kernels can not be rebuilt here" if lacking else ""
    yield Part("build tools", "off" if lacking else "ok", found, cost)


def _operator_choices(cuda: bool) -> Iterator[Choice]:
    torch = _try_import("torch")
    if isinstance(torch, str):
        return
    from rime_fast.ops.dispatch import TABLES, explain

    for operator in TABLES:
        for device in ("cpu", "cuda") if cuda else ("cpu",):
            try:
                found = explain(operator, device, torch.float32 if device == "cpu" else torch.bfloat16)
            except (ImportError, ValueError) as error:
                yield Choice(operator, device, "none", {"all": str(error)})
                continue
            yield Choice(operator, device, found.backend, dict(found.others))


def _try_import(name: str) -> Any:
    """The module, or one line saying why it cannot be imported."""
    try:
        return import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'import failed'}"


def _version(distribution: str, module: str) -> str | None:
    try:
        if find_spec(module) is None:
            return None
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "version unknown"
    except (ImportError, ValueError):
        return None


def show(findings: Findings) -> None:
    """Print the findings for a reader."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    head = f"[bold]rime-fast {findings.version}[/]   Python {findings.python}   {findings.machine}"
    console.print(head, highlight=False, soft_wrap=True)
    marks = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "off": "[dim]not used[/]"}
    table = Table("", "", "", box=None, pad_edge=False, show_header=False)
    table.columns[2].overflow = "fold"
    for part in findings.parts:
        text = escape(part.found)
        if part.cost:
            text += f"\n[yellow]costs:[/] {escape(part.cost)}"
        if part.remedy:
            text += f"\n[dim]remedy: {escape(part.remedy)}[/]"
        table.add_row(part.name, marks[part.state], text)
    console.print(table)
    table = Table("operator", "device", "backend", "why not the others", box=None, pad_edge=False, header_style="bold")
    for choice in findings.operators:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in choice.passed_over.items())
        table.add_row(choice.operator, choice.device, f"[bold]{choice.backend}[/]", escape(reasons))
    console.print()
    console.print(table)
    for name, value in findings.environment.items():
        console.print(f"{name}={value}", markup=False, highlight=False, soft_wrap=True)
