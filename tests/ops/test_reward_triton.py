"""The Triton backend of score_rewrites_: through the interpreter against the reference, and compiled for real GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rime_fast.engine.anchor_bank import AnchorBank
from rime_fast.ops.reward import RewardWeights, stream
from rime_fast.ops.reward import triton as on_triton
from tests.ops.reward_cases import assert_same, make_case, score

pytestmark = pytest.mark.skipif(
    on_triton.why_not(torch.zeros(1)) is not None, reason=str(on_triton.why_not(torch.zeros(1)))
)

ROOT = Path(__file__).resolve().parents[2]
ENGINE = on_triton.Engine()
WEIGHTS = {
    "mean": RewardWeights(),
    "softmax": RewardWeights(negative="softmax", rank_reward="1/rank"),
    "max": RewardWeights(negative="max"),
    "ume_r1": RewardWeights.ume_r1(3),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("width", "n_anchors"), [(7, 20), (33, 700)])
def test_equals_the_reference(kind: str, masked: bool, width: int, n_anchors: int) -> None:
    weights = WEIGHTS[kind]
    case = make_case(3, 2, width, n_anchors, positives=weights.positives, ties=True, masked=masked)
    case["gen"][1, 1, 0] = torch.nan
    case["anchors"][n_anchors - 1] = torch.inf
    assert_same(score(case, weights, backend="triton"), score(case, weights, backend="reference"))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_tiles_and_bf16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stream.BUFFER_BYTES, "cpu", 1)
    weights = WEIGHTS[kind]
    case = make_case(2, 3, 24, 600, positives=weights.positives, dtype=torch.bfloat16)
    case["positive"] = torch.tensor([255, 511])
    assert_same(score(case, weights, backend="triton"), score(case, weights, backend="reference"))


def test_a_norm_that_is_known_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors that only the second, exact look tells apart: the same bits with the bank's own norm."""
    monkeypatch.setattr(stream, "EXACT_ANCHORS", 0)
    case = make_case(2, 3, 24, 300)
    centre = case["anchors"][0]
    case["anchors"] = centre + 1e-7 * torch.randn(300, 24)
    case["gen"] = torch.nn.functional.normalize(centre + 1e-3 * torch.randn(2, 3, 24), dim=-1)
    found = score(case, WEIGHTS["max"], backend="triton")
    assert_same(found, score(case, WEIGHTS["max"], backend="reference"), 1e-6)
    norm = AnchorBank(case["anchors"], torch.zeros(300, 2), 0, 300, "", "", "target").largest_norm()
    monkeypatch.setattr(stream, "norm_bound", None)
    again = score(case | {"largest_norm": norm}, WEIGHTS["max"], backend="triton")
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_states_of_parts_merge_into_the_whole(kind: str) -> None:
    """Three parts, one of them without a single negative for the first item."""
    weights = WEIGHTS[kind]
    case = make_case(2, 3, 16, 900, positives=weights.positives, ties=True)
    case["positive"] = torch.tensor([10, 310])
    case["negatives_mask"][0, 300:600] = False
    want = score(case, weights, backend="reference")

    rows = case["gen"].flatten(0, 1)
    similarities, norms = stream.own_similarities(ENGINE, rows, case["anchors"], case["positive"], weights, False)
    parts = [stream.initial_state(rows, weights) for _ in range(3)]
    for first, part in zip((0, 300, 600), parts, strict=True):
        here, place = slice(first, first + 300), case["positive"] - first
        anchors, mask = case["anchors"][here], case["negatives_mask"][:, here]
        stream.scan(ENGINE, rows, norms, similarities, anchors, place, mask, weights, part, exact=False)
    state = stream.initial_state(rows, weights)
    ENGINE.merge(torch.stack(parts), state, weights)
    disc, into = case["disc_similarity"][:, None], torch.empty(2, 2, 3).unbind()
    planes = ENGINE.finish(state, similarities, case["format_ok"], case["lengths"], disc, weights, *into)
    assert all(torch.equal(buffer, plane) for buffer, plane in zip(into, planes, strict=False))
    got = dict(zip(("reward", "advantage"), planes, strict=False))
    torch.testing.assert_close(got["reward"], want["reward"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["advantage"], want["advantage"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("capability", [90, *(pytest.param(sm, marks=pytest.mark.slow) for sm in (80, 100))])
def test_compiles_without_spills(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/ops/compile_reward_triton.py"), str(capability)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 9
    for line in lines:
        assert line["local"] == 0, line
        assert line["shared"] <= 48 << 10, line
