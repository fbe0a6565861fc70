"""Where the tests of this folder run: on a GPU, and the small ones on the CPU too, so that their code is exercised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BOTH = ["cpu", pytest.param("cuda", marks=on_gpu)]
CUDA = [pytest.param("cuda", marks=on_gpu)]


def moved(value: Any, device: str) -> Any:
    """``value`` with every tensor inside dicts and dataclasses on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    if is_dataclass(value):
        for field in fields(value):
            setattr(value, field.name, moved(getattr(value, field.name), device))
    return value


def backends(table: Any, device: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends of an operator that run there. The Triton interpreter has tests of its own."""
    probe = torch.zeros(1, device=device, dtype=dtype)
    names = ("reference", "chunked", "cuda", *(("triton",) if device == "cuda" else ()))
    return [name for name in names if table.why_not(name, probe) is None]


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """Any wait of the host for the GPU raises inside."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
