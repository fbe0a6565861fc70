"""Fuzzed calls of score_rewrites_: ranks and hits exactly those of the fp64 reference, the rest to fp32's rounding."""

from __future__ import annotations

from typing import Any

import torch

from rime_fast.ops import native
from rime_fast.ops.reward import TERM_NAMES, RewardWeights, score_rewrites_
from tests.ops.fuzz_inputs import DTYPES, LAYOUTS, assert_refused, laid_out
from tests.ops.reward_cases import Case, make_case

TABLE: dict[str, tuple[Any, ...]] = {
    "items": (2, 1, 3, 7, 16),
    "group": (2, 1, 3, 8),
    "width": (4, 1, 2, 3, 17, 64),
    "anchors": (5, 1, 2, 16, 33, 130, 700),
    "dtype": DTYPES,
    "anchors_dtype": ("same", "other"),
    "backend": ("auto", "reference", "chunked", "triton"),
    "mode": ("anchor", "ume_r1"),
    "rank_reward": ("1/log2(1+rank)", "1/rank", "hit"),
    "hit_k": (1, 3),
    "negative": ("mean", "softmax", "max"),
    "softmax_temperature": (0.5, 0.02),
    "normalize_std": (True, False),
    "spread": (0.3, 0.0, 3.0),
    "ties": (False, True),
    "masked": ("none", "some", "all"),
    "lengths": (None, "int", "float"),
    "disc": (None, "item", "rollout"),
    "weights": ("default", "signed", "zero"),
    "layout": LAYOUTS,
    "buffers": ("own", "columns of one", "transposed"),
    "terms": ("all", "none", "some"),
    "missing": (None, "rollout", "inf rollout", "anchor", "own anchor", "every rollout"),
    "wrong": (None, *(None,) * 20, "positive", "format", "anchors", "mask", "buffer", "lengths", "term", "overlap"),
}


def _case(o: dict[str, Any]) -> Case:
    positives = o["group"] if o["mode"] == "ume_r1" else 1
    case = make_case(
        o["items"], o["group"], o["width"], max(o["anchors"], positives), positives=positives, spread=o["spread"],
        ties=o["ties"], masked=o["masked"] != "none", dtype=o["dtype"], seed=o["seed"],
    )  # fmt: skip
    if o["masked"] == "all":
        case["negatives_mask"].zero_()
    if o["anchors_dtype"] == "other":
        case["anchors"] = case["anchors"].to(DTYPES[(DTYPES.index(o["dtype"]) + 1) % 3])
    case["lengths"] = {None: None, "int": case["lengths"], "float": case["lengths"] + 0.5}[o["lengths"]]
    if o["disc"] is None:
        case["disc_similarity"] = None
    elif o["disc"] == "rollout":
        case["disc_similarity"] = case["disc_similarity"][:, None].expand(-1, o["group"])
    at = o["seed"] % o["items"]
    if o["missing"] == "every rollout":
        case["gen"][:] = torch.nan
    elif o["missing"] in ("rollout", "inf rollout"):
        case["gen"][at, 0, 0] = torch.nan if o["missing"] == "rollout" else torch.inf
    elif o["missing"]:
        row = int(case["positive"][at]) if o["missing"] == "own anchor" else o["seed"] % len(case["anchors"])
        case["anchors"][row, -1] = torch.nan
    return case | {name: laid_out(case[name], o["layout"]) for name in ("gen", "anchors")}


def _weights(o: dict[str, Any]) -> RewardWeights:
    numbers = {"default": (1.0, 1.0, 1.0, 0.1), "signed": (0.5, -2.0, 0.3, 1.0), "zero": (0.0,) * 4}[o["weights"]]
    options = {name: o[name] for name in ("mode", "rank_reward", "hit_k", "negative", "softmax_temperature")}
    positives = o["group"] if o["mode"] == "ume_r1" else 1
    return RewardWeights(*numbers, positives=positives, normalize_std=o["normalize_std"], **options)


def _score(o: dict[str, Any], case: Case, backend: str) -> dict[str, torch.Tensor]:
    """What is written, by name; whatever lies beside the buffers must stay."""
    names = {"all": TERM_NAMES, "none": (), "some": ("hit", "rank")}[o["terms"]]
    every = ("reward", "advantage", *names)
    shape = case["format_ok"].shape
    if o["buffers"] == "columns of one":
        ground = torch.full((*shape, 2 * len(every)), torch.nan)
        out = {name: ground[..., 2 * i] for i, name in enumerate(every)}
        beside = [ground[..., 1::2]]
    elif o["buffers"] == "transposed":
        out, beside = {name: torch.full(shape[::-1], torch.nan).T for name in every}, []
    else:
        out, beside = {name: torch.full(shape, torch.nan) for name in every}, []
    terms = {name: out[name] for name in names} or None
    score_rewrites_(out["reward"], out["advantage"], terms=terms, weights=_weights(o), backend=backend, **case)
    assert all(bool(one.isnan().all()) for one in beside), "memory beside a buffer was written"
    return out


def check(o: dict[str, Any]) -> str:
    """One call against the reference; "refused" where it had to be and was."""
    o = dict(o)
    if o["backend"] == "triton":
        o |= {"anchors": min(o["anchors"], 33), "items": min(o["items"], 3)}
        o["dtype"] = torch.float32 if o["dtype"] == torch.float64 else o["dtype"]
    if o["backend"] == "chunked" and (o["dtype"] == torch.float64 or not native.available()):
        o["backend"] = "auto"  # chunked refuses fp64 by name, and needs csrc
    case = _case(o)
    if o["wrong"]:
        return _refused(o, case)
    exact = {name: case[name].double() for name in ("gen", "anchors")}
    truth = _score(o | {"terms": "all", "buffers": "own"}, case | exact, "reference")
    found = _score(o, case, o["backend"])
    for name, value in found.items():
        want = truth[name]
        bound = 0.0 if name in ("rank", "hit", "format", "length", "nan") else 2e-6
        if name == "advantage" and o["normalize_std"]:  # a small spread makes the rounding of the rewards large
            bound = bound * (1 + 1 / (truth["group_std"] + 1e-4))
        wrong = (value - want).abs() > bound * (1 + want.abs())
        assert not bool((wrong | value.isnan()).any()), f"{name}: {value[wrong]} for {want[wrong]}"
    return "right"


def _refused(o: dict[str, Any], case: Case) -> str:
    what, (items, group) = o["wrong"], case["format_ok"].shape
    anchors = len(case["anchors"])
    buffer = torch.zeros(items, group)
    call: dict[str, Any] = {"rewards": buffer, "advantages": buffer.clone(), "weights": _weights(o), **case}
    changes: dict[str, dict[str, Any]] = {
        "positive": {"positive": torch.full((items,), [anchors, -1][o["seed"] % 2])},
        "format": {"format_ok": torch.ones(items, group)},
        "anchors": {"anchors": [case["anchors"][:0], case["anchors"][:, 1:], case["anchors"].long()][o["seed"] % 3]},
        "mask": {"negatives_mask": torch.ones(items, anchors + 1, dtype=torch.bool)},
        "buffer": {"rewards": [buffer.double(), buffer[:, 1:]][o["seed"] % 2]},
        "lengths": {"lengths": torch.ones(items + 1, group)},
        "term": {"terms": {"hits": buffer.clone()}},
        "overlap": {"advantages": buffer},
    }
    assert_refused(lambda: score_rewrites_(**(call | changes[what]), backend=o["backend"]))
    return "refused"
