"""Which backend of the contrastive loss runs, and the sweep it brings.

Every backend gives an object with ``statistics(into)`` and ``gradients(slopes, dq, dk)`` (chunked.Sweep is the one to
read); losses, merges over ranks and gradient coefficients are common to all (local.py, distributed.py, softmax.py).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rime_fast.ops.contrastive import chunked, triton_sweep
from rime_fast.ops.contrastive.inputs import accumulation_dtype
from rime_fast.ops.contrastive.rows import Masks, Slopes, Statistics
from rime_fast.ops.dispatch import BackendTable


def _any(_: Tensor) -> str | None:
    return None


TABLE = BackendTable(
    op="contrastive",
    probes={"reference": _any, "chunked": _any, "triton": triton_sweep.why_not},
    order={"cpu": ("chunked",), "cuda": ("triton", "chunked")},
)


class AnySweep(Protocol):
    """One pass over all tiles of all terms."""

    queries: list[Tensor]
    keys: list[Tensor]

    @property
    def bounded(self) -> bool:
        """The statistics' shifts are 0, and known to be."""
        ...

    def statistics(self, into: list[Statistics]) -> None: ...

    def gradients(self, slopes: list[Slopes], dq: list[Tensor | None], dk: list[Tensor | None]) -> None: ...


def operands(backend: str, tensors: list[Tensor]) -> list[Tensor]:
    """The rows as the backend multiplies them: in their own dtype on a GPU, in fp32 or fp64 by a CPU's library GEMM."""
    if backend == "triton":
        return [tensor.detach() for tensor in tensors]
    if tensors[0].is_cuda:
        return [tensor.detach().contiguous() for tensor in tensors]
    return [tensor.detach().to(accumulation_dtype(tensor.dtype)).contiguous() for tensor in tensors]


def knows_bound(backend: str, tensor: Tensor) -> bool:
    """True where the sweep's statistics are kept without shifts when no logit leaves the bound (rows.Statistics)."""
    return backend == "chunked" and tensor.device.type == "cpu"


def make_sweep(
    backend: str,
    queries: list[Tensor],
    keys: list[Tensor],
    terms: list[tuple[int, int]],
    scale: Tensor,
    masks: list[Masks],
    bounded: bool | None,
) -> AnySweep:
    """``queries`` and ``keys`` come from ``operands``. bounded: see chunked.is_bounded; None: look on the device."""
    if bounded is None:
        flag = triton_sweep.bounded_flag(queries, keys, scale)
    else:
        flag = torch.full((), int(bounded), dtype=torch.int32, device=scale.device)
    if backend == "triton":
        return triton_sweep.TritonSweep(queries, keys, terms, scale, masks, flag)
    shiftless = bool(bounded) and knows_bound(backend, queries[0])
    return chunked.Sweep(queries, keys, terms, masks, shiftless, chunked.row_kernels(queries[0], scale, flag))
