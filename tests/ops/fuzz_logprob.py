"""Fuzzed calls of fused_logprob_pool and fused_linear_ce."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.ops.logprob_pool import fused_linear_ce, fused_logprob_pool
from tests.ops.fuzz_inputs import DTYPES, LAYOUTS, assert_refused, assert_rule_by_row, laid_out

TABLE: dict[str, tuple[Any, ...]] = {
    "rows": (3, 0, 1, 2, 7, 16, 17, 40, 129),
    "width": (4, 1, 2, 7, 16, 33, 64),
    "vocabulary": (5, 1, 2, 3, 16, 17, 31, 64, 130, 517),
    "dtype": DTYPES,
    "backend": ("auto", "reference", "chunked", "triton"),
    "schedule": ("per token", "summed", "summed and per token"),
    "scored": ("some", "all", "one", "none"),
    "spread": (1.0, 0.0, 5.0, 15.0),
    "temperature": (1.0, 0.7, 0.05, 20.0),
    "temperature_as": ("number", "tensor", "trained", "trained fp64"),
    "softcap": (None, 30.0, 2.0, 0.1),
    "bias": (None, "own dtype", "fp32", "banned"),
    "ignore_index": (-100, -1, 0, 10**9),
    "index": (torch.int64, torch.int32),
    "entropy": (False, True),
    "normalize": (True, False),
    "pools": ("none", "rows", "spans", "both", "empty"),
    "weight": ("none", "signed", "zero", "trained", "bf16"),
    "max_scored": (None, "exact", "rows"),
    "trained": ("all", "hidden", "head", "none"),
    "layout": LAYOUTS,
    "autocast": (False, True),
    "factor": (1.0, -0.3, 0.0, 1e4),
    "not_finite": (None, *(None,) * 8, "nan scored", "inf scored", "nan ignored", "nan read out"),
    "wrong": (
        None,
        *(None,) * 20,
        "target",
        "temperature",
        "softcap",
        "bias",
        "pool",
        "span",
        "weight",
        "width",
        "dtype",
    ),
}


def _inputs(o: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a call, in the dtypes and layouts it is made with."""
    g = torch.Generator().manual_seed(o["seed"])
    T, H, V, dtype = o["rows"], o["width"], o["vocabulary"], o["dtype"]
    if o["backend"] == "triton":
        T, H, V = min(T, 17), min(H, 33), min(V, 64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ignore = o["ignore_index"]
    targets = torch.randint(0, V, (T,), generator=g)
    kept = {"some": torch.rand(T, generator=g) < 0.5, "all": torch.ones(T), "none": torch.zeros(T)}.get(o["scored"])
    targets[(torch.arange(T) != T // 2) if kept is None else ~kept.bool()] = ignore
    t: dict[str, Any] = {"targets": targets.to(o["index"])}
    hidden = normal(T, H)
    pools: dict[str, Any] = {}
    if T and o["pools"] in ("rows", "both"):
        pools["rows"] = torch.randint(0, T, (3,), generator=g)
    if T and o["pools"] in ("spans", "both"):
        starts = torch.randint(0, T, (4,), generator=g)
        pools["spans"] = starts, starts + 1 + (torch.rand(4, generator=g) * (T - starts)).long().clamp_max(T)
        pools["spans"] = starts, pools["spans"][1].clamp_max(T)
    if o["pools"] == "empty":
        pools["none"] = torch.zeros(0, dtype=torch.int64)
    scored = targets != ignore
    if o["not_finite"] and T:
        at = {"nan ignored": ~scored, "nan read out": torch.ones(T).bool()}.get(o["not_finite"], scored).nonzero()
        if len(at):
            hidden[at[0, 0], 0] = torch.inf if "inf" in o["not_finite"] else torch.nan
    t["hidden"] = laid_out(hidden.to(dtype), o["layout"])
    t["lm_head"] = laid_out((normal(V, H) * o["spread"] / H**0.5).to(dtype), o["layout"])
    t["bias"] = None if o["bias"] is None else normal(V).to(dtype if o["bias"] == "own dtype" else torch.float32)
    if o["bias"] == "banned":  # but no target
        t["bias"][~torch.isin(torch.arange(V), targets) & (torch.rand(V, generator=g) < 0.5)] = -torch.inf
    wide = torch.float64 if o["temperature_as"] == "trained fp64" else torch.float32
    t["temperature"] = (
        o["temperature"] if o["temperature_as"] == "number" else torch.tensor(o["temperature"], dtype=wide)
    )
    weight = {"none": None, "zero": torch.zeros(T)}.get(o["weight"], torch.randn(T, generator=g))
    t["weight"] = weight.bfloat16() if o["weight"] == "bf16" and weight is not None else weight
    t["pools"] = pools
    t["cotangents"] = {name: normal(T) for name in ("logp", "entropy")}
    t["cotangents"] |= {name: normal(len(p[0] if isinstance(p, tuple) else p), H) for name, p in pools.items()}
    return t


def _trained(o: dict[str, Any], t: dict[str, Any]) -> dict[str, Tensor]:
    names = {"all": ("hidden", "lm_head", "bias"), "hidden": ("hidden",), "head": ("lm_head",), "none": ()}[
        o["trained"]
    ]
    if o["temperature_as"].startswith("trained") and o["trained"] != "none":
        names += ("temperature",)
    if o["weight"] == "trained" and o["trained"] != "none" and o["schedule"] != "per token":
        names += ("weight",)
    return {name: t[name] for name in names if t[name] is not None}


def _backward(
    o: dict[str, Any], t: dict[str, Any], leaves: dict[str, Tensor], found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The outputs, and the gradients of their sum with the cotangents as weights."""
    total = torch.zeros((), dtype=torch.float64)
    if "loss" in found:
        total = total + found["loss"].double() * o["factor"]
    for name, value in found.items():
        if name in t["cotangents"] and (name not in ("logp", "entropy") or o["schedule"] != "summed"):
            weight, value = t["cotangents"][name], value.double()
            total = total + torch.where(weight == 0, 0, weight * value).sum()
    result = {name: value.detach() for name, value in found.items()}
    if leaves and total.requires_grad:
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            result[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return result


def _fused(o: dict[str, Any], t: dict[str, Any]) -> dict[str, Tensor]:
    t = dict(t)
    leaves = {name: value.detach().requires_grad_() for name, value in _trained(o, t).items()}
    t |= leaves
    scored = int((t["targets"] != o["ignore_index"]).sum())
    bound = {None: None, "exact": scored, "rows": o["rows"] + 3}[o["max_scored"]]
    options = {name: o[name] for name in ("softcap", "ignore_index", "entropy", "normalize", "backend")}
    options |= {"pools": t["pools"] or None, "bias": t["bias"], "temperature": t["temperature"], "max_scored": bound}
    args = t["hidden"], t["lm_head"], t["targets"]
    with torch.autocast("cpu", torch.bfloat16) if o["autocast"] else nullcontext():
        if o["schedule"] == "per token":
            out, found = fused_logprob_pool(*args, **options), {}
        else:
            loss, out = fused_linear_ce(*args, token_weight=t["weight"], **options)
            found = {"loss": loss}
    found |= {"logp": out.logp, **out.embeddings}
    if out.entropy is not None:
        found["entropy"] = out.entropy
    return _backward(o, t, leaves, found)


def _plain(o: dict[str, Any], t: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same in plain torch with full logits, and how large the terms are that each value is summed from."""
    t = dict(t)
    if dtype == torch.float64:
        t |= {
            name: value.double() for name, value in t.items() if isinstance(value, Tensor) and value.is_floating_point()
        }
    leaves = {name: value.detach().clone().requires_grad_() for name, value in _trained(o, t).items()}
    t |= leaves
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    targets, cap = t["targets"].long(), o["softcap"]
    scored = (targets != o["ignore_index"]).nonzero().squeeze(1)
    x, head = t["hidden"][scored].to(wide), t["lm_head"].to(wide)
    s = F.linear(x, head).to(dtype).to(wide)  # what a product in 16 bits gives; oneDNN compiles one for every shape
    if t["bias"] is not None:
        s = s + t["bias"].to(wide)
    if cap:
        s = cap * torch.tanh(s / cap)
    banned = s == -torch.inf
    z = (s.masked_fill(banned, 0.0) / torch.as_tensor(t["temperature"], dtype=wide)).masked_fill(banned, -torch.inf)
    log_p = z - z.logsumexp(1, keepdim=True)
    rows = torch.zeros(len(targets), dtype=wide)
    logp = rows.index_put((scored,), log_p.gather(1, targets[scored, None]).squeeze(1))
    found = {"logp": logp}
    if o["schedule"] != "per token":
        weight = torch.ones(len(targets)) if t["weight"] is None else t["weight"]
        found["loss"] = -(weight[scored].to(wide) * logp[scored]).sum()
    if o["entropy"]:
        terms = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)
        found["entropy"] = rows.index_put((scored,), -terms.sum(1))
    for name, pool in t["pools"].items():
        starts, ends = pool if isinstance(pool, tuple) else (pool, pool + 1)
        spans = [t["hidden"][a:b].to(wide).mean(0) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        e = torch.stack(spans) if spans else torch.zeros(0, t["hidden"].shape[1], dtype=wide)
        found[name] = F.normalize(e, dim=1) if o["normalize"] else e
    return _backward(o, t, leaves, found), _sizes(o, t, z.detach(), scored) if dtype == torch.float64 else {}


def _sizes(o: dict[str, Any], t: dict[str, Any], z: Tensor, scored: Tensor) -> dict[str, float]:
    """Norms of the absolute terms behind each value: a logit is rounded in fp32, then exponentiated and subtracted."""
    good = t["hidden"].detach()[scored].isfinite().all(1)
    scored, z = scored[good], z[good]
    if not len(scored):
        return {}
    tau = float(torch.as_tensor(t["temperature"]).detach())
    x, head = t["hidden"].detach()[scored].abs(), t["lm_head"].detach().abs()
    bias = 0.0 if t["bias"] is None else t["bias"].detach().abs().masked_fill(t["bias"].detach().isinf(), 0.0)
    size = (x @ head.T + bias) / tau  # [M, V]
    p = torch.softmax(z, 1)
    log_p = torch.log_softmax(z, 1).masked_fill(p == 0, 0.0)
    one_hot = F.one_hot(t["targets"].long()[scored], z.shape[1])
    row = size.amax(1, keepdim=True)
    upstream = torch.zeros(len(scored), 1, dtype=torch.float64)
    if o["schedule"] != "per token":
        weight = torch.ones(len(t["targets"])) if t["weight"] is None else t["weight"].detach()
        upstream += abs(o["factor"]) * weight[scored, None].abs()
    of_entropy = torch.zeros_like(upstream)
    if o["schedule"] != "summed":
        upstream += t["cotangents"]["logp"][scored, None].abs()
        of_entropy = t["cotangents"]["entropy"][scored, None].abs() * (1.0 if o["entropy"] else 0.0)
    slope = upstream * (p * (1 + row) + one_hot * (1 + row * p))
    slope = slope + of_entropy * p * (1 + row) * (log_p.abs() + 1)
    sizes = {
        "logp": row.norm(),
        "entropy": (row * (1 + row)).norm(),
        "loss": (upstream * row).sum(),
        "gradient of hidden": (slope @ head).norm() / tau,
        "gradient of lm_head": (slope.T @ x).norm() / tau,
        "gradient of temperature": (slope * size).sum() / tau,
        "gradient of bias": slope.sum(0).norm() / tau,
        "gradient of weight": row.norm() * abs(o["factor"]),
    }
    return {name: float(value) for name, value in sizes.items()}


def check(o: dict[str, Any]) -> str:
    """One call held to the rule; "refused" where it had to be and was."""
    o = dict(o)
    if o["dtype"] == torch.float64:
        o["autocast"] = False  # which leaves fp64 alone
        o["backend"] = "auto" if o["backend"] != "reference" else "reference"  # the only one that takes it
    t = _inputs(o)
    if o["wrong"]:
        return _refused(o, t)
    if o["autocast"]:
        t |= {name: t[name].bfloat16() for name in ("hidden", "lm_head")}
        o["dtype"] = torch.bfloat16
    truth, sizes = _plain(o, t, torch.float64)
    eager, _ = _plain(o, t, o["dtype"])
    found = _fused(o, t)
    assert found.keys() == truth.keys(), f"{sorted(found)}, expected {sorted(truth)}"
    whole = ("gradient of lm_head", "gradient of bias", "gradient of temperature", "loss")
    if o["not_finite"] == "inf scored" and "gradient of hidden" in truth:  # of that row: NaN or nothing, by the sign
        good = t["hidden"].isfinite().all(1)
        for results in (truth, eager, found):
            results["gradient of hidden"] = results["gradient of hidden"][good]
    # A row whose every logit is -inf: its logp is NaN, and plain torch masks what temperature and bias get of it.
    if o["not_finite"] == "inf scored" and not truth["logp"].isfinite().all():
        for name in ("gradient of temperature", "gradient of bias"):
            if name in truth and truth[name].isfinite().all():
                del truth[name]
    for name, value in truth.items():
        if name in whole and not value.isfinite().all():  # a sum over rows of which one is not finite
            assert not found[name].isfinite().all(), f"{name} is finite"
            continue
        assert_rule_by_row(name, found[name], eager[name], value, o["dtype"], sizes.get(name, 0.0))
    return "right"


def _refused(o: dict[str, Any], t: dict[str, Any]) -> str:
    what, (rows, width) = o["wrong"], t["hidden"].shape
    o = o | {"pools": "none", "max_scored": None}
    vocabulary, index = t["lm_head"].shape[0], torch.tensor([0])
    outside = vocabulary + (o["ignore_index"] == vocabulary)
    changes: dict[str, dict[str, Any]] = {
        "target": {"targets": torch.full((rows,), outside)} if rows else {"targets": torch.zeros(1).long()},
        "temperature": {"temperature": [0.0, -1.0, torch.nan, torch.tensor(-0.5), True, "1"][o["seed"] % 6]},
        "bias": {"bias": torch.zeros(vocabulary + 1)},
        "pool": {"pools": {"p": torch.tensor([[rows], [-1]][o["seed"] % 2])}},
        "span": {"pools": {"p": (index, index)}},
        "weight": {"weight": torch.zeros(rows + 1)},
        "width": {"lm_head": torch.zeros(vocabulary, width + 1, dtype=o["dtype"])},
        "dtype": {"hidden": torch.zeros(rows, width, dtype=torch.int64)},
    }
    if what == "softcap":
        o["softcap"] = [0.0, -2.0, torch.inf, torch.tensor(1.0)][o["seed"] % 4]
    if what == "weight":
        o["schedule"] = "summed"
    assert_refused(lambda: _fused(o | {"trained": "none"}, t | changes.get(what, {})))
    return "refused"
