"""Int8 by learned step size: values and gradients against LSQ's formulas written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from rime_fast.recipe.int8 import fake_int8, first_step, to_int8, trained_step


def unit_rows(count: int, width: int, seed: int = 3) -> torch.Tensor:
    found = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(found, dim=1)


def formula(rows: torch.Tensor, s: float, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """The normalised y = s q, its gradients with respect to rows and step, and how many numbers are out of range."""
    v = rows.double() / s
    inside = (v >= -128) & (v <= 127)
    q = torch.where(inside, v.round(), torch.where(v < 0, -128.0, 127.0))
    y = s * q
    norm = y.norm(dim=1, keepdim=True)
    unit, up = y / norm, upstream.double()
    of_y = (up - unit * (unit * up).sum(1, keepdim=True)) / norm  # through the normalisation
    of_s = float((of_y * torch.where(inside, q - v, q)).sum()) / math.sqrt(127 * rows.shape[1])
    return unit, torch.where(inside, of_y, 0.0), of_s, int((~inside).sum())


@pytest.mark.parametrize(("share", "clipped"), [(1.0, False), (0.1, True)])
@pytest.mark.parametrize("width", [7, 64])
def test_values_and_both_gradients_are_lsqs(share, clipped, width):
    rows = unit_rows(9, width).requires_grad_()
    step = torch.tensor(first_step(width) * share, requires_grad=True)
    upstream = torch.randn(9, width, generator=torch.Generator().manual_seed(4))
    out = fake_int8(rows, step)
    out.backward(upstream)
    value, of_rows, of_step, beyond = formula(rows.detach(), float(step.detach()), upstream)
    assert (beyond > 0) == clipped
    torch.testing.assert_close(out.double(), value, rtol=0, atol=1e-6)
    torch.testing.assert_close(rows.grad.double(), of_rows, rtol=1e-5, atol=1e-5)
    assert float(step.grad) == pytest.approx(of_step, rel=1e-4)
    assert abs(of_step) > 1e-3


def test_what_is_trained_is_what_is_kept():
    """The stored int8 rows, cut or whole, have the cosines that the loss compared; bf16 rows stay bf16."""
    rows, step = unit_rows(5, 48), torch.tensor(0.002)
    kept = to_int8(rows, float(step))
    assert kept.dtype == torch.int8
    assert (int(kept.min()), int(kept.max())) == (-128, 127)
    for width in (16, 48):
        unit = torch.nn.functional.normalize(kept[:, :width].float(), dim=1)
        trained = torch.nn.functional.normalize(fake_int8(rows, step)[:, :width], dim=1)
        torch.testing.assert_close(trained, unit)
        assert torch.equal(to_int8(rows[:, :width], float(step)), kept[:, :width])
    assert fake_int8(rows.bfloat16(), step).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [32, 1536])
def test_the_first_step_is_lsqs_for_unit_rows(width):
    rows = unit_rows(256, width)
    assert first_step(width) == pytest.approx(2 * float(rows.abs().mean()) / math.sqrt(127), rel=0.02)
    cosines = (fake_int8(rows, torch.tensor(first_step(width))) * rows).sum(1)
    assert float(cosines.min()) > 0.998


@pytest.mark.parametrize("width", [64, 24])
def test_retrieval_by_int8_is_that_of_fp32(width):
    """Whole rows and a prefix, at the step that training comes to: 1,000 queries, many of which barely find theirs."""
    targets = unit_rows(1000, 64)
    queries = torch.nn.functional.normalize(targets + 2.3 * unit_rows(1000, 64, seed=5), dim=1)

    def hits(queries: torch.Tensor, targets: torch.Tensor) -> float:
        scores = queries @ torch.nn.functional.normalize(targets.float(), dim=1).T
        return float((scores.argmax(1) == torch.arange(1000)).float().mean())

    wide = hits(queries[:, :width], targets[:, :width])
    step = first_step(64) / 4
    short = hits(to_int8(queries, step)[:, :width].float(), to_int8(targets, step)[:, :width])
    assert 0.1 < wide < 0.6
    assert abs(short - wide) <= 0.01


def test_a_model_without_a_step_is_named():
    with pytest.raises(ValueError, match="no int8_step in its config; expected one trained with int8_weight"):
        trained_step(object())
