"""The opening handshake of a grouped call: every rank learns every rank's sizes, or the same named error.

The first collective of every call is the same on every rank, whatever its arguments are: one all-gather of a record of
fixed size, sizes and values as numbers, settings as their hash. It is made on the device and read on the host once
(buffers are sized from it). Where the records differ, or one tells of trouble, every rank sees that and joins one
longer exchange, in words, that names the difference: a bad argument on one rank never leaves the others waiting.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops import collectives
from rime_fast.ops.contrastive.keys import GroupKeys
from rime_fast.ops.contrastive.problem import (
    NonFiniteRow,
    Problem,
    labels_problem,
    largest_norm,
    make_problem,
    no_positive,
    repeated,
    require_finite,
    require_temperature,
)
from rime_fast.ops.contrastive.schedule import Schedule, is_bounded

EXPLANATION_BYTES = 2048
# Keys of all ranks are gathered while they fit in this much memory, and ringed beyond it.
GATHER_LIMIT = "RIME_FAST_GATHER_LIMIT_MIB"
GATHER_LIMIT_MIB = 8192
# The record, fp64. settings, more: 96 bits of a hash, 0 on a rank whose arguments are wrong. low: the smallest label,
# from the least allowed one. bad: a row of labels [N, P] has no positive, or one twice.
FIELDS = (
    *("settings", "more", "queries", "keys", "trained"),
    *("temperature", "query_norm", "key_norm", "low", "high", "bad"),
)
# What all ranks have to agree on: key of the settings -> the argument to name.
AGREED = {
    "terms": "terms",
    "widths": "dims or dim_weights",
    "dims": "the embedding size D of queries and keys",
    "positives": "the number of positives a query (labels.shape[1])",
    "dtype": "the dtype of queries and keys",
    "temperature": "temperature",
    "ids": "query_ids and key_ids (given or not)",
    "margin": "margin",
    "symmetric": "symmetric",
    "gradient": "whether anything requires grad",
    "gather_limit": "the environment variable RIME_FAST_GATHER_LIMIT_MIB",
    "backend": "the backend",
}
# A temperature made by arithmetic may differ in its last bits between kinds of processors.
SAME_TEMPERATURE = 1e-5


@dataclass
class Agreement:
    """What the handshake settled: this rank's problem, and what matters of every rank's.

    gather_limit: bytes of gathered keys beyond which they are ringed. keys_trained: some rank's keys require grad.
    bounded: no logit of this rank's queries leaves [-BOUNDED, BOUNDED].
    """

    problem: Problem
    group: Any
    rank: int
    n_queries: list[int]
    n_keys: list[int]
    gather_limit: int
    keys_trained: bool
    bounded: bool

    def schedule(self) -> Schedule:
        """This rank's share of the call."""
        x = self.problem.inputs
        source = GroupKeys(x.keys, self.n_keys, self.n_queries, self.group, self.gather_limit)
        return Schedule(x, self.problem.options, source, self.bounded)


def agree(arguments: tuple[Any, ...], group: Any, choose: Callable[[Tensor], str]) -> Agreement:
    """Settle a grouped call, or raises the same ValueError on every rank."""
    problem, settings = None, {}
    try:
        problem = make_problem(*arguments, choose=choose)
        settings = _settings(problem, arguments[3])
        record = _record(problem, settings)
    except (TypeError, ValueError) as error:
        settings, record = {"error": str(error)[:400]}, torch.zeros(len(FIELDS), dtype=torch.float64)
    table = collectives.all_gather(record.to(_device(group))[None], group).cpu()
    columns = dict(zip(FIELDS, table.T.tolist(), strict=True))
    n_keys = [int(count) for count in columns["keys"]]
    if not _sound(columns, sum(n_keys)):
        _explain(problem, settings, group, columns)
    assert problem is not None  # a rank without one has told of it
    rank = dist.get_rank(group)
    return Agreement(
        problem=problem,
        group=group,
        rank=rank,
        n_queries=[int(count) for count in columns["queries"]],
        n_keys=n_keys,
        gather_limit=settings["gather_limit"],
        keys_trained=any(columns["trained"]),
        bounded=is_bounded(columns["query_norm"][rank], max(columns["key_norm"]), columns["temperature"][rank]),
    )


def _settings(problem: Problem, temperature: float | Tensor) -> dict[str, Any]:
    """What has to be the same on every rank."""
    x, options = problem.inputs, problem.options
    embeddings = *x.queries, *x.keys
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*embeddings, x.temperature))
    return {
        "widths": _short([options.widths, problem.width_weights]),
        "terms": _short(list(zip(problem.names, problem.weights, strict=True))),
        "dims": _short([t.shape[1] for t in embeddings]),
        "positives": x.labels.shape[1] if x.labels is not None and x.labels.dim() == 2 else "one a query",
        "dtype": str(x.queries[0].dtype),
        "temperature": "a tensor" if isinstance(temperature, Tensor) else float(temperature),
        "ids": x.query_ids is not None,
        "margin": options.margin,
        "symmetric": options.symmetric,
        "gradient": grad,
        "gather_limit": _gather_limit(),
        "backend": options.backend,
    }


def _record(problem: Problem, settings: dict[str, Any]) -> Tensor:
    """[FIELDS] fp64 on the tensors' device; reads nothing back."""
    x = problem.inputs
    device = x.queries[0].device
    digest = int.from_bytes(hashlib.sha256(json.dumps(settings).encode()).digest()[:12], "big")
    trained = torch.is_grad_enabled() and any(k.requires_grad for k in x.keys)
    host = [1.0 + (digest >> 48), float(digest % 2**48), float(x.n_queries), float(x.n_keys), float(trained)]
    values = [x.temperature.detach(), largest_norm(x.queries), largest_norm(x.keys)]
    if x.labels is None:
        values += [torch.zeros((), device=device)] * 3
    elif x.labels.dim() == 1:
        values += [*torch.aminmax(x.labels), torch.zeros((), device=device)]
    else:
        low, high = torch.aminmax(x.labels)
        values += [low + 1, high, (no_positive(x.labels) | repeated(x.labels)).any()]
    # copied without waiting: the host's numbers come first, so that the one read waits for everything at once
    known = torch.tensor(host, dtype=torch.float64).to(device, non_blocking=True)
    return torch.cat([known, torch.stack([value.double() for value in values])])


def _sound(columns: dict[str, list[float]], n_keys: int) -> bool:
    """Whether all ranks can go on without a word."""
    first = columns["settings"][0], columns["more"][0]
    same = first[0] > 0 and set(zip(columns["settings"], columns["more"], strict=True)) == {first}
    temperatures = columns["temperature"]
    finite = all(map(math.isfinite, (*columns["query_norm"], *columns["key_norm"], *temperatures)))
    if not (same and finite and min(temperatures) > 0 and not any(columns["bad"])):
        return False
    return _same_temperature(temperatures) and min(columns["low"]) >= 0 and max(columns["high"]) < n_keys


def _same_temperature(temperatures: list[float]) -> bool:
    return max(temperatures) - min(temperatures) <= SAME_TEMPERATURE * max(temperatures)


def _explain(problem: Problem | None, settings: dict[str, Any], group: Any, columns: dict[str, list[float]]) -> None:
    """Every rank says what it has in words; all judge the same words. Returns if nothing is wrong after all."""
    if problem is not None and (trouble := _trouble(problem)) is not None:
        settings = {"error": trouble}
    said = [json.loads(text) for text in _exchange(json.dumps(settings), group)]
    for rank, other in enumerate(said):
        if "error" in other:
            raise ValueError(f"contrastive_loss on rank {rank} of the group: {other['error']}")
    found = {key: [other[key] for other in said] for key in AGREED}
    if not _same_temperature(columns["temperature"]):
        found["temperature"] = columns["temperature"]
    for key, values in found.items():
        rank = next((i for i, value in enumerate(values) if value != values[0]), 0)
        if rank:
            raise ValueError(
                f"{AGREED[key]} differs between ranks: {values[0]} on rank 0, {values[rank]} on rank {rank}; "
                "expected the same on all"
            )
    n_keys, least = int(sum(columns["keys"])), 0 if said[0]["positives"] == "one a query" else -1
    for rank, (low, high) in enumerate(zip(columns["low"], columns["high"], strict=True)):
        if low < 0 or high >= n_keys:
            raise ValueError(
                f"labels on rank {rank} hold values from {int(low) + least} to {int(high)}; "
                f"expected {least} <= label < {n_keys} (the number of keys over all ranks)"
            )


def _trouble(problem: Problem) -> str | None:
    """What is wrong with the values in this rank's tensors."""
    x = problem.inputs
    try:
        for side, tensors in (("queries", x.queries), ("keys", x.keys)):
            require_finite(side, tensors, math.inf)
        require_temperature(x.temperature.detach())
    except NonFiniteRow as error:
        return problem.row_message(error)
    except ValueError as error:
        return str(error)
    return None if x.labels is None else labels_problem(x.labels)


def _gather_limit() -> int:
    text = os.environ.get(GATHER_LIMIT, str(GATHER_LIMIT_MIB))
    try:
        limit = int(text)
    except ValueError:
        raise ValueError(f"{GATHER_LIMIT} is {text!r}; expected a whole number of MiB") from None
    return limit * 2**20


def _short(value: Any) -> str:
    """The value as text; a long one is cut and told apart by its hash."""
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:240]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _device(group: Any) -> torch.device:
    """Where the group's collectives run."""
    nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _exchange(text: str, group: Any) -> list[str]:
    """Every rank's text."""
    payload = text.encode()
    if len(payload) > EXPLANATION_BYTES:  # never skip the collective: the others are in it
        payload = json.dumps({"error": "the record of this rank's arguments is too long"}).encode()
    own = torch.frombuffer(bytearray(payload.ljust(EXPLANATION_BYTES)), dtype=torch.uint8).to(_device(group))
    return [bytes(row).decode() for row in collectives.all_gather(own[None], group).cpu().numpy()]
