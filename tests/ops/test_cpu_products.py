"""fp32 products by oneDNN: exact as torch.mm in every layout and in parts; torch.mm where oneDNN does not serve.

Logits: a row's bits depend on nothing beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rime_fast.ops import cpu_products


@pytest.fixture(autouse=True)
def prefers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both libraries are tested on every machine, whichever it prefers. Returns the real question."""
    real = cpu_products.prefers_onednn
    monkeypatch.setattr(cpu_products, "prefers_onednn", lambda turned=False: True)
    return real


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def matrix(rows: int, columns: int, transposed: bool) -> Tensor:
    return torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)


@pytest.mark.parametrize("layouts", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("part_bytes", [1 << 12, 4 << 20])
def test_every_layout_in_parts(layouts: tuple[bool, bool], part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "PART_BYTES", part_bytes)
    a, b = matrix(37, 501, layouts[0]), matrix(501, 259, layouts[1])
    assert cpu_products.fast_products(a, b)
    truth = a.double() @ b.double()
    limit = 2 * relative(a @ b, truth) + 1e-6
    assert relative(cpu_products.product(a, b), truth) < limit
    into = torch.full((37, 259), 3.0)
    cpu_products.set_or_add_product(into, a, b, first=True)
    assert relative(into, truth) < limit
    cpu_products.add_product(into, a, b)
    assert relative(into, 2 * truth) < limit


def test_onednn_never_gets_rows_that_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the second operand: some processors' oneDNN multiplies these by its plain loop."""
    real, weights = cpu_products._linear(), []

    def layer(a: Tensor, weight: Tensor, *more: Any) -> Tensor:
        weights.append(weight)
        return real(a, weight, *more)

    monkeypatch.setattr(cpu_products, "_linear", lambda: layer)
    head = torch.randn(300, 64)
    spaced = torch.randn(300, 100)[:, :64].copy_(head)
    x, into = torch.randn(16, 64), torch.empty(16, 300)
    cpu_products.set_logits(into, x, spaced)
    assert torch.equal(into, cpu_products.logits_of(x, head))
    assert torch.equal(into, cpu_products.logits_of(x, spaced))
    logits = len(weights)
    a = torch.randn(64, 512)
    for b in (torch.randn(512, 600)[:, :256], torch.randn(256, 600)[:, :512].t()):
        truth = a.double() @ b.double()
        assert relative(cpu_products.product(a, b), truth) < 2 * relative(a @ b, truth) + 1e-6
    assert all(w.stride() in ((w.shape[1], 1), (1, w.shape[0])) for w in weights)
    assert len(weights) == logits + 2


@pytest.mark.parametrize(
    ("processor", "mkl", "plain", "turned"),
    [
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", True, False, False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", True, True, False),  # Zen 3 and 4
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", True, True, True),  # Zen 5
        ("vendor_id\t: AuthenticAMD\n", True, True, True),
        ("CPU implementer\t: 0x41\n", True, True, True),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", False, True, True),
    ],
)
def test_the_processor_decides(
    processor: str, mkl: bool, plain: bool, turned: bool, prefers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(cpu_products.Path, "read_text", lambda *args, **kwargs: processor)
    assert (prefers.__wrapped__(), prefers.__wrapped__(turned=True)) == (plain, turned)


@pytest.mark.parametrize("why", ["small", "fp64", "absent", "slower"])
def test_torch_where_it_does_not_serve(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(64, 512), torch.randn(512, 256)
    if why == "small":
        a = a[:4]
    elif why == "fp64":
        a, b = a.double(), b.double()
    elif why == "slower":
        monkeypatch.setattr(cpu_products, "prefers_onednn", lambda turned=False: False)
    else:
        monkeypatch.setattr(cpu_products, "_linear", lambda: None)
    assert not cpu_products.fast_products(a, b)
    assert torch.equal(cpu_products.product(a, b), a @ b)
    into = torch.ones(a.shape[0], 256, dtype=a.dtype)
    cpu_products.add_product(into, a, b)
    torch.testing.assert_close(into, 1 + a @ b)


@pytest.mark.parametrize("onednn", [True, False])
def test_logits_of_a_row_whatever_is_beside_it(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits among 16 and among 80; where there is no oneDNN too."""
    if not onednn:
        monkeypatch.setattr(cpu_products, "_linear", lambda: None)
    x, head = torch.randn(80, 512), torch.randn(cpu_products.COLUMNS + 123, 512)
    whole = torch.full((80, head.shape[0]), float("nan"))
    cpu_products.set_logits(whole, x, head)
    assert torch.equal(cpu_products.logits_of(x, head), whole)
    truth = x.double() @ head.double().t()
    assert relative(whole, truth) < 2 * relative(x @ head.t(), truth) + 1e-6
    for rows in (slice(16, 32), slice(32, 64)):
        part = torch.empty_like(whole[rows])
        cpu_products.set_logits(part, x[rows], head)
        assert torch.equal(part, whole[rows])


def test_same_bits_from_run_to_run() -> None:
    a, b = torch.randn(512, 300), torch.randn(300, 2048)
    assert torch.equal(cpu_products.fast_product(a, b), cpu_products.fast_product(a, b))
