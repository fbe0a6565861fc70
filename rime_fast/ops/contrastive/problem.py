"""Turns the arguments of ``contrastive_loss`` into one checked, flat problem that every backend reads.

Properties that the host knows (types, shapes, dtypes, devices, Python numbers) are checked in ``make_problem``, so that
a call under ``torch.compile`` or on a GPU never waits. Values held in tensors are checked where the work is done: on
the CPU, and in the handshake of a grouped call, a NaN or a label out of range is an error that names it. On an
accelerator looking would make the host wait: there labels become an asynchronous assertion, and NaN, Inf or a
temperature that is not positive a NaN loss (which a loss scaler can skip).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rime_fast.ops.checks import FLOATS, require, require_range
from rime_fast.ops.dispatch import BACKENDS

# Similarities this close, relative to the norms, are equal: a candidate that is its positive's twin is not above it
# because its product was summed in another order.
SAME_SIMILARITY = 1e-5


@dataclass(frozen=True)
class Options:
    """The settings of a call that are no tensors; as numbers (``encode``) they pass through an operator's schema.

    terms: (position in queries, position in keys) of each term. backend: the one that runs, never "auto". widths: the
    leading columns that are compared, ascending, the last one all of them; () for all alone. A term has one loss a
    width: losses are counted term by term, the widths of one together. keep: the similarities stay in memory from the
    forward to the backward.
    """

    terms: tuple[tuple[int, int], ...]
    margin: float | None
    symmetric: bool
    backend: str
    widths: tuple[int, ...] = ()
    keep: bool = False

    @property
    def n_losses(self) -> int:
        return len(self.terms) * max(1, len(self.widths))

    def encode(self) -> list[float]:
        """Write the options as integers: [backend, symmetric, keep, margin given, margin, the number of widths, the
        widths, two positions a term]."""
        margin = 0.0 if self.margin is None else self.margin
        flat = [len(self.widths), *self.widths, *(position for term in self.terms for position in term)]
        flags = BACKENDS.index(self.backend), self.symmetric, self.keep, self.margin is not None
        return [*map(float, flags), margin, *map(float, flat)]

    @classmethod
    def decode(cls, numbers: Sequence[float]) -> Options:
        """Read what ``encode`` wrote."""
        backend, symmetric, keep, masked, margin = numbers[:5]
        count, *flat = [int(number) for number in numbers[5:]]
        terms = tuple(zip(flat[count::2], flat[count + 1 :: 2], strict=True))
        rest = bool(symmetric), BACKENDS[int(backend)], tuple(flat[:count]), bool(keep)
        return cls(terms, margin if masked else None, *rest)


class Inputs(NamedTuple):
    """The tensors of a call: lists of [N, D] and [K, D], a temperature 0-d, then labels [N] or [N, P], ids [N] and [K]
    int64 or None."""

    queries: list[Tensor]
    keys: list[Tensor]
    temperature: Tensor
    labels: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None

    @property
    def n_queries(self) -> int:
        return self.queries[0].shape[0]

    @property
    def n_keys(self) -> int:
        return self.keys[0].shape[0]


@dataclass
class Problem:
    """One contrastive call, flattened: modes become positions in two lists of tensors.

    query_modes, key_modes: their names. names, weights: of each term. width_weights: of each of ``Options.widths``.
    """

    query_modes: list[str]
    key_modes: list[str]
    names: list[str]
    weights: list[float]
    width_weights: list[float]
    inputs: Inputs
    options: Options

    def row_message(self, error: NonFiniteRow) -> str:
        """The error of a row by its mode's name."""
        modes = self.query_modes if error.side == "queries" else self.key_modes
        return f"{error.side}[{modes[error.mode]!r}] {_not_finite(error.row)}"


class NonFiniteRow(ValueError):
    """The error of a row that holds a NaN or an infinity. side: "queries" or "keys"; mode: position in the list of that
    side's modes; row: the first bad one."""

    def __init__(self, side: str, mode: int, row: int) -> None:
        super().__init__(f"{side} (mode {mode} in the order of terms) {_not_finite(row)}")
        self.side, self.mode, self.row = side, mode, row


def _not_finite(row: int) -> str:
    return f"holds NaN or Inf in row {row}; expected finite embeddings"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept: fp64 for fp64 inputs, fp32 for everything else."""
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
    dims: Sequence[int] | None,
    dim_weights: Sequence[float] | None,
    *,
    choose: Callable[[Tensor], str],
) -> Problem:
    """Check every argument and flatten it; raises ValueError or TypeError naming the argument.

    choose: a tensor that stands for the call -> the backend that runs.
    """
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
    widths, width_weights = _check_widths(dims, dim_weights, [*flat_queries, *flat_keys])
    if widths:  # the widest is normalised here, by autograd; the others relative to it, in the kernels' sweep
        flat_queries, flat_keys = (
            [unit_rows(rows[:, : widths[-1]]) for rows in side] for side in (flat_queries, flat_keys)
        )
    positions = tuple((query_modes.index(q), key_modes.index(k)) for q, k in pairs)
    scale = _check_temperature(temperature, first)
    return Problem(
        query_modes,
        key_modes,
        names,
        weights,
        width_weights,
        Inputs(flat_queries, flat_keys, scale, labels, query_ids, key_ids),
        Options(positions, _check_margin(margin), bool(symmetric), choose(first), widths),
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
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not _finite(weight):
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


def _check_widths(dims: object, dim_weights: object, embeddings: list[Tensor]) -> tuple[tuple[int, ...], list[float]]:
    if dims is None:
        if dim_weights is not None:
            raise ValueError("dim_weights came without dims; expected both or dims alone")
        return (), []
    if isinstance(dims, (str, bytes)) or not isinstance(dims, Sequence):
        raise TypeError(f"dims is {type(dims).__name__}; expected a list of widths or None")
    most = min(rows.shape[1] for rows in embeddings)
    ints = all(isinstance(width, int) and not isinstance(width, bool) for width in dims)
    if not dims or not ints or dims[0] < 1 or dims[-1] > most or list(dims) != sorted(set(dims)):
        raise ValueError(f"dims is {dims!r}; expected ascending whole numbers from 1 to {most}, the embedding size D")
    weights = [1.0] * len(dims) if dim_weights is None else dim_weights
    if isinstance(weights, (str, bytes)) or not isinstance(weights, Sequence) or len(weights) != len(dims):
        raise ValueError(f"dim_weights is {dim_weights!r}; expected a number for each of the {len(dims)} dims")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not _finite(weight):
            raise ValueError(f"dim_weights holds {weight!r}; expected finite numbers")
    return tuple(dims), [float(weight) for weight in weights]


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of unit norm, a zero row as it is; the norm in fp32, since fp16 would round the 1e-12 beneath it to 0.

    The gradient of a single column's sign is 0 as it stands: autograd's would be rounding, times 1/|x|.
    """
    norm = rows.norm(dim=1, keepdim=True, dtype=accumulation_dtype(rows.dtype)).clamp_min(1e-12)
    unit = (rows / norm).to(rows.dtype)
    return unit.detach() + 0 * rows if rows.shape[1] == 1 else unit


def inverse_norms(rows: Tensor, width: int) -> Tensor:
    """Compute what brings the first ``width`` columns of each row to unit norm, [N]."""
    part = rows[:, :width]
    return part.norm(dim=1, dtype=accumulation_dtype(rows.dtype)).clamp_min(1e-12).reciprocal()


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
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a finite number > 0")
    return torch.full((), float(temperature), dtype=dtype, device=like.device)


def _check_margin(margin: object) -> float | None:
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not _finite(margin):
        raise ValueError(f"margin is {margin!r}; expected a finite number (in units of q.k) or None")
    return float(margin)


def _finite(number: float) -> bool:
    """What torch.compile can trace of a number that changes between calls, unlike ``math.isfinite``."""
    return -math.inf < number < math.inf


# Values held in tensors.


def largest_norm(tensors: list[Tensor]) -> Tensor:
    """Compute the largest row norm, 0-d; NaN when a row holds one."""
    norms = [torch.linalg.vector_norm(t.detach(), dim=1, dtype=accumulation_dtype(t.dtype)) for t in tensors]
    return torch.cat(norms).amax()


def require_finite(side: str, tensors: list[Tensor], largest_norm: float) -> None:
    """Raise NonFiniteRow if ``largest_norm`` (of these tensors) betrays a bad row.

    The largest norm is known before any product, so a NaN or Inf costs no extra pass to notice. A finite row may have
    an infinite norm in fp32; it passes.
    """
    if math.isfinite(largest_norm):
        return
    for mode, rows in enumerate(tensors):
        bad = ~torch.isfinite(rows).all(1)
        if bool(bad.any()):
            raise NonFiniteRow(side, mode, _first(bad))


def require_temperature(temperature: Tensor) -> None:
    """Require a finite temperature above 0 (one made by arithmetic may be anything); reads it on the host."""
    value = float(temperature)
    if not 0 < value < math.inf:
        raise ValueError(f"temperature is {value}; expected a finite number > 0")


def positive_temperature(temperature: Tensor) -> Tensor:
    """Give the temperature, NaN in place of one that is not above 0."""
    return torch.where(temperature > 0, temperature, torch.nan)


def check_labels(labels: Tensor, n_keys: int) -> None:
    """Check that every label [N] names a key; of [N, P] each a key or -1, one at least in a row, none twice
    (``checks.require``)."""
    if labels.dim() == 1:
        require_range("labels", labels, 0, n_keys)
        return
    require_range("labels", labels, -1, n_keys)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if (problem := labels_problem(labels)) is not None:
            raise ValueError(problem)
        return
    require(~no_positive(labels), "labels: expected at least one positive (a label >= 0) in every row")
    require(~repeated(labels), "labels: expected the positives of a row to differ; one names a key twice")


def no_positive(labels: Tensor) -> Tensor:
    """Say which rows of labels [N, P] name no key, [N] bool."""
    return (labels < 0).all(1)


def repeated(labels: Tensor) -> Tensor:
    """Say which rows of labels [N, P] name a key twice, [N] bool."""
    ordered = labels.sort(1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)


def labels_problem(labels: Tensor) -> str | None:
    """Say in words what ``check_labels`` would refuse whatever the number of keys; reads the labels on the host."""
    if labels.dim() == 1:
        return None
    if bool((empty := no_positive(labels)).any()):
        return f"labels: expected at least one positive (a label >= 0) in every row, got none in row {_first(empty)}"
    if bool((twice := repeated(labels)).any()):
        return f"labels: expected the positives of a row to differ; row {_first(twice)} names a key twice"
    return None


def _first(bad: Tensor) -> int:
    """The first True of a boolean [N]."""
    return int(bad.to(torch.int8).argmax())
