"""What surrounds the contrast's CUDA row kernels, without a GPU (the kernels themselves: test_cuda_build.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.contrastive import cpu, cuda, fused, schedule, softmax, tiles
from rime_fast.ops.contrastive.cuda import PATCH, narrow_view
from rime_fast.ops.contrastive.softmax import Positives, Slopes, Solved, Statistics
from rime_fast.ops.contrastive.tiles import Masks, TorchRows
from tests.ops.contrastive_cases import check_rule, make_case, run
from tests.ops.test_contrastive_launches import count

ROOT = Path(__file__).resolve().parents[2]


def test_the_host_knows_the_patch() -> None:
    header = (ROOT / "csrc/rime/contrastive.h").read_text()
    found = [int(re.search(rf"{name} = (\d+);", header)[1]) for name in ("kPatchRows", "kPatchCols")]  # type: ignore[index]
    assert tuple(found) == PATCH
    assert float(re.search(r"kLargestLogit = ([\d.]+)f;", header)[1]) == softmax.BOUNDED  # type: ignore[index]
    warps = int(re.search(r"kPatchWarps = (\d+);", header)[1])  # type: ignore[index]
    assert 32 * warps == fused.BLOCK


# What surrounds the kernels on CUDA: operands in their own dtype, fp32 tiles, narrow gradients relative to a unit.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_narrow_operands_obey_the_rule(dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA form of the chunked sweep on the CPU; a small loss must not underflow in fp16."""
    monkeypatch.setattr(cpu, "TILE", (37, 300))
    case = make_case(80, 650, 33, temperature=0.02, ids=True, margin=0.2, shuffled=True, dtype=dtype)
    case.terms = [(q, k, weight * scale) for q, k, weight in case.terms]
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    monkeypatch.setattr(cpu, "operands", lambda tensors: [t.detach().contiguous() for t in tensors])
    monkeypatch.setattr(tiles, "has_compiled_rows", lambda _: False)
    found = run(case, dtype, "chunked")
    assert tiles.unit_of(torch.tensor([0.0, -3.0]), dtype) == 3.0
    check_rule(found, eager, truth, dtype)


def test_a_narrow_gradient_lies_in_the_first_half_of_its_rows() -> None:
    buffer = torch.zeros(3, 8)
    tile = buffer[:, :5]
    narrow = narrow_view(tile, torch.bfloat16)
    assert narrow.shape == (3, 5)
    narrow.copy_(torch.arange(15.0).view(3, 5))
    assert torch.equal(buffer.view(torch.bfloat16)[:, :5].float(), torch.arange(15.0).view(3, 5))
    assert buffer.view(torch.bfloat16)[:, 5:].eq(0).all()
    assert narrow_view(tile, torch.float32) is tile


def test_sums_by_key_in_fixed_point_equal_sums_in_floating_point() -> None:
    """On an accelerator shared keys are summed in fixed point, which no order of additions can change."""
    torch.manual_seed(0)
    values, at = torch.rand(5000, dtype=torch.float64), torch.randint(0, 7, (5000,))
    plain, fixed = softmax.sum_by_key(values[None], at[None], 9), softmax.fixed_sum_by_key(values[None], at[None], 9)
    assert torch.allclose(plain, fixed, rtol=1e-12, atol=0)
    order = torch.randperm(5000)
    assert torch.equal(fixed, softmax.fixed_sum_by_key(values[None, order], at[None, order], 9))
    values[3] = torch.nan
    assert softmax.fixed_sum_by_key(values[None], at[None], 9).isnan().sum() == 1


def test_statistics_of_torch_rows_are_those_of_the_definition() -> None:
    """TorchRows serves CUDA builds without kernels: two tiles of a larger problem, one masked row."""
    x = torch.randn(6, 9, dtype=torch.float64)
    labels = torch.tensor([[0, -1], [3, 8], [5, -1], [7, 1], [2, -1], [8, -1]])
    limits = torch.tensor([9.0, 9, 9, -9, 9, 9]).double(), torch.full((9,), 9.0).double()
    masks = Masks(labels, row_limit=limits[0], col_limit=limits[1])
    state = Statistics.empty(1, labels, 9, False, torch.float64)[0]
    rows = TorchRows(torch.tensor(2.0).double())
    for col in (0, 4):
        rows.statistics(x[:, col : col + 5 if col else 4].clone(), 0, col, masks, state)
    rivals = (2 * x).clone()
    for i, row in enumerate(labels.tolist()):
        rivals[i, [j for j in row if j >= 0]] = -torch.inf
    by_row = rivals.clone()
    by_row[3] = -torch.inf
    assert torch.allclose(state.row_max + state.row_sum.log(), by_row.logsumexp(1))
    assert torch.allclose(state.col_max + state.col_sum.log(), rivals.logsumexp(0))
    assert torch.equal(state.rival, by_row.amax(1))
    assert torch.equal(state.positive[1], 2 * x[1, [3, 8]])


# What is O(N) runs in kernels of its own on a GPU (fused.py): here the torch that they stand for takes their places.


@pytest.fixture
def fused_by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CUDA schedule on the CPU, with fused.py's operators computed by softmax.py's torch; their names as called."""
    calls: list[str] = []

    def norm(x: Tensor, largest: Tensor, side: int) -> None:
        calls.append("norm")
        norms = largest.view(torch.float32)
        norms[side] = torch.maximum(norms[side], x.float().norm(dim=1).max())

    def begin(temperature: Tensor, norms: Tensor, positive: Tensor, scale: Tensor, bounded: Tensor) -> None:
        calls.append("begin")
        positive.copy_(temperature)
        scale.copy_(1 / temperature)
        bounded.copy_(norms.view(torch.float32).prod() * scale < softmax.BOUNDED)

    def placed(first: int, queries: int) -> Positives:
        positives = Positives.of(torch.arange(first, first + queries))
        positives.first = first
        return positives

    def solve(*arguments: Any) -> None:
        calls.append("solve")
        row_max, row_sum, col_max, col_sum, positive, rival, first, symmetric, rows, cols, parts, loss, hit = arguments
        state = Statistics(False, row_max, row_sum, col_max, col_sum, positive, rival)
        positives = placed(first, row_max.shape[1])
        solved = Solved.of(state, positives)
        rows.copy_(solved.rows), cols.copy_(solved.cols), parts.fill_(torch.nan)
        loss.copy_(solved.total(positives, symmetric) / row_max.shape[1])
        hit.copy_(state.hits() / row_max.shape[1])

    def slopes(*arguments: Any) -> None:
        calls.append("slopes")
        rows, cols, first, symmetric, grad, temperature, n_queries, *outs, unit = arguments
        positives = placed(first, rows.shape[2])
        weights = None if positives.covers(cols.shape[2]) else positives.key_weights(cols.shape[2])
        factors = grad.double() * (0.5 if symmetric else 1.0) / n_queries / temperature
        if unit is not None:
            unit.copy_(tiles.unit_of(factors, torch.bfloat16))
            factors = factors / unit
        form = False, torch.float32, False
        found = Slopes.of(Solved(rows, cols), positives, weights, factors, symmetric, *form)
        wanted = (found.row_shift, found.row_coef, found.col_shift, found.col_coef, found.positive_slope[:, :, 0])
        for out, value in zip(outs, (*wanted, found.factor), strict=True):
            out.copy_(value)

    def sized(d: Tensor, x: Tensor, unit: Tensor | None, out: Tensor, products: Tensor | None) -> None:
        calls.append("sized")
        if products is not None:
            products.copy_((d.double() * x.double()).sum(1))
        out.copy_(d if unit is None else d * unit)

    library = torch.library.Library("rime_fast_C", "IMPL")
    for run_it in (norm, begin, solve, slopes, sized):
        library.impl(f"contrast_{run_it.__name__}", run_it, "CPU")
    monkeypatch.setattr(schedule, "cpu", cuda)
    monkeypatch.setattr(cuda, "TILE", (37, 300))
    monkeypatch.setattr(tiles, "has_compiled_rows", lambda _: False)
    monkeypatch.setattr(fused, "serves", lambda _: True)
    yield calls
    library._destroy()


@pytest.mark.skipif(not native.available(), reason="the operators are defined by csrc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"ids": True, "margin": 0.2}, {"symmetric": False}], ids=str)
@pytest.mark.parametrize("keys", [80, 130])
def test_the_fused_part_obeys_the_rule(
    dtype: torch.dtype, options: dict[str, Any], keys: int, fused_by_torch: list[str]
) -> None:
    case = make_case(80, keys, 33, temperature=0.02, dtype=dtype, **options)
    truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
    found = run(case, dtype, "chunked")
    assert set(fused_by_torch) == {"norm", "begin", "solve", "slopes", "sized"}
    check_rule(found, eager, truth, dtype)


@pytest.mark.skipif(not native.available(), reason="the operators are defined by csrc")
def test_launches_of_the_fused_part(fused_by_torch: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four terms in one tile: of these 16 are products; statistics (two launches) and gradients, 12 more, go uncounted,
    and 16-bit rows take 4 more, to give their gradients their size."""

    class Rows:
        statistics = gradient = staticmethod(lambda tile, *_: tile)

    def sweep(queries: Any, keys: Any, terms: Any, scale: Any, masks: Any, *_: Any) -> tiles.TileSweep:
        return tiles.TileSweep(queries, keys, terms, masks, Rows(), (8192, 8192), 4)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda, "sweep", sweep)
    assert count("chunked", torch.float32) <= 36
    assert set(fused_by_torch) == {"norm", "begin", "solve", "slopes"}
