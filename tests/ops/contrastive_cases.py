"""Data and error measures shared by the tests of the contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.ops.contrastive import ContrastiveOutput, contrastive_loss
from tests.ops.error_rule import assert_rule, relative

__all__ = ["RIME_TERMS", "Case", "Result", "check_rule", "make_case", "relative", "run"]

RIME_TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]


@dataclass
class Case:
    """Embeddings in fp64 that are exact in ``dtype``, and the settings of one call."""

    queries: dict[str, Tensor]
    keys: dict[str, Tensor]
    temperature: float
    settings: dict[str, Any] = field(default_factory=dict)
    terms: list[tuple[str, str, float]] = field(default_factory=lambda: list(RIME_TERMS))

    @property
    def device(self) -> torch.device:
        return next(iter(self.queries.values())).device


@dataclass
class Result:
    """temperature_terms: of the fp64 reference, the sum of the absolute terms of the temperature's gradient."""

    out: ContrastiveOutput
    gradients: dict[str, Tensor]
    temperature_terms: float = 0.0


def make_case(
    n: int,
    k: int,
    d: int,
    *,
    seed: int = 0,
    temperature: float = 0.05,
    peaked: bool = False,
    ids: bool = False,
    margin: float | None = None,
    symmetric: bool = True,
    shuffled: bool = False,
    positives: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """shuffled: random labels (some shared) instead of key i; peaked: positives close to their queries.

    positives > 1: up to so many a query, in any of its columns, -1 in the others.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Tensor:
        return F.normalize(torch.randn(count, d, generator=generator, dtype=torch.float64), dim=-1)

    labels = torch.randint(0, k, (n,), generator=generator) if shuffled else torch.arange(n)
    queries, keys = {m: rows(n) for m in ("disc", "gen")}, {m: rows(k) for m in ("disc", "gen")}
    if peaked:
        queries = {m: F.normalize(keys[m][labels] + 0.1 * q, dim=-1) for m, q in queries.items()}
    settings: dict[str, Any] = {"symmetric": symmetric, "margin": margin}
    if shuffled:
        settings["labels"] = labels
    if positives > 1:
        settings["labels"] = several_labels(labels, k, positives, generator)
    if ids:
        classes = max(2, n // 2)
        settings["query_ids"] = torch.randint(0, classes, (n,), generator=generator) * 2**40
        settings["key_ids"] = torch.randint(0, classes, (k,), generator=generator) * 2**40
    exact = [{m: v.to(dtype).double() for m, v in side.items()} for side in (queries, keys)]
    return Case(exact[0], exact[1], temperature, settings)


def several_labels(first: Tensor, k: int, positives: int, generator: torch.Generator) -> Tensor:
    """[N, positives]: ``first`` and further keys, none twice, some left out, columns shuffled."""
    n = first.shape[0]
    order = torch.rand(n, k, generator=generator).scatter(1, first[:, None], -1.0).argsort(1)[:, :positives]
    order = F.pad(order, (0, positives - order.shape[1]), value=-1)
    keep = torch.rand(n, positives, generator=generator) < 0.6
    keep[:, 0] = True
    labels = torch.where(keep, order, -1)
    return labels.gather(1, torch.rand(n, positives, generator=generator).argsort(1))


def run(case: Case, dtype: torch.dtype, backend: str, **changes: Any) -> Result:
    """Loss, and the gradients of every input and of the temperature."""
    queries = {m: v.detach().to(dtype, copy=True).requires_grad_() for m, v in case.queries.items()}
    keys = {m: v.detach().to(dtype, copy=True).requires_grad_() for m, v in case.keys.items()}
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    device = next(iter(queries.values())).device
    temperature = torch.tensor(case.temperature, dtype=precision, device=device, requires_grad=True)
    settings = {**case.settings, **changes}
    out = contrastive_loss(queries, keys, terms=case.terms, temperature=temperature, backend=backend, **settings)
    out.loss.backward()
    leaves = {f"queries[{m}]": v for m, v in queries.items()} | {f"keys[{m}]": v for m, v in keys.items()}
    gradients = {name: v.grad for name, v in leaves.items() if v.grad is not None}
    assert temperature.grad is not None
    is_truth = dtype == torch.float64 and backend == "reference" and settings.get("group") is None
    terms = temperature_terms(replace(case, settings=settings)) if is_truth else 0.0
    return Result(out, {**gradients, "temperature": temperature.grad}, terms)


@dataclass
class Slopes:
    """Of one term at one width, fp64: its rows, and its share of the loss by each similarity [N, K]."""

    modes: tuple[str, str]
    queries: Tensor
    keys: Tensor
    slope: Tensor


def slopes(case: Case) -> list[Slopes]:
    """dL/ds of every similarity s, by the fp64 reference."""
    settings = {name: value for name, value in case.settings.items() if name not in ("dims", "dim_weights")}
    widths = case.settings.get("dims")
    dim_weights = case.settings.get("dim_weights") or [1.0] * len(widths or [None])
    found, terms, sides = [], [], {}
    for q, k, weight in case.terms:
        for width, own in zip(widths or [None], dim_weights, strict=True):  # a term of its own for each width
            rows = case.queries[q], case.keys[k]
            if width is not None:
                rows = F.normalize(rows[0][:, :width], dim=1), F.normalize(rows[1][:, :width], dim=1)
            name = f"{q}-{k}-{width}"
            sides[name] = (rows[0] @ rows[1].T).requires_grad_()
            terms.append((name, name, weight * own))
            found.append(Slopes((q, k), *rows, sides[name]))
    each_key = torch.eye(next(iter(case.keys.values())).shape[0], dtype=torch.float64, device=case.device)
    out = contrastive_loss(
        sides,  # similarities as rows: against the unit vectors they are their own products
        dict.fromkeys(sides, each_key),
        terms=terms,
        temperature=case.temperature,
        backend="reference",
        **settings,
    )
    for one, slope in zip(found, torch.autograd.grad(out.loss, [one.slope for one in found]), strict=True):
        one.slope = slope
    return found


def temperature_terms(case: Case) -> float:
    """Sum over all similarities s of |dL/ds s| / temperature, of which the temperature's gradient is minus the sum."""
    products = [(one.slope * (one.queries @ one.keys.T)).abs().sum() for one in slopes(case)]
    return sum(products).item() / case.temperature


def check_rule(found: Result, eager: Result, truth: Result, dtype: torch.dtype) -> None:
    """The test rule (error_rule.py) for the loss, each term and each gradient; accuracies agree."""
    assert_rule("loss", found.out.loss, eager.out.loss, truth.out.loss, dtype)
    for name, exact in truth.out.per_term.items():
        assert_rule(name, found.out.per_term[name], eager.out.per_term[name], exact, dtype)
        assert abs(found.out.accuracy[name].item() - truth.out.accuracy[name].item()) < 1e-6, f"accuracy of {name}"
    for width, exact in truth.out.per_dim.items():
        assert_rule(f"width {width}", found.out.per_dim[width], eager.out.per_dim[width], exact, dtype)
    assert found.out.accuracy.keys() == truth.out.accuracy.keys()
    for name, exact in truth.out.accuracy.items():
        assert abs(found.out.accuracy[name].item() - exact.item()) < 1e-6, f"accuracy of {name}"
    assert found.gradients.keys() == truth.gradients.keys()
    for name, exact in truth.gradients.items():
        absolute = truth.temperature_terms if name == "temperature" else 0.0
        assert_rule(f"gradient of {name}", found.gradients[name], eager.gradients[name], exact, dtype, absolute)
