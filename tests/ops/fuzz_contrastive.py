"""Fuzzed calls of contrastive_loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.ops.contrastive import ContrastiveOutput, contrastive_loss
from rime_fast.ops.contrastive.problem import SAME_SIMILARITY
from tests.ops.contrastive_cases import RIME_TERMS, Case, make_case, slopes
from tests.ops.fuzz_inputs import DTYPES, LAYOUTS, assert_refused, assert_rule_by_row, laid_out

TABLE: dict[str, tuple[Any, ...]] = {
    "n": (3, 1, 2, 4, 7, 16, 17, 33),
    "hard": (0, 1, 2, 19),
    "d": (4, 1, 2, 3, 8, 17, 64),
    "dtype": DTYPES,
    "backend": ("auto", "reference", "chunked", "triton"),
    "terms": (
        [("disc", "disc", 1.0)],
        RIME_TERMS,
        [("gen", "disc", -0.5), ("disc", "disc", 0.0)],
        [("gen", "gen", 100.0)],
    ),
    "labels": ("own", "shuffled", 2, 3, 7),
    "peaked": (False, True),
    "rows": ("unit", "long", "a zero row", "twins", "one direction"),
    "ids": (False, True),
    "margin": (None, 0.0, 0.1, -0.2, 5.0),
    "symmetric": (True, False),
    "dims": (None, "all", "few", "one"),
    "dim_weights": (None, "some"),
    "temperature": (0.2, 0.05, 1.0, 20.0),
    "temperature_as": ("number", "tensor", "trained", "trained fp64"),
    "trained": ("all", "queries", "keys", "none"),
    "layout": LAYOUTS,
    "not_finite": (None, *(None,) * 10, "queries", "keys"),
    "wrong": (None, *(None,) * 20, "label", "temperature", "ids", "mode", "width", "dims", "dtype", "margin", "rows"),
}


def _case(o: dict[str, Any]) -> Case:
    n, d, g = o["n"], o["d"], torch.Generator().manual_seed(o["seed"])
    several = o["labels"] if isinstance(o["labels"], int) else 1
    options = {name: o[name] for name in ("peaked", "ids", "margin", "symmetric", "dtype", "seed")}
    case = make_case(n, n + o["hard"], d, shuffled=o["labels"] == "shuffled", positives=several, **options)
    case.terms, case.temperature = list(o["terms"]), o["temperature"]
    for side in (case.queries, case.keys):
        for mode, rows in side.items():
            if o["rows"] == "long":
                side[mode] = rows * 3
            elif o["rows"] == "a zero row":
                rows[0] = 0
            elif o["rows"] == "twins":
                rows[-1] = rows[0]
            elif o["rows"] == "one direction":
                side[mode] = F.normalize(rows[:1] + 0.05 * rows, dim=1)
            side[mode] = side[mode].to(o["dtype"]).double()
    if o["dims"]:
        few = sorted({1, (d + 1) // 2, d})
        case.settings["dims"] = {"all": list(range(1, min(d, 9) + 1)), "few": few, "one": [d]}[o["dims"]]
        if o["dim_weights"]:
            case.settings["dim_weights"] = torch.rand(len(case.settings["dims"]), generator=g).tolist()
    return case


def _run(o: dict[str, Any], case: Case, dtype: torch.dtype, backend: str, layout: str = "contiguous") -> dict[str, Any]:
    """Outputs and gradients by name."""

    def leaves(side: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        ask = o["trained"] in ("all", name)
        return {m: laid_out(v.to(dtype), layout).detach().requires_grad_(ask) for m, v in side.items()}

    queries, keys = leaves(case.queries, "queries"), leaves(case.keys, "keys")
    temperature: float | Tensor = case.temperature
    if o["temperature_as"] != "number":
        wide = torch.float64 if dtype == torch.float64 or "fp64" in o["temperature_as"] else torch.float32
        temperature = torch.tensor(temperature, dtype=wide, requires_grad="trained" in o["temperature_as"])
    out = contrastive_loss(queries, keys, terms=case.terms, temperature=temperature, backend=backend, **case.settings)
    found: dict[str, Any] = {"out": out, "loss": out.loss.detach()}
    found |= {name: value.detach() for name, value in out.per_term.items()}
    found |= {f"width {width}": value.detach() for width, value in out.per_dim.items()}
    every = {f"queries[{m}]": v for m, v in queries.items()} | {f"keys[{m}]": v for m, v in keys.items()}
    every |= {"temperature": temperature} if isinstance(temperature, Tensor) else {}
    asked = {name: value for name, value in every.items() if value.requires_grad}
    if asked:
        grads = torch.autograd.grad(out.loss, list(asked.values()), allow_unused=True)
        found |= {f"gradient of {name}": grad for name, grad in zip(asked, grads, strict=True) if grad is not None}
    return found


def _close_calls(case: Case, dtype: torch.dtype) -> tuple[set[Any], bool]:
    """(terms whose hit@1 hangs on a rounding, True if a candidate lies on the margin's edge), from fp64."""
    ties: set[Any] = set()
    edge = False
    labels = case.settings.get("labels")
    for query_mode, key_mode, _ in case.terms:
        for width in case.settings.get("dims") or [None]:
            q, k = case.queries[query_mode], case.keys[key_mode]
            if width is not None:
                q, k = F.normalize(q[:, :width], dim=1), F.normalize(k[:, :width], dim=1)
            at = torch.arange(len(q))[:, None] if labels is None else labels.view(len(q), -1)
            s, own = q @ k.T, (at[:, :, None] == torch.arange(len(k))).any(1)
            norms = q.norm(dim=1)[:, None] * k.norm(dim=1)
            # with dims the call's rows are normalised in its own dtype
            rounding = 3e-6 if width is None else max(3e-6, 2 * torch.finfo(dtype).eps)
            near = rounding * (norms.clamp_min(1e-12) + s.abs().amax())
            positive = s.masked_fill(~own, -torch.inf)
            if bool((((s - positive.amax(1, keepdim=True)).abs() < near) & ~own).any()):
                ties |= {f"{query_mode}-{key_mode}", (f"{query_mode}-{key_mode}", width)}
            if (margin := case.settings["margin"]) is not None:
                above = positive + SAME_SIMILARITY * norms + margin
                for best in (above.amax(1, keepdim=True), above.amax(0, keepdim=True)):
                    edge |= bool(((s - best).abs() < near).any())
    return ties, edge


def check(o: dict[str, Any]) -> str:
    """One call held to the rule; "refused" where it had to be and was; "on the edge" where rounding decides."""
    o = dict(o)
    if o["backend"] == "triton":
        o |= {"n": min(o["n"], 7), "hard": min(o["hard"], 2), "dims": None, "d": min(o["d"], 17)}
        o["dtype"] = torch.float32 if o["dtype"] == torch.float64 else o["dtype"]
    case = _case(o)
    if o["wrong"]:
        return _refused(o, case)
    if o["not_finite"]:
        return _named(o, case)
    ties, edge = _close_calls(case, o["dtype"])
    if edge:
        return "on the edge"
    truth = _run(o, case, torch.float64, "reference")
    eager = _run(o, case, o["dtype"], "reference")
    found = _run(o, case, o["dtype"], o["backend"], o["layout"])
    assert found.keys() == truth.keys(), f"{sorted(found)}, expected {sorted(truth)}"
    sizes = _sizes(case)
    for name, value in truth.items():
        if name == "out":
            _same_hits(found[name], value, ties)
            continue
        absolute = sizes.get(name, sizes["loss"])
        values = found[name], eager[name], value
        if o["rows"] == "a zero row" and o["dims"] and value.dim() == 2:  # its slope is rounding times 1e12 a width
            values = found[name][1:], eager[name][1:], value[1:]
        assert_rule_by_row(name, *values, o["dtype"], absolute)
    return "right"


def _sizes(case: Case) -> dict[str, float]:
    """Norms of the absolute terms behind each value: a similarity is rounded in fp32, then exponentiated."""
    every = slopes(case)
    largest = max(float((one.queries @ one.keys.T).abs().max()) for one in every) / case.temperature
    sizes = {"loss": largest * sum(abs(weight) for _, _, weight in case.terms)}
    sides = {f"gradient of queries[{m}]": torch.zeros_like(v) for m, v in case.queries.items()}
    sides |= {f"gradient of keys[{m}]": torch.zeros_like(v) for m, v in case.keys.items()}
    # A slope is a difference of shares, each rounded with its logit: where they cancel, their size is what rounds.
    share = min((abs(weight) for _, _, weight in case.terms if weight), default=0.0) / case.temperature
    for one in every:
        slope = one.slope.abs().clamp_min(share / one.slope.numel()) * (1 + largest)
        (q, k), width = one.modes, one.queries.shape[1]
        scale = [1.0, 1.0]
        if case.settings.get("dims"):  # each row is divided by its norm, and what lies along it taken out
            scale = [
                2 / v[:, :width].norm(dim=1, keepdim=True).clamp_min(1e-12) for v in (case.queries[q], case.keys[k])
            ]
        sides[f"gradient of queries[{q}]"][:, :width] += slope @ one.keys.abs() * scale[0]
        sides[f"gradient of keys[{k}]"][:, :width] += slope.T @ one.queries.abs() * scale[1]
    sizes |= {name: float(value.norm()) for name, value in sides.items()}
    products = [(one.slope * (one.queries @ one.keys.T)).abs().sum() for one in every]
    return sizes | {"gradient of temperature": float(sum(products)) * (1 + largest) / case.temperature}


def _same_hits(found: ContrastiveOutput, truth: ContrastiveOutput, ties: set[Any]) -> None:
    assert found.accuracy.keys() == truth.accuracy.keys()
    for name, exact in truth.accuracy.items():
        if name not in ties:
            assert abs(float(found.accuracy[name]) - float(exact)) < 1e-6, f"accuracy of {name}"


def _named(o: dict[str, Any], case: Case) -> str:
    """NaN or Inf in a row is an error that names its side, mode and row."""
    mode = {"queries": case.terms[0][0], "keys": case.terms[0][1]}[o["not_finite"]]
    rows = {"queries": case.queries, "keys": case.keys}[o["not_finite"]][mode]
    at = o["seed"] % len(rows)
    rows[at, 0] = [torch.nan, torch.inf, -torch.inf][o["seed"] % 3]
    with pytest.raises(ValueError, match=rf"{o['not_finite']}\[.{mode}.\].* {at}\b"):
        _run(o, case, o["dtype"], o["backend"], o["layout"])
    return "refused"


def _refused(o: dict[str, Any], case: Case) -> str:
    what, n, k = o["wrong"], len(case.queries["disc"]), len(case.keys["disc"])
    case.settings |= {"margin": None, "labels": torch.arange(n)}
    few = {"disc": torch.zeros(max(n - 1, 0), o["d"]).double()}
    if what == "label":
        case.settings["labels"] = torch.full((n,), [k, -1][o["seed"] % 2])
    elif what == "ids":
        case.settings |= {"query_ids": torch.arange(n), "key_ids": None}
    elif what == "mode":
        case.terms = [("disc", "nobody", 1.0)]
    elif what == "dims":
        case.settings["dims"] = [[o["d"] + 1], [0], [], [2, 1]][o["seed"] % 4]
    elif what == "margin":
        case.settings["margin"] = [torch.nan, "0.1", True][o["seed"] % 3]
    elif what == "width":
        case.keys = {m: F.pad(v, (0, 1)) for m, v in case.keys.items()}
    elif what == "rows":
        case.queries |= few
        case.terms = list(RIME_TERMS)
    elif what == "temperature":
        case.temperature = [0.0, -1.0, torch.nan, torch.inf][o["seed"] % 4]
    elif what == "dtype":
        case.queries = {m: v.round().long() for m, v in case.queries.items()}
        assert_refused(lambda: contrastive_loss(case.queries, case.keys, terms=case.terms, backend=o["backend"]))
        return "refused"
    assert_refused(lambda: _run(o | {"trained": "none"}, case, o["dtype"], o["backend"]))
    return "refused"
