"""The opening handshake of a grouped call: every rank learns every rank's sizes, or the same named error.

Each rank validates its own arguments first and does not raise; it sends a short record (its sizes and settings, or the
text of its error) in one all-gather. All ranks then judge the same records, so they all go on or all raise: a bad
argument on one rank never leaves the others waiting in a collective.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.contrastive.chunked import largest_norm
from rime_fast.ops.contrastive.collectives import all_gather_single
from rime_fast.ops.contrastive.finite import NonFiniteRow, reason, require_finite, require_temperature
from rime_fast.ops.contrastive.inputs import Problem, make_problem
from rime_fast.ops.contrastive.positives import values_problem

RECORD_BYTES = 2048
# Keys of all ranks are gathered while they fit in this much memory, and ringed beyond it.
GATHER_LIMIT = "RIME_FAST_GATHER_LIMIT_MIB"
GATHER_LIMIT_MIB = 8192
# Fields on which all ranks must agree: record key -> the argument to name.
AGREED = {
    "terms": "terms",
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


@dataclass
class Agreement:
    """What the handshake settled: this rank's problem and backend, and what matters of every rank's.

    gather_limit: bytes of gathered keys beyond which they are ringed. keys_trained: some rank's keys require grad.
    query_norm, key_norm: the largest norm of any of this rank's queries and of any rank's key.
    """

    problem: Problem
    backend: str
    rank: int
    n_queries: list[int]
    n_keys: list[int]
    gather_limit: int
    keys_trained: bool
    query_norm: float
    key_norm: float

    @property
    def key_offset(self) -> int:
        return sum(self.n_keys[: self.rank])


def agree(arguments: tuple[Any, ...], group: Any, choose: Callable[[Tensor], str]) -> Agreement:
    """Settle a grouped call, or raise the same ValueError on every rank.

    Reads the records on the host: the one synchronisation of a grouped call (buffers are sized from them).
    """
    problem, record = _own_record(arguments, choose)
    records = [json.loads(text) for text in _exchange(json.dumps(record), group)]
    for rank, other in enumerate(records):
        if "error" in other:
            raise ValueError(f"contrastive_loss on rank {rank} of the group: {other['error']}")
    for key, argument in AGREED.items():
        values = [other[key] for other in records]
        rank = next((i for i, value in enumerate(values) if value != values[0]), 0)
        if rank:
            raise ValueError(
                f"{argument} differs between ranks: {values[0]} on rank 0, {values[rank]} on rank {rank}; "
                "expected the same on all"
            )
    n_queries, n_keys = [r["n_queries"] for r in records], [r["n_keys"] for r in records]
    for rank, other in enumerate(records):
        low, high = other["labels"]
        least = 0 if other["positives"] == "one a query" else -1
        if low < least or high >= sum(n_keys):
            raise ValueError(
                f"labels on rank {rank} hold values from {low} to {high}; expected {least} <= label < {sum(n_keys)} "
                "(the number of keys over all ranks)"
            )
    assert problem is not None  # a rank without one sent an error record
    return Agreement(
        problem=problem,
        backend=record["backend"],
        rank=dist.get_rank(group),
        n_queries=n_queries,
        n_keys=n_keys,
        gather_limit=record["gather_limit"],
        keys_trained=any(other["keys_trained"] for other in records),
        query_norm=record["query_norm"],
        key_norm=max(other["key_norm"] for other in records),
    )


def _own_record(arguments: tuple[Any, ...], choose: Callable[[Tensor], str]) -> tuple[Problem | None, dict[str, Any]]:
    try:
        problem = make_problem(*arguments)
        backend = choose(problem.queries[0])
        gather_limit = _gather_limit()
        norms, labels = _host_facts(problem)
    except (TypeError, ValueError) as error:
        return None, {"error": str(error)[:400]}
    temperature, several = arguments[3], problem.labels is not None and problem.labels.dim() == 2
    key_grad = torch.is_grad_enabled() and any(k.requires_grad for k in problem.keys)
    other_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*problem.queries, problem.temperature))
    return problem, {
        "terms": _short(list(zip(problem.names, problem.weights, strict=True))),
        "dims": _short([t.shape[1] for t in (*problem.queries, *problem.keys)]),
        "dtype": str(problem.queries[0].dtype),
        "temperature": "a tensor" if isinstance(temperature, Tensor) else float(temperature),
        "ids": problem.query_ids is not None,
        "margin": problem.margin,
        "symmetric": problem.symmetric,
        "backend": backend,
        "gradient": key_grad or other_grad,
        "keys_trained": key_grad,
        "query_norm": norms[0],
        "key_norm": norms[1],
        "gather_limit": gather_limit,
        "n_queries": problem.n_queries,
        "n_keys": problem.n_keys,
        "positives": problem.labels.shape[1] if problem.labels is not None and several else "one a query",
        "labels": labels,
    }


def _host_facts(problem: Problem) -> tuple[tuple[float, float], list[int]]:
    """((largest query norm, largest key norm), [smallest, largest label]), or the error of a bad row.

    Reads a few numbers from the device; the handshake waits for the host in any case.
    """
    sides = (("queries", problem.queries, problem.query_modes), ("keys", problem.keys, problem.key_modes))
    norms = torch.stack([largest_norm(tensors) for _, tensors, _ in sides]).tolist()
    for norm, (side, tensors, modes) in zip(norms, sides, strict=True):
        try:
            require_finite(side, tensors, norm)
        except NonFiniteRow as error:
            raise ValueError(f"{side}[{modes[error.mode]!r}] {reason(error.row)}") from None
    require_temperature(problem.temperature.detach())
    if problem.labels is None:
        return (norms[0], norms[1]), [0, 0]
    if (trouble := values_problem(problem.labels)) is not None:
        raise ValueError(trouble)
    return (norms[0], norms[1]), [int(value) for value in torch.stack(torch.aminmax(problem.labels)).tolist()]


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


def _exchange(text: str, group: Any) -> list[str]:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    payload = text.encode()
    if len(payload) > RECORD_BYTES:  # never skip the collective: the others are in it
        payload = json.dumps({"error": "the record of this rank's arguments is too long"}).encode()
    own = torch.frombuffer(bytearray(payload.ljust(RECORD_BYTES)), dtype=torch.uint8).to(device)
    everyone = torch.empty(dist.get_world_size(group), RECORD_BYTES, dtype=torch.uint8, device=device)
    all_gather_single(everyone.view(-1), own, group=group)
    return [bytes(row).decode() for row in everyone.cpu().numpy()]
