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
from rime_fast.ops.contrastive.inputs import Problem, make_problem

RECORD_BYTES = 2048
# Keys of all ranks are gathered while they fit in this much memory, and ringed beyond it.
GATHER_LIMIT = "RIME_FAST_GATHER_LIMIT_MIB"
GATHER_LIMIT_MIB = 8192
# Fields on which all ranks must agree: record key -> the argument to name.
AGREED = {
    "terms": "terms",
    "dims": "the embedding size D of queries and keys",
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
    key_norm: the largest norm of any key, where looking is free (chunked.largest_norm).
    """

    problem: Problem
    backend: str
    rank: int
    n_queries: list[int]
    n_keys: list[int]
    gather_limit: int
    keys_trained: bool
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
        if low < 0 or high >= sum(n_keys):
            raise ValueError(
                f"labels on rank {rank} hold values from {low} to {high}; expected 0 <= label < {sum(n_keys)} "
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
        key_norm=float(torch.tensor([other["key_norm"] for other in records]).amax()),  # NaN stays NaN
    )


def _own_record(arguments: tuple[Any, ...], choose: Callable[[Tensor], str]) -> tuple[Problem | None, dict[str, Any]]:
    try:
        problem = make_problem(*arguments)
        backend = choose(problem.queries[0])
        gather_limit = _gather_limit()
    except (TypeError, ValueError) as error:
        return None, {"error": str(error)[:400]}
    labels, temperature = problem.labels, arguments[3]
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
        "key_norm": largest_norm(problem.keys),
        "gather_limit": gather_limit,
        "n_queries": problem.n_queries,
        "n_keys": problem.n_keys,
        "labels": [0, 0] if labels is None else [int(value) for value in torch.stack(torch.aminmax(labels)).tolist()],
    }


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
