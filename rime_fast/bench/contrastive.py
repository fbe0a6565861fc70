"""Operator B: forward and backward of the contrastive loss against its bare GEMMs and the usual ways to write it.

The floor is four products a term (the similarities twice, dq, dk: 8 N^2 D FLOP) into ready buffers. "eager" is
symmetric cross-entropy over the whole matrix; "open_clip" is ClipLoss's form, both matrices made; "cached loop" works
by row blocks, each with a backward of its own into the embeddings; "sentence-transformers" is that package's cached
loss on ready embeddings, "gradcache" GradCache's package, "inf_cl" Inf-CL's (both one direction, called twice; the last
on CUDA). Errors: relative, of dq against fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.bench.harness import FLOOR, Results, Row, compare, dtype_name, fast_fp64, peak_memory, require_memory
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


_SIZES = {
    "tiny": [(64, 16, 1), (64, 16, 4)],
    "cpu": [(1024, 256, 1), (4096, 256, 1), (4096, 256, 4)],
    "cuda": [
        (4096, 1536, 1),
        (16_384, 1536, 1),
        (16_384, 1536, 4),
        (16_384, 3584, 1),
        (65_536, 1536, 1),
        (65_536, 3584, 4),
    ],
}
SHAPES = {size: [Shape(*one, peaked=p) for one in table for p in (False, True)] for size, table in _SIZES.items()}
SHAPES["cpu"] = [shape for shape in SHAPES["cpu"] if shape.pairs == 1024 or shape.peaked == (shape.terms == 4)]
# measured alone, against N
GROWTH = {
    "tiny": [Shape(128, 16)],
    "cpu": [Shape(1024, 64), Shape(4096, 64), Shape(16_384, 64), Shape(65_536, 64)],
    "cuda": [Shape(n, 1536) for n in (4096, 16_384, 65_536, 262_144, 1_048_576)] + [Shape(1_048_576, 3584)],
}
ONCE = 8e11  # FLOP of a growth case from which a CPU runs it once, after a small one to warm up
Sides = tuple[dict[str, Tensor], dict[str, Tensor]]
Terms = list[tuple[str, str, float]]


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


def _require_matrices(sides: Sides, count: int) -> None:
    """count matrices of similarities, with their gradients, in the dtype and in fp32."""
    rows = sides[0]["disc"]
    require_memory(count * rows.shape[0] ** 2 * (2 * rows.element_size() + 8), rows.device)


def _own(sides: Sides) -> Tensor:
    return torch.arange(sides[0]["disc"].shape[0], device=sides[0]["disc"].device)


def floor(sides: Sides, terms: Terms) -> Callable[[], None]:
    """The products alone."""
    q, k = sides[0]["disc"].detach(), sides[1]["disc"].detach()
    slopes = torch.randn(q.shape[0], k.shape[0], device=q.device, dtype=q.dtype) / q.shape[0]
    logits, dq, dk = torch.empty_like(slopes), torch.empty_like(q), torch.empty_like(k)

    def call() -> None:
        for _ in terms:
            torch.mm(q, k.T, out=logits)
            torch.mm(q, k.T, out=logits)
            torch.mm(slopes, k, out=dq)
            torch.mm(slopes.T, q, out=dk)

    return call


def ours(sides: Sides, terms: Terms, **options: Any) -> Callable[[], Tensor]:
    """Ours with ``options`` of contrastive_loss."""
    return _step(sides, lambda: contrastive_loss(*sides, terms=terms, temperature=TAU, **options).loss.backward())


# --- peers -----------------------------------------------------------------------------------------------------------


def eager(sides: Sides, terms: Terms) -> None:
    _require_matrices(sides, len(terms))
    own, total = _own(sides), torch.zeros((), device=sides[0]["disc"].device)
    for q, k, weight in terms:
        logits = (sides[0][q] @ sides[1][k].T).float() / TAU
        total = total + weight * 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    total.backward()


def open_clip(sides: Sides, terms: Terms) -> None:
    _require_matrices(sides, 2 * len(terms))
    own, total = _own(sides), torch.zeros((), device=sides[0]["disc"].device)
    for q, k, weight in terms:
        there, back = (sides[0][q] @ sides[1][k].T) / TAU, (sides[1][k] @ sides[0][q].T) / TAU
        total = total + weight * 0.5 * (F.cross_entropy(there.float(), own) + F.cross_entropy(back.float(), own))
    total.backward()


def cached_loop(sides: Sides, terms: Terms, rows: int = 512) -> None:
    own = _own(sides)
    for q, k, weight in terms:
        for a, b in ((sides[0][q], sides[1][k]), (sides[1][k], sides[0][q])):
            for start in range(0, len(own), rows):
                logits = (a[start : start + rows] @ b.T).float() / TAU
                loss = F.cross_entropy(logits, own[start : start + rows], reduction="sum")
                (0.5 * weight / len(own) * loss).backward()


def sentence_transformers(sides: Sides, terms: Terms, rows: int = 512) -> None:
    """Their cached loss, both directions, without the encoder: embeddings in, gradients of embeddings out."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    nothing: Any = torch.nn.Sequential(torch.nn.Identity())  # stands where the encoder would
    loss = CachedMultipleNegativesRankingLoss(
        nothing,
        1 / TAU,
        dot_score,
        rows,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    for q, k, weight in terms:
        pair = [rows.detach().requires_grad_() for rows in (sides[0][q], sides[1][k])]
        loss.calculate_loss([[pair[0]], [pair[1]]], with_backward=True)
        for leaf, own in zip((sides[0][q], sides[1][k]), pair, strict=True):
            assert own.grad is not None
            leaf.grad = weight * own.grad if leaf.grad is None else leaf.grad.add_(own.grad, alpha=weight)


def gradcache(sides: Sides, terms: Terms) -> None:
    from grad_cache.loss import SimpleContrastiveLoss

    _require_matrices(sides, 2 * len(terms))
    loss, total = SimpleContrastiveLoss(), torch.zeros((), device=sides[0]["disc"].device)
    for q, k, weight in terms:
        a, b = sides[0][q], sides[1][k]
        total = total + weight * 0.5 * (loss(a / TAU, b) + loss(b / TAU, a))
    total.backward()


def inf_cl(sides: Sides, terms: Terms) -> None:
    from inf_cl import cal_inf_loss

    scale = torch.tensor(1 / TAU, device=sides[0]["disc"].device)
    total = torch.zeros((), device=scale.device)
    for q, k, weight in terms:
        there, back = cal_inf_loss(sides[0][q], sides[1][k], scale), cal_inf_loss(sides[1][k], sides[0][q], scale)
        total = total + weight * 0.5 * (there + back)
    total.backward()


PEERS: dict[str, Callable[[Sides, Terms], None]] = {
    "eager": eager,
    "open_clip": open_clip,
    "cached loop": cached_loop,
    "sentence-transformers": sentence_transformers,
    "gradcache": gradcache,
    "inf_cl": inf_cl,
}


# --- the measurement -------------------------------------------------------------------------------------------------


def truth(sides: Sides, terms: Terms) -> Tensor:
    """dq of the discriminative queries by the reference in fp64."""
    exact = [{m: v.detach().double().requires_grad_() for m, v in side.items()} for side in sides]
    return ours((exact[0], exact[1]), terms, backend="reference")()


def measure(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 5,
) -> dict[str, Row]:
    """Rows of the floor, ours and every peer that runs here."""
    sides, terms = make(shape, device, dtype), TERMS[: shape.terms]
    ids = _own(sides)
    impls: dict[str, Callable[[], Any]] = {
        FLOOR: floor(sides, terms),
        "ours": ours(sides, terms),
        "ours_masked": ours(sides, terms, query_ids=ids, key_ids=ids, margin=2.0),  # masks that mask nothing
    }
    for name, peer in PEERS.items():
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
        flops=8.0 * shape.pairs**2 * shape.width * shape.terms,
        nbytes=4.0 * shape.pairs * shape.width * dtype.itemsize,
    )


def measure_growth(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 3,
) -> dict[str, Row]:
    """Ours alone: against N, time should grow as N^2 and memory as N."""
    flops = 8.0 * shape.pairs**2 * shape.width * shape.terms
    call = ours(make(shape, device, dtype), TERMS[: shape.terms])
    case = f"{shape.pairs}x{shape.width}"
    facts = {"pairs": shape.pairs, "width": shape.width, "terms": shape.terms, "dtype": dtype_name(dtype)}
    if device == "cpu" and flops > ONCE:
        return {"ours": _once(call, case, facts, flops, results)}
    return compare(
        "contrastive_growth",
        case,
        {"ours": call},
        device=device,
        results=results,
        rounds=rounds,
        flops=flops,
        shape=facts,
    )


def _once(call: Callable[[], Any], case: str, shape: dict[str, Any], flops: float, results: Results | None) -> Row:
    """One call, timed and its memory watched at once: at this size it takes most of a minute on two cores."""
    ours(make(Shape(512, shape["width"]), "cpu", torch.float32), TERMS[:1])()
    seconds: list[float] = []

    def timed() -> None:
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)

    peak = peak_memory(timed)
    time = seconds[0]
    row = Row(
        bench="contrastive_growth",
        case=case,
        impl="ours",
        shape=shape,
        median_ms=time * 1e3,
        p20_ms=time * 1e3,
        p80_ms=time * 1e3,
        tflops=flops / time / 1e12,
        peak_mib=None if peak < 0 else peak / 2**20,
        first_call_s=time,
    )
    if results is not None:
        results.rows.append(row)
    return row
