"""The rule has teeth: a cancelling sum is forgiven the rounding of its terms, nothing more."""

from __future__ import annotations

import pytest
import torch

from tests.ops.contrastive_cases import make_case, run
from tests.ops.error_rule import assert_rule
from tests.ops.logprob_cases import Case


@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_the_contrastive_sum_of_absolute_terms(temperature: float) -> None:
    """It is at least the sum itself; a one-way, one-positive loss has it by hand."""
    case = make_case(6, 9, 5, temperature=temperature, symmetric=False)
    case.terms = [("disc", "disc", 2.0)]
    truth = run(case, torch.float64, "reference")
    similarity = case.queries["disc"] @ case.keys["disc"].T
    slope = ((similarity / temperature).softmax(1) - torch.eye(6, 9)) * 2 / 6 / temperature
    assert truth.temperature_terms == pytest.approx((slope * similarity).abs().sum().item() / temperature)
    assert truth.temperature_terms >= abs(truth.gradients["temperature"].item())


def test_the_log_prob_sum_of_absolute_terms() -> None:
    case = Case(rows=5, width=8, vocabulary=11, bias=False, pools=False, scored="all")
    t = case.tensors
    logits = t["hidden"].double() @ t["lm_head"].double().T
    p = (logits / case.temperature).softmax(1)
    slope = 0.5 * t["token_weight"].double()[:, None] * (p - torch.eye(11)[t["targets"]]) / case.temperature
    case.eager(torch.float64, "linear_ce")
    assert case.temperature_terms == pytest.approx((slope * logits).abs().sum().item() / case.temperature, rel=1e-6)


def test_an_error_of_a_cancelling_sum_is_still_found() -> None:
    truth, absolute = torch.tensor(1e-4, dtype=torch.float64), 1.0
    assert_rule("rounding", truth + 5e-7, truth, truth, torch.float32, absolute)
    with pytest.raises(AssertionError, match="more: error"):
        assert_rule("more", truth + 2e-6, truth, truth, torch.float32, absolute)
    with pytest.raises(AssertionError, match="not a sum"):
        assert_rule("not a sum", truth + 5e-7, truth, truth, torch.float32)
