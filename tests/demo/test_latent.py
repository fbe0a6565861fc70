"""The latent rewrites' table of the demo: means over seeds, and what is printed of them."""

from __future__ import annotations

import pytest

from rime_fast.demo.latent import summarise, table
from rime_fast.model.token_names import MODES


def test_the_table_is_the_mean_over_seeds():
    def cell(hit: float) -> dict:
        cost = {mode: {"query_seconds": 0.001 * (1 + i)} for i, mode in enumerate(MODES)}
        return {"hit@1": {f"{q}-{t}": hit for q in MODES for t in MODES}, "cost": cost}

    found = summarise({("latent_8", 0): cell(0.5), ("latent_8", 1): cell(0.7)}, (0, 1), ["latent_8"])
    assert found["latent_8"]["latent_tokens"] == 8
    assert found["latent_8"]["hit@1"]["latent-disc"]["mean"] == pytest.approx(0.6)
    lines = table({"cells": found}).splitlines()
    assert len(lines) == 3
    assert lines[2] == "| 8 | " + " | ".join(["0.600 ± 0.141"] * 5) + " | 1.00 | 2.00 | 3.00 |"
