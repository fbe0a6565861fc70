"""The head learns from the host how many rows are scored: on a GPU that bounds its work without a wait."""

from __future__ import annotations

import pytest

from rime_fast.ops import logprob_pool
from tests.trainers import test_policy_batch, test_rime_trainer


def recorder(real, found):
    def recorded(hidden, lm_head, targets, *args, **options):
        found.append((int((targets != -100).sum()), options["max_scored"], len(targets)))
        return real(hidden, lm_head, targets, *args, **options)

    return recorded


@pytest.fixture
def calls(monkeypatch):
    found = []
    for name in ("fused_linear_ce", "fused_logprob_pool"):
        monkeypatch.setattr(logprob_pool, name, recorder(getattr(logprob_pool, name), found))
    return found


@pytest.mark.parametrize("settings", [{}, {"micro_batch_tokens": 60}, {"latent_tokens": 2}], ids=str)
def test_joint_training(tiny, tmp_path, calls, settings):
    run = test_rime_trainer.trainer(tiny, tmp_path, tiny.pairs(4, negatives=1), max_steps=1, **settings)
    run.train()
    assert calls
    for scored, bound, rows in calls:
        assert scored == bound < rows


@pytest.mark.parametrize("shared", [True, False])
def test_refine_rl(tiny, tmp_path, calls, shared):
    test_policy_batch.trained(tiny, tmp_path, shared_prefix=shared)
    assert calls
    for scored, bound, rows in calls:
        assert scored == bound < rows
