"""A bank sharded over gloo ranks against the same bank in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from rime_fast.ops import native
from rime_fast.ops.reward import RewardWeights
from tests.ops.reward_cases import Case, assert_same, make_case, score
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not native.available(), reason=str(native.why_not())),
]

N_ITEMS, GROUP_SIZE, WIDTH, N_ANCHORS = 3, 4, 32, 900
WEIGHTS = {
    "mean": RewardWeights(),
    "softmax": RewardWeights(negative="softmax", rank_reward="1/rank"),
    "max": RewardWeights(negative="max", rank_reward="hit", hit_k=5),
    "ume_r1": RewardWeights.ume_r1(6),
}


def _whole(kind: str, world: int, masked: bool, n_anchors: int = N_ANCHORS) -> Case:
    case = make_case(
        world * N_ITEMS, GROUP_SIZE, WIDTH, n_anchors, positives=WEIGHTS[kind].positives, ties=True, masked=masked
    )
    case["gen"][1, 2, 3] = torch.nan
    return case


def _sizes(world: int, n_anchors: int = N_ANCHORS) -> list[int]:
    """Uneven shards: 1, 2, 3 ... parts, the rest on the last rank."""
    parts = [n_anchors // 20 * (rank + 1) for rank in range(world - 1)]
    return [*parts, n_anchors - sum(parts)]


def _local(case: Case, rank: int, sizes: list[int]) -> Case:
    items = slice(rank * N_ITEMS, (rank + 1) * N_ITEMS)
    mine = {name: value if value is None else value[items] for name, value in case.items() if name != "anchors"}
    return mine | {"anchors": case["anchors"].split(sizes)[rank]}


def _compare(rank: int, world: int) -> None:
    items = slice(rank * N_ITEMS, (rank + 1) * N_ITEMS)
    group = dist.group.WORLD
    for n_anchors in (N_ANCHORS, 90):  # the small bank is scored in fp64
        sizes = _sizes(world, n_anchors)
        for kind, weights in WEIGHTS.items():
            for masked in (True, False):
                case = _whole(kind, world, masked, n_anchors)
                # An own group that lies on both sides of a shard's border.
                case["positive"][0] = sizes[0] - weights.positives // 2
                want = {name: value[items] for name, value in score(case, weights, backend="reference").items()}
                for backend in ("chunked", "reference"):
                    local = _local(case, rank, sizes)
                    got = score(local, weights, backend=backend, group=group)
                    assert_same(got, want)
                    again = score(local, weights, backend=backend, group=group)
                    assert all(torch.equal(got[name], again[name]) for name in got)


def _refusals(rank: int, world: int) -> None:
    """Every rank gets the error, so none is left waiting in a collective."""
    sizes = _sizes(world)
    case = _local(_whole("mean", world, True), rank, sizes)
    calls: list[tuple[dict[str, Any], RewardWeights, str]] = [
        (
            case
            | {
                "gen": case["gen"][:, : 2 + rank % 2],
                "format_ok": case["format_ok"][:, : 2 + rank % 2],
                "lengths": None,
            },
            WEIGHTS["mean"],
            "G must be the same on every rank",
        ),
        (case, RewardWeights(w_fmt=float(rank)), "weights must be the same on every rank"),
        (case | {"negatives_mask": None if rank else case["negatives_mask"]}, WEIGHTS["mean"], "negatives_mask given"),
        (case | {"positive": case["positive"] + (0 if rank else N_ANCHORS)}, WEIGHTS["mean"], "positive: expected"),
        (case | {"negatives_mask": case["negatives_mask"][:, 1:]}, WEIGHTS["mean"], "whole bank's 900 anchors"),
    ]
    # what only the last rank gets wrong is said on all of them
    one = rank == world - 1
    narrow = case["negatives_mask"][:, 1:] if one else case["negatives_mask"]
    lengths = case["lengths"][:1] if one else case["lengths"]
    calls += [
        (case | {"negatives_mask": narrow}, WEIGHTS["mean"], "negatives_mask's columns must be the same"),
        (
            case | {"lengths": lengths},
            WEIGHTS["mean"],
            "lengths: expected" if one else f"on rank {world - 1} .*lengths",
        ),
    ]
    for arguments, weights, message in calls:
        with pytest.raises(ValueError, match=message):
            score(arguments, weights, backend="chunked", group=dist.group.WORLD)
    for other, message in (("bogus", "backend is 'bogus'"), ("reference", "backend is reference must be the same")):
        with pytest.raises(ValueError, match=message):
            score(case, WEIGHTS["mean"], backend=other if one else "chunked", group=dist.group.WORLD)


def _worker(rank: int, world: int) -> None:
    _compare(rank, world)
    _refusals(rank, world)


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_equals_whole(world: int) -> None:
    run_ranks(_worker, world)
