"""Turns the arguments of ``contrastive_loss`` into one checked, flat problem that every backend reads.

Only properties that the host knows are checked here (types, shapes, dtypes, devices, Python numbers), so that a call
under ``torch.compile`` or on a GPU never waits. Values on the device (labels in range) are checked where the work is
done, by ``_checks.require_range``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rime_fast.ops._checks import FLOATS


@dataclass
class Problem:
    """One contrastive call, flattened: modes become positions in two lists of tensors.

    query_modes, key_modes: their names; queries: list of [N, D]; keys: list of [K, D];
    terms: (position in queries, position in keys) of each term;
    names, weights: of each term; temperature: 0-d tensor; labels [N] or [N, P], query_ids [N],
    key_ids [K] int64 or None.
    """

    query_modes: list[str]
    key_modes: list[str]
    queries: list[Tensor]
    keys: list[Tensor]
    terms: list[tuple[int, int]]
    names: list[str]
    weights: list[float]
    temperature: Tensor
    labels: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    margin: float | None
    symmetric: bool

    @property
    def n_queries(self) -> int:
        return self.queries[0].shape[0]

    @property
    def n_keys(self) -> int:
        return self.keys[0].shape[0]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_problem(
    queries: Mapping[str, Tensor],
    keys: Mapping[str, Tensor],
    terms: Sequence[tuple[str, str, float]],
    temperature: float | Tensor,
    labels: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    margin: float | None,
    symmetric: bool,
) -> Problem:
    """Check every argument and flatten it; raises ValueError or TypeError naming the argument."""
    _check_side("queries", queries)
    _check_side("keys", keys)
    pairs, names, weights = _check_terms(queries, keys, terms)
    query_modes = list(dict.fromkeys(q for q, _ in pairs))
    key_modes = list(dict.fromkeys(k for _, k in pairs))
    flat_queries = [queries[mode] for mode in query_modes]
    flat_keys = [keys[mode] for mode in key_modes]
    first = flat_queries[0]
    _check_matrices(queries, keys, query_modes, key_modes)
    for query_mode, key_mode in pairs:
        query_dim, key_dim = queries[query_mode].shape[1], keys[key_mode].shape[1]
        if query_dim != key_dim:
            raise ValueError(
                f"term ({query_mode!r}, {key_mode!r}) pairs queries[{query_mode!r}] of D {query_dim} with "
                f"keys[{key_mode!r}] of D {key_dim}; expected equal D"
            )
    n, n_keys = first.shape[0], flat_keys[0].shape[0]
    _check_index("labels", labels, n, "the number of queries", first.device, several=True)
    _check_index("query_ids", query_ids, n, "the number of queries", first.device)
    _check_index("key_ids", key_ids, n_keys, "the number of keys", first.device)
    if (query_ids is None) != (key_ids is None):
        given, missing = ("key_ids", "query_ids") if query_ids is None else ("query_ids", "key_ids")
        raise ValueError(f"{given} came without {missing}; expected both or neither")
    if labels is None and n_keys < n:
        raise ValueError(
            f"labels is None, so key i is the positive of query i, but keys hold {n_keys} rows for {n} queries; "
            "expected at least as many keys as queries, or labels"
        )
    return Problem(
        query_modes=query_modes,
        key_modes=key_modes,
        queries=flat_queries,
        keys=flat_keys,
        terms=[(query_modes.index(q), key_modes.index(k)) for q, k in pairs],
        names=names,
        weights=weights,
        temperature=_check_temperature(temperature, first),
        labels=labels,
        query_ids=query_ids,
        key_ids=key_ids,
        margin=_check_margin(margin),
        symmetric=bool(symmetric),
    )


def _check_side(name: str, side: object) -> None:
    if not isinstance(side, Mapping):
        raise TypeError(f"{name} is {type(side).__name__}; expected a dict of mode name -> tensor [N, D]")
    if not side:
        raise ValueError(f"{name} is empty; expected at least one mode")


def _check_terms(
    queries: Mapping[str, Tensor], keys: Mapping[str, Tensor], terms: Sequence[tuple[str, str, float]]
) -> tuple[list[tuple[str, str]], list[str], list[float]]:
    pairs: list[tuple[str, str]] = []
    weights: list[float] = []
    if isinstance(terms, (str, bytes)) or not isinstance(terms, Sequence):
        raise TypeError(f"terms is {type(terms).__name__}; expected a list of (query mode, key mode, weight)")
    if len(terms) == 0:
        raise ValueError("terms is empty; expected at least one (query mode, key mode, weight)")
    for row, term in enumerate(terms):
        if not isinstance(term, (tuple, list)) or len(term) != 3:
            raise ValueError(f"terms[{row}] is {term!r}; expected (query mode, key mode, weight)")
        query_mode, key_mode, weight = term
        if query_mode not in queries:
            raise ValueError(f"terms[{row}] names query mode {query_mode!r}; queries hold {sorted(queries)}")
        if key_mode not in keys:
            raise ValueError(f"terms[{row}] names key mode {key_mode!r}; keys hold {sorted(keys)}")
        if (query_mode, key_mode) in pairs:
            raise ValueError(f"terms[{row}] repeats ({query_mode!r}, {key_mode!r}); expected each pair once")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"terms[{row}] has weight {weight!r}; expected a finite number")
        pairs.append((query_mode, key_mode))
        weights.append(float(weight))
    return pairs, [f"{q}-{k}" for q, k in pairs], weights


def _check_matrices(
    queries: Mapping[str, Tensor], keys: Mapping[str, Tensor], query_modes: list[str], key_modes: list[str]
) -> None:
    first = queries[query_modes[0]]
    for name, side, modes in (("queries", queries, query_modes), ("keys", keys, key_modes)):
        rows = None
        for mode in modes:
            tensor, label = side[mode], f"{name}[{mode!r}]"
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{label} is {type(tensor).__name__}; expected a tensor [N, D]")
            if tensor.dim() != 2:
                raise ValueError(f"{label} has shape {tuple(tensor.shape)}; expected [N, D]")
            if tensor.dtype not in FLOATS:
                raise TypeError(f"{label} is {tensor.dtype}; expected bfloat16, float16, float32 or float64")
            if tensor.shape[0] == 0 or tensor.shape[1] == 0:
                raise ValueError(f"{label} has shape {tuple(tensor.shape)}; expected at least one row and one column")
            if tensor.dtype != first.dtype:
                raise TypeError(f"{label} is {tensor.dtype}; expected {first.dtype}, as queries[{query_modes[0]!r}]")
            if tensor.device != first.device:
                raise ValueError(f"{label} is on {tensor.device}; expected {first.device}")
            rows = tensor.shape[0] if rows is None else rows
            if tensor.shape[0] != rows:
                raise ValueError(f"{label} has {tensor.shape[0]} rows; expected {rows}, as {name}[{modes[0]!r}]")


def _check_index(name: str, index: object, length: int, what: str, device: torch.device, several: bool = False) -> None:
    """[length] int64; with ``several`` also [length, P], P >= 1."""
    if index is None:
        return
    shape = f"[{length}] or [{length}, P]" if several else f"[{length}]"
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} is {type(index).__name__}; expected an int64 tensor {shape} or None")
    if index.dtype != torch.int64:
        raise TypeError(f"{name} is {index.dtype}; expected int64")
    fits = index.dim() == 1 or (several and index.dim() == 2 and index.shape[1] > 0)
    if not fits or index.shape[0] != length:
        raise ValueError(f"{name} has shape {tuple(index.shape)}; expected {shape} ({what})")
    if index.device != device:
        raise ValueError(f"{name} is on {index.device}; expected {device}")


def _check_temperature(temperature: object, like: Tensor) -> Tensor:
    dtype = accumulation_dtype(like.dtype)
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.dtype.is_floating_point:
            raise ValueError(
                f"temperature is a {temperature.dtype} tensor of shape {tuple(temperature.shape)}; "
                "expected a number or a floating-point 0-d tensor"
            )
        return temperature.to(device=like.device, dtype=dtype)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature is {type(temperature).__name__}; expected a number or a 0-d tensor")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number > 0")
    return torch.full((), float(temperature), dtype=dtype, device=like.device)


def _check_margin(margin: object) -> float | None:
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise ValueError(f"margin is {margin!r}; expected a finite number (in units of q.k) or None")
    return float(margin)
