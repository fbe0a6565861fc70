"""Operator B: forward and backward of the contrastive loss against its bare GEMMs and the usual ways to write it.

The floor is four products a term (the similarities twice, dq, dk: 8 N^2 D FLOP) into ready buffers. "eager" is
symmetric cross-entropy over the whole matrix, as GradCache's loss computes it; "open_clip" is ClipLoss's form, both
matrices made; "cached loop" is the form of sentence-transformers' cached loss: row blocks, each with a backward of its
own into the embeddings; "inf_cl" is Inf-CL's package (one direction, CUDA). Errors: relative, of dq against fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compare, relative_error
from torch import Tensor

from rime_fast.ops.contrastive import contrastive_loss

TAU = 0.02
TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]
# pairs, width, terms
SHAPES = {
    "tiny": [(64, 16, 1), (64, 16, 4)],
    "cpu": [(1024, 256, 1), (4096, 256, 1), (4096, 256, 4)],
    "cuda": [(4096, 1536, 1), (16_384, 1536, 1), (16_384, 1536, 4), (65_536, 1536, 1), (65_536, 3584, 1)],
}
GROWTH = {
    "tiny": [(128, 16)],
    "cpu": [(1024, 64), (4096, 64), (16_384, 64)],
    "cuda": [(16_384, 1536), (65_536, 1536), (262_144, 1536), (1_048_576, 1536)],
}
Sides = tuple[dict[str, Tensor], dict[str, Tensor]]


def make(n: int, width: int, device: str, peaked: bool) -> Sides:
    """Unit-norm rows; peaked: positives at cosine of about 0.9, as after training."""
    random = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = {name: F.normalize(torch.randn(n, width, generator=random), dim=-1) for name in ("qd", "qg", "kd", "kg")}
    if peaked:
        rows["qd"] = F.normalize(rows["kd"] + 0.5 * rows["qd"], dim=-1)
        rows["qg"] = F.normalize(rows["kg"] + 0.5 * rows["qg"], dim=-1)
    leaf = {name: value.to(device, dtype).requires_grad_() for name, value in rows.items()}
    return {"disc": leaf["qd"], "gen": leaf["qg"]}, {"disc": leaf["kd"], "gen": leaf["kg"]}


def clear(sides: Sides) -> None:
    for side in sides:
        for rows in side.values():
            rows.grad = None


def ours(sides: Sides, terms: list[tuple[str, str, float]], **options: Any) -> Callable[[], None]:
    def call() -> None:
        clear(sides)
        contrastive_loss(*sides, terms=terms, temperature=TAU, **options).loss.backward()

    return call


def eager(sides: Sides, terms: list[tuple[str, str, float]]) -> Callable[[], None]:
    def call() -> None:
        clear(sides)
        own = torch.arange(sides[0]["disc"].shape[0], device=sides[0]["disc"].device)
        total: Any = 0.0
        for q, k, weight in terms:
            logits = (sides[0][q] @ sides[1][k].T).float() / TAU
            total = total + weight * 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
        total.backward()

    return call


def open_clip(sides: Sides, terms: list[tuple[str, str, float]]) -> Callable[[], None]:
    def call() -> None:
        clear(sides)
        own = torch.arange(sides[0]["disc"].shape[0], device=sides[0]["disc"].device)
        total: Any = 0.0
        for q, k, weight in terms:
            there, back = (sides[0][q] @ sides[1][k].T) / TAU, (sides[1][k] @ sides[0][q].T) / TAU
            total = total + weight * 0.5 * (F.cross_entropy(there.float(), own) + F.cross_entropy(back.float(), own))
        total.backward()

    return call


def cached_loop(sides: Sides, terms: list[tuple[str, str, float]], rows: int = 512) -> Callable[[], None]:
    def call() -> None:
        clear(sides)
        n = sides[0]["disc"].shape[0]
        own = torch.arange(n, device=sides[0]["disc"].device)
        for q, k, weight in terms:
            for a, b in ((sides[0][q], sides[1][k]), (sides[1][k], sides[0][q])):
                for start in range(0, n, rows):
                    logits = (a[start : start + rows] @ b.T).float() / TAU
                    loss = F.cross_entropy(logits, own[start : start + rows], reduction="sum")
                    (0.5 * weight / n * loss).backward()

    return call


def inf_cl(sides: Sides, terms: list[tuple[str, str, float]]) -> Callable[[], None]:
    def call() -> None:
        from inf_cl import cal_inf_loss  # type: ignore[import-not-found]

        clear(sides)
        scale = torch.tensor(1 / TAU, device=sides[0]["disc"].device)
        total: Any = 0.0
        for q, k, weight in terms:
            there, back = cal_inf_loss(sides[0][q], sides[1][k], scale), cal_inf_loss(sides[1][k], sides[0][q], scale)
            total = total + weight * 0.5 * (there + back)
        total.backward()

    return call


def floor(sides: Sides, terms: list[tuple[str, str, float]]) -> Callable[[], None]:
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = "tiny" if metafunc.config.getoption("--rime-tiny") else metafunc.config.getoption("--rime-device")
    table: dict[str, list[Any]] = {"shape": SHAPES[size], "grown": GROWTH[size]}
    for name, values in table.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=lambda s: "x".join(map(str, s)))


@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
def test_contrastive(shape: tuple[int, int, int], peaked: bool, results, device: str, tiny: bool) -> None:
    n, width, n_terms = shape
    sides, terms = make(n, width, device, peaked), TERMS[:n_terms]
    ids = torch.arange(n, device=device)
    impls = {
        "floor": floor(sides, terms),
        "ours": ours(sides, terms),
        "ours_masked": ours(sides, terms, query_ids=ids, key_ids=ids, margin=2.0),  # masks that mask nothing
        "eager": eager(sides, terms),
        "open_clip": open_clip(sides, terms),
        "cached loop": cached_loop(sides, terms),
        "inf_cl": inf_cl(sides, terms),
    }
    errors = {}
    if n <= 4096:
        exact = tuple({m: v.detach().double().requires_grad_() for m, v in side.items()} for side in sides)
        ours(exact, terms, backend="reference")()  # type: ignore[arg-type]
        truth = exact[0]["disc"].grad
        for name in ("ours", "ours_masked", "eager", "open_clip", "cached loop"):
            impls[name]()
            errors[name] = relative_error(sides[0]["disc"].grad, truth)
            assert errors[name] < (1e-4 if device == "cpu" else 5e-2), name
    compare(
        "contrastive", f"{'x'.join(map(str, shape))}-{'peaked' if peaked else 'random'}", impls, device=device,
        results=results, rounds=1 if tiny else 5, shape={"pairs": n, "width": width, "terms": n_terms},
        flops=8.0 * n * n * width * n_terms, nbytes=4.0 * n * width * sides[0]["disc"].element_size(), errors=errors,
    )  # fmt: skip


def test_growth(grown: tuple[int, int], results, device: str, tiny: bool) -> None:
    """Ours alone, against N: time should grow as N^2 and memory as N."""
    n, width = grown
    call = ours(make(n, width, device, False), TERMS[:1])
    found = compare(
        "contrastive_growth", "x".join(map(str, grown)), {"ours": call}, device=device, results=results,
        rounds=1 if tiny or n > 10_000 else 3, shape={"pairs": n, "width": width, "terms": 1},
        flops=8.0 * n * n * width,
    )  # fmt: skip
    assert found["ours"].peak_mib is not None
    assert found["ours"].peak_mib < 300 or device == "cuda"
