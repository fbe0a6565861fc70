"""Forward and backward of the contrastive loss against its bare GEMMs and the usual ways to write it.

The floor is four products a term (the similarities twice, dq, dk: 8 N^2 D FLOP) into ready buffers. "eager" is
symmetric cross-entropy over the whole matrix; benchmarks/lib/peers.py adds the forms of other packages. Errors:
relative, of dq against fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.bench.harness import FLOOR, Results, Row, compare, dtype_name, fast_fp64, library_product, require_memory
from rime_fast.ops.contrastive import contrastive_loss

TAU = 0.02
TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]
EXACT, EXACT_FAST = 4 << 24, 1 << 28  # similarities up to which fp64 is run for the errors; GPUs with fast fp64


@dataclass(frozen=True)
class Shape:
    """One batch of pairs with both embeddings of both sides."""

    pairs: int = field(default=16_384, metadata={"help": "Pairs N: the similarities are N x N."})
    width: int = field(default=1536, metadata={"help": "Width of the embeddings."})
    terms: int = field(default=1, metadata={"help": "1: disc-disc; 4: with gen-gen and both of Cross-Mode Alignment."})
    peaked: bool = field(default=False, metadata={"help": "Positives at a cosine of about 0.9, as after training."})

    def __post_init__(self) -> None:
        if min(self.pairs, self.width) < 1 or not 1 <= self.terms <= 4:
            raise ValueError("expected --pairs, --width >= 1 and --terms 1 to 4")

    def __str__(self) -> str:
        return f"{self.pairs}x{self.width}x{self.terms}-{'peaked' if self.peaked else 'random'}"


Sides = tuple[dict[str, Tensor], dict[str, Tensor]]
Terms = list[tuple[str, str, float]]
Peer = Callable[[Sides, Terms], None]  # adds its loss's gradients to the leaves of the sides


def make(shape: Shape, device: str, dtype: torch.dtype) -> Sides:
    """Unit-norm leaves of queries and keys."""
    random = torch.Generator(device).manual_seed(0)
    size = shape.pairs, shape.width

    def unit() -> Tensor:
        return F.normalize(torch.randn(size, generator=random, device=device), dim=-1)

    rows = {name: unit() for name in ("qd", "qg", "kd", "kg")}
    if shape.peaked:
        rows["qd"] = F.normalize(rows["kd"] + 0.5 * rows["qd"], dim=-1)
        rows["qg"] = F.normalize(rows["kg"] + 0.5 * rows["qg"], dim=-1)
    leaf = {name: value.to(dtype).requires_grad_() for name, value in rows.items()}
    return {"disc": leaf["qd"], "gen": leaf["qg"]}, {"disc": leaf["kd"], "gen": leaf["kg"]}


def _step(sides: Sides, backward: Callable[[], None]) -> Callable[[], Tensor]:
    """Clears the gradients, runs ``backward`` and returns the gradient of the discriminative queries."""

    def call() -> Tensor:
        for side in sides:
            for rows in side.values():
                rows.grad = None
        backward()
        grad = sides[0]["disc"].grad
        assert grad is not None
        return grad

    return call


def require_matrices(sides: Sides, count: int) -> None:
    """Raise RuntimeError where ``count`` matrices of similarities do not fit, with their gradients, in the dtype and in
    fp32."""
    rows = sides[0]["disc"]
    require_memory(count * rows.shape[0] ** 2 * (2 * rows.element_size() + 8), rows.device)


def own_rows(sides: Sides) -> Tensor:
    """Each query's positive is the key of its own row."""
    return torch.arange(sides[0]["disc"].shape[0], device=sides[0]["disc"].device)


def floor(sides: Sides, terms: Terms) -> Callable[[], None]:
    """Make the floor of the comparison: the bare matrix products that every form of the loss needs."""
    q, k = sides[0]["disc"].detach(), sides[1]["disc"].detach()
    slopes = torch.randn(q.shape[0], k.shape[0], device=q.device, dtype=q.dtype) / q.shape[0]
    logits, dq, dk = torch.empty_like(slopes), torch.empty_like(q), torch.empty_like(k)

    def call() -> None:
        for _ in terms:
            library_product(q, k.T, logits)
            library_product(q, k.T, logits)
            library_product(slopes, k, dq)
            library_product(slopes.T, q, dk)

    return call


def ours(sides: Sides, terms: Terms, **options: Any) -> Callable[[], Tensor]:
    """Make a step of our loss with ``options`` of contrastive_loss."""
    return _step(sides, lambda: contrastive_loss(*sides, terms=terms, temperature=TAU, **options).loss.backward())


def eager(sides: Sides, terms: Terms) -> None:
    require_matrices(sides, len(terms))
    own, total = own_rows(sides), torch.zeros((), device=sides[0]["disc"].device)
    for q, k, weight in terms:
        logits = (sides[0][q] @ sides[1][k].T).float() / TAU
        total = total + weight * 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    total.backward()


# --- the measurement -------------------------------------------------------------------------------------------------


def truth(sides: Sides, terms: Terms, **options: Any) -> Tensor:
    """The gradient of the discriminative queries by the reference in fp64, against which errors are measured."""
    exact = [{m: v.detach().double().requires_grad_() for m, v in side.items()} for side in sides]
    return ours((exact[0], exact[1]), terms, backend="reference", **options)()


def measure(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 5,
    peers: Mapping[str, Peer] | None = None,
) -> dict[str, Row]:
    """Rows of the floor, ours, the eager form and every one of ``peers`` that runs here."""
    sides, terms = make(shape, device, dtype), TERMS[: shape.terms]
    ids = own_rows(sides)
    impls: dict[str, Callable[[], Any]] = {
        FLOOR: floor(sides, terms),
        "ours": ours(sides, terms),
        "ours_masked": ours(sides, terms, query_ids=ids, key_ids=ids, margin=2.0),  # masks that mask nothing
    }
    for name, peer in {"eager": eager, **(peers or {})}.items():
        impls[name] = _step(sides, partial(peer, sides, terms))
    limit = EXACT_FAST if fast_fp64(device) else EXACT
    return compare(
        "contrastive",
        str(shape),
        impls,
        device=device,
        rounds=rounds,
        results=results,
        shape={"pairs": shape.pairs, "width": shape.width, "terms": shape.terms, "dtype": dtype_name(dtype)},
        truth=truth(sides, terms) if shape.pairs**2 * shape.terms <= limit else None,
        flops=6.0 * shape.pairs**2 * shape.width * shape.terms,
        nbytes=4.0 * shape.pairs * shape.width * dtype.itemsize,
    )
