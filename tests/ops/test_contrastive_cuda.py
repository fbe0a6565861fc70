"""What surrounds the contrast's CUDA row kernels, without a GPU (the kernels themselves: test_cuda_build.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rime_fast.ops.contrastive import cpu, softmax, tiles
from rime_fast.ops.contrastive.cuda import PATCH, narrow_view
from rime_fast.ops.contrastive.softmax import Statistics
from rime_fast.ops.contrastive.tiles import Masks, TorchRows
from tests.ops.contrastive_cases import check_rule, make_case, run

ROOT = Path(__file__).resolve().parents[2]


def test_the_host_knows_the_patch() -> None:
    header = (ROOT / "csrc/rime/contrastive.h").read_text()
    found = [int(re.search(rf"{name} = (\d+);", header)[1]) for name in ("kPatchRows", "kPatchCols")]  # type: ignore[index]
    assert tuple(found) == PATCH


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
