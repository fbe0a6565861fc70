"""Loads the compiled kernels (rime_fast/_C.so), if this installation has them.

The library registers its operators under ``torch.ops.rime_fast_C`` on loading. Nothing here raises: a missing or
broken library is a slower installation, not a broken one, and ``rime-fast doctor`` prints the reason.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

CPU_LEVELS = ("default", "avx2", "avx512")  # of csrc/cpu/simd.h
LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"


@lru_cache(maxsize=1)
def _load() -> str | None:
    """Load once; the reason it failed, or None when it is loaded."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built (pip install --no-build-isolation . with cmake and a C++ compiler)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} could not be loaded: {error}"
    return None


# A constant to torch.compile, which cannot trace what touches the disk.
@torch.compiler.assume_constant_result
def available(cuda: bool = False) -> bool:
    """Whether the compiled kernels for the CPU (or, with ``cuda``, for CUDA) can be called."""
    return _load() is None and (not cuda or bool(torch.ops.rime_fast_C.build_info() & 2))


@torch.compiler.assume_constant_result
def why_not(cuda: bool = False) -> str | None:
    """The reason the compiled kernels cannot be called, or None."""
    reason = _load()
    if reason is None and cuda and not available(cuda=True):
        reason = "this build holds no CUDA kernels (nvcc and a CUDA torch are needed when it is built)"
    return reason


def cpu_level() -> str:
    """The instruction set that the compiled CPU kernels use: default (the compiler's), avx2 or avx512.

    The widest of the processor, or what the environment's ``RIME_FAST_CPU`` allows; it is read once. RuntimeError where
    that is another word. Call it where ``available()``.
    """
    return CPU_LEVELS[torch.ops.rime_fast_C.cpu_level()]
