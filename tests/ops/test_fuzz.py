"""A thousand cases of the fuzz (`make fuzz` runs 10^5), what it found before, and that it finds faults."""

from __future__ import annotations

import pytest
import torch

from rime_fast import contrastive_loss
from tests.ops import fuzz, fuzz_logprob


@pytest.mark.parametrize("start", range(0, 1000, 250))
def test_a_thousand_cases_obey_the_rule(start):
    lines: list[str] = []
    counts, failed = fuzz.run(range(start, start + 250), lines.append)
    assert not failed, "\n".join(lines)
    assert sum(count for what, count in counts.items() if what.endswith("right")) > 125, counts


def test_a_fault_is_found_and_shrunk(monkeypatch):
    """Entropies a thousandth too large: told with the seed and only those options that the fault needs."""
    fused = fuzz_logprob.fused_logprob_pool

    def faulty(*args, **options):
        out = fused(*args, **options)
        return out._replace(entropy=None if out.entropy is None else out.entropy * 1.001)

    monkeypatch.setattr(fuzz_logprob, "fused_logprob_pool", faulty)
    seed = next(seed for seed in range(200) if fuzz.failure(*fuzz.draw(seed)) is not None)
    lines: list[str] = []
    assert fuzz.run(range(seed, seed + 1), lines.append)[1] == [seed]
    assert lines[0].startswith(f"seed {seed}: logprob(entropy=True, seed={seed})\n")


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_zero_row_in_fp16_has_no_norm_to_divide_by(backend):
    rows = torch.eye(3, 4, dtype=torch.float16)
    rows[0] = 0
    whole = contrastive_loss({"d": rows}, {"d": rows}, terms=[("d", "d", 1.0)], dims=[2, 4], backend=backend)
    exact = {"d": rows.double()}
    truth = contrastive_loss(exact, exact, terms=[("d", "d", 1.0)], dims=[2, 4], backend="reference")
    assert whole.loss.item() == pytest.approx(truth.loss.item(), rel=1e-3)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_an_infinite_row_without_rivals_is_named(backend):
    queries = {"d": torch.tensor([[torch.inf, 0.0]])}
    with pytest.raises(ValueError, match=r"queries\['d'\] holds NaN or Inf in row 0"):
        contrastive_loss(queries, {"d": torch.ones(1, 2)}, terms=[("d", "d", 1.0)], backend=backend)


def test_the_reference_rounds_16_bits_once_whatever_the_width():
    assert fuzz.failure(*fuzz.draw(10640)) is None
