"""score_rewrites_ on a GPU: every backend against the CPU's reference, host-resident banks, no synchronisation."""

from __future__ import annotations

import pytest
import torch

from rime_fast.ops.reward import TERM_NAMES, RewardWeights, score_rewrites_
from rime_fast.ops.reward.op import TABLE
from tests.ops.reward_cases import Case, assert_same, make_case, score

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WEIGHTS = {
    "mean": RewardWeights(),
    "softmax": RewardWeights(negative="softmax", rank_reward="1/rank"),
    "max": RewardWeights(negative="max", rank_reward="hit", hit_k=10),
    "ume_r1": RewardWeights.ume_r1(5),
}


def _on_gpu(case: Case) -> Case:
    return {name: value if value is None else value.cuda() for name, value in case.items()}


def _backends() -> list[str]:
    probe = torch.zeros(1, device="cuda")
    return [name for name in ("reference", "cuda", "triton") if TABLE.why_not(name, probe) is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("group_size", "n_anchors"), [(1, 5), (8, 257), (64, 5000), (8, 100_000)])
def test_equals_the_reference(kind: str, dtype: torch.dtype, group_size: int, n_anchors: int) -> None:
    weights = WEIGHTS[kind]
    case = make_case(6, group_size, 192, n_anchors, positives=weights.positives, ties=True, dtype=dtype)
    want = score(case, weights, backend="reference")
    for backend in _backends():
        assert_same(score(_on_gpu(case), weights, backend=backend), want)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_smoke(kind: str) -> None:
    """Small enough for compute-sanitizer."""
    weights = WEIGHTS[kind]
    case = make_case(2, 3, 40, 300, positives=weights.positives, ties=True)
    for backend in _backends():
        assert_same(score(_on_gpu(case), weights, backend=backend), score(case, weights, backend="reference"))


@pytest.mark.parametrize("n_anchors", [5, 700])
def test_every_argument_may_be_a_view(n_anchors: int) -> None:
    case = make_case(5, 3, 20, n_anchors, ties=True)
    want = score(case, backend="reference")
    views = {name: torch.stack([x, torch.ones_like(x)], dim=1).flatten(0, 1)[::2] for name, x in _on_gpu(case).items()}
    for backend in _backends():
        assert_same(score(views, backend=backend), want)


def test_a_bank_in_pinned_host_memory_streams() -> None:
    case = make_case(6, 8, 64, 50_000)
    want = score(case, backend="reference")
    on_gpu = _on_gpu(case) | {"anchors": case["anchors"].pin_memory()}
    for backend in _backends():
        assert_same(score(on_gpu, backend=backend), want)


def test_no_synchronisation() -> None:
    case = _on_gpu(make_case(6, 8, 64, 3000))
    rewards, advantages = torch.empty(6, 8, device="cuda"), torch.empty(6, 8, device="cuda")
    terms = {name: torch.empty(6, 8, device="cuda") for name in TERM_NAMES}
    for backend in _backends():
        score_rewrites_(rewards, advantages, terms=terms, backend=backend, **case)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            score_rewrites_(rewards, advantages, terms=terms, backend=backend, **case)
        finally:
            torch.cuda.set_sync_debug_mode("default")
