"""The streaming computation: similarities of all rollouts to one tile of the bank at a time, and a kernel over each.

    own        = gen . own anchors                                  fp64, one dot product per rollout
    for tile in bank:
        sims   = gen @ tile^T                                       fp32 [R, n], a buffer of at most BUFFER_BYTES
        state += ranks, count and sum | softmax | maximum           one kernel over sims
    rewards, advantages, terms = finish(state, own)

On the CPU product and statistics are one kernel (csrc) that keeps no similarities, and a bank in fp32 is one tile. The
kernels come from an engine: cpu.Compiled, its heir in cuda.py, or triton.Engine. Products have fp32 precision whatever
the input dtype and whatever torch's matmul precision is set to (``multiply``). A bank of up to EXACT_ANCHORS is
multiplied in fp64: with so few negatives the product's rounding would not average out of their mean.
Memory: the buffer, one tile in fp32 (on a GPU a 16-bit bank is read where it lies), and the state, 8 (4 + P) bytes a
rollout. Work: 2 R A D FLOP and R A elements read.

A bank sharded over a group: every rank scores everybody's rollouts against its own part.

    all-gather rollouts and positives  ->  own similarities from whoever holds the anchor (one small all-reduce)
    ->  each rank scans its shard for all rows  ->  all-to-all of the row states (32 + 8 P bytes a row and rank)
    ->  merged in rank order, so the result is the same on every run  ->  rewards and advantages of the local rows

What travels is rollouts and states, never anchors: R D floats a rank against A D for gathering the bank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.checks import require_range
from rime_fast.ops.collectives import all_gather
from rime_fast.ops.reward import cpu, cuda, triton
from rime_fast.ops.reward.weights import NEGATIVES, STATE, RewardWeights

BUFFER_BYTES = {"cpu": 2 << 20, "cuda": 1 << 30}  # a CPU's stays in its caches until the kernel has read it
CAST_BYTES = 8 << 20  # of fp32 at a time, where the CPU's bank has another dtype or is strided
EXACT_ANCHORS = 256
MIN_COLUMNS, MAX_COLUMNS = 256, 65_536
# A product of bf16 parts has more roundings than one of fp32 numbers, and leaves out what is below the last bit.
PARTS_BAND = 2.0

Engine = cpu.Compiled | triton.Engine


@dataclass
class Bank:
    """The bank as it lies over a group: rows per rank, where this rank's part starts, and the bank's size."""

    sizes: list[int]
    offset: int
    total: int


def score(
    engine: Engine,
    gen: Tensor,
    anchors: Tensor,
    positive: Tensor,
    format_ok: Tensor,
    lengths: Tensor | None,
    disc_similarity: Tensor | None,
    negatives_mask: Tensor | None,
    weights: RewardWeights,
    group: dist.ProcessGroup | None = None,
    *,
    rewards: Tensor,
    advantages: Tensor,
    largest_norm: Tensor | None = None,
) -> Tensor:
    """Fill rewards and advantages, and give them with all terms, [12, B, G] fp32 in the order of ``PLANES``; arguments
    as in score_rewrites_."""
    direct = engine.reads(gen, anchors)
    rows = (gen if direct else gen.float()).flatten(0, 1).contiguous()
    n_local, total = rows.shape[0], anchors.shape[0]
    if group is not None:
        bank = layout(gen, anchors, negatives_mask, weights, group)
        rows, positive, total = all_gather(rows, group), all_gather(positive, group), bank.total
        if positive.device.type == "cpu":
            require_range("positive", positive, 0, total - weights.positives + 1)
        positive = positive - bank.offset
        negatives_mask = None if negatives_mask is None else _mask_columns(negatives_mask, bank, group)
    if direct:
        own, norms, state = cast(cuda.CudaKernels, engine).begin(rows, anchors, positive, weights)
    else:
        inside = group is None and positive.device.type == "cpu"  # the operator has looked
        own, norms = own_similarities(engine, rows, anchors, positive, weights, inside)
        state = initial_state(rows, weights)
    if group is not None:
        own = _own_from_holders(own, positive, anchors.shape[0], weights, group)
    # what is exact in bf16 or fp16 needs fewer parts
    parts = parts_of(gen.dtype), parts_of(anchors.dtype)
    exact = total <= EXACT_ANCHORS
    how: dict[str, Any] = {"exact": exact, "parts": parts, "largest_norm": largest_norm}
    scan(engine, rows, norms, own, anchors, positive, negatives_mask, weights, state, **how)
    if group is not None:
        received = torch.empty_like(state)
        dist.all_to_all_single(received, state, group=group)
        state = initial_state(rows[:n_local], weights)
        engine.merge(received.view(group.size(), n_local, -1), state, weights)
        own = own[group.rank() * n_local : (group.rank() + 1) * n_local].contiguous()
    return engine.finish(state, own, format_ok, lengths, disc_similarity, weights, rewards, advantages)


def own_similarities(
    engine: Engine, rows: Tensor, anchors: Tensor, positive: Tensor, weights: RewardWeights, inside: bool
) -> tuple[Tensor, Tensor]:
    """Compute fp64 similarities [R, P] to each item's own anchors, NaN where one lies outside the bank; norms [R] of
    rows. inside: none is known to lie outside."""
    index = positive[:, None]
    if weights.positives > 1:
        index = index + torch.arange(weights.positives, device=positive.device)
    if inside:
        return engine.own_similarities(rows, anchors[index].float())
    missing = (index < 0) | (index >= anchors.shape[0])
    index = index.clamp(0, anchors.shape[0] - 1).to(anchors.device)
    found, norms = engine.own_similarities(rows, anchors[index].to(rows.device, torch.float32))
    found.view(len(positive), -1, weights.positives).masked_fill_(missing[:, None, :], torch.nan)
    return found, norms


def scan(
    engine: Engine,
    rows: Tensor,
    norms: Tensor,
    own: Tensor,
    anchors: Tensor,
    positive: Tensor,
    negatives_mask: Tensor | None,
    weights: RewardWeights,
    state: Tensor,
    *,
    exact: bool,
    parts: tuple[int, int] = (3, 3),
    largest_norm: Tensor | None = None,
) -> None:
    """Add anchors [A, D] to the state [R, 4 + P] fp64 of rows [R, D], tile by tile; ``positive`` counts from their
    first.

    exact: multiply in fp64. parts: how many bf16 numbers make one of the rows, one of the anchors. largest_norm: as
    for score_rewrites_.
    """
    if negatives_mask is not None and negatives_mask.stride(1) != 1:
        negatives_mask = negatives_mask.contiguous()
    if not exact and isinstance(engine, cpu.Compiled) and engine.scans(rows):
        whole = anchors.dtype == torch.float32 and anchors.is_contiguous()
        columns = anchors.shape[0] if whole else max(1, CAST_BYTES // (4 * anchors.shape[1]))
        for first, tile in tiles(anchors, columns, rows.device):
            mask = None if negatives_mask is None else negatives_mask[:, first : first + tile.shape[0]]
            engine.add_anchors(rows, tile, norms, own, positive, mask, largest_norm, first, weights, state)
        return
    dtype = torch.float64 if exact else torch.float32
    columns = BUFFER_BYTES[rows.device.type] // (dtype.itemsize * rows.shape[0])
    columns = min(max(MIN_COLUMNS, min(MAX_COLUMNS, columns)), anchors.shape[0])
    buffer = rows.new_empty(rows.shape[0] * (columns + engine.ALIGN - 1), dtype=dtype)
    factors = [rows.double()] if exact else split(rows, parts[0])
    for first, tile in tiles(anchors, columns, rows.device):
        stride = -(-tile.shape[0] // engine.ALIGN) * engine.ALIGN
        sims = buffer[: rows.shape[0] * stride].view(rows.shape[0], stride)[:, : tile.shape[0]]
        if exact:
            torch.mm(factors[0], tile.double().T, out=sims)
        else:
            multiply(factors, split(tile, parts[1]), sims)
        mask = None if negatives_mask is None else negatives_mask[:, first : first + tile.shape[0]]
        norm = norm_bound(tile) if largest_norm is None else largest_norm
        slack = 1.0 if exact else PARTS_BAND  # the kernel looks again at what is this close
        engine.add_tile(sims, rows, tile, norm, norms, own, positive, mask, first, weights, slack, state)


def norm_bound(rows: Tensor) -> Tensor:
    """The largest norm of the finite rows [n, D], [1] fp32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).nan_to_num_(0.0, 0.0).amax(0, keepdim=True)


def parts_of(dtype: torch.dtype) -> int:
    """How many bf16 numbers add up to any number of this dtype as fp32."""
    return {torch.bfloat16: 1, torch.float16: 2}.get(dtype, 3)


def split(values: Tensor, parts: int) -> list[Tensor]:
    """Split values into ``parts`` bf16 tensors, from the leading bits on, whose sum they are (to 24 bits with
    three)."""
    found = [values.bfloat16()]
    while len(found) < parts:
        values = values.float() - found[-1]
        found.append(values.bfloat16())
    return found


def multiply(rows: list[Tensor], anchors: list[Tensor], out: Tensor) -> None:
    """Compute similarities, out [R, n] fp32 = (sum of rows) (sum of anchors)^T to fp32 precision, by products of their
    bf16 parts.

    These are exact in TF32 and in bf16, so that torch's process-wide precision changes nothing and is left alone; on a
    GPU they run on the tensor cores, six of them in less time than one fp32 product. Parts whose product lies below
    fp32's last bit are left out.
    """
    fresh = True
    for i, a in enumerate(rows):
        for b in anchors[: 3 - i]:
            if not out.is_cuda:
                torch.addmm(out, a.float(), b.T.float(), beta=0 if fresh else 1, out=out)
            elif fresh:
                torch.mm(a, b.T, out_dtype=torch.float32, out=out)
            else:
                torch.addmm(out, a, b.T, out_dtype=torch.float32, out=out)
            fresh = False


def initial_state(rows: Tensor, weights: RewardWeights) -> Tensor:
    """The state [R, 4 + P] of rows that have met no anchor."""
    state = rows.new_zeros(rows.shape[0], STATE + weights.positives, dtype=torch.float64)
    if NEGATIVES[weights.negative_code] != "mean":
        state[:, 1] = -torch.inf
    return state


def tiles(anchors: Tensor, columns: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Cut the bank into (first row, contiguous tile on ``device``): fp32, on a GPU also in a 16-bit bank's own dtype.

    A bank in host memory is copied one tile ahead of its use: with pinned memory the copies run beside the products.
    """
    starts = range(0, anchors.shape[0], columns)
    narrow = device.type == "cuda" and anchors.dtype in (torch.bfloat16, torch.float16)
    dtype = anchors.dtype if narrow else torch.float32
    if anchors.device == device:
        for first in starts:
            yield first, anchors[first : first + columns].to(dtype).contiguous()
        return
    ahead = torch.cuda.Stream(device)
    current = torch.cuda.current_stream(device)

    def fetch(first: int) -> Tensor:
        with torch.cuda.stream(ahead):
            return anchors[first : first + columns].to(device, non_blocking=True)

    following = fetch(0)
    for first in starts:
        current.wait_stream(ahead)
        tile = following
        tile.record_stream(current)
        if first + columns < anchors.shape[0]:
            following = fetch(first + columns)
        yield first, tile.to(dtype)


def layout(
    gen: Tensor,
    anchors: Tensor,
    negatives_mask: Tensor | None,
    weights: RewardWeights,
    group: dist.ProcessGroup,
    whole: bool = False,
) -> Bank:
    """Exchange the shard sizes and compare what has to be equal on all ranks (ValueError on every rank if it is not).

    whole: the reference gathers the bank, where the other backends gather rollouts. A few integers through host memory
    where the group has a CPU backend, so that no device waits for them.
    """
    columns = 0 if negatives_mask is None else negatives_mask.shape[1]
    mine = [*gen.shape, negatives_mask is not None, anchors.shape[0], columns, whole, *weights.encode()]
    table = _exchange(mine, group, gen.device)
    names = ("B", "G", "D", "negatives_mask given", "anchors", "negatives_mask's columns", "backend is reference")
    for column in range(len(mine)):
        values, name = table[:, column], names[column] if column < len(names) else "weights"
        if name != "anchors" and bool((values != values[0]).any()):
            raise ValueError(f"group: {name} must be the same on every rank, got {values.tolist()} by rank")
    sizes = [int(size) for size in table[:, 4]]
    found = Bank(sizes, sum(sizes[: group.rank()]), sum(sizes))
    if negatives_mask is not None and negatives_mask.shape[1] != found.total:
        raise ValueError(
            f"negatives_mask: expected a column for each of the whole bank's {found.total} anchors, "
            f"got {negatives_mask.shape[1]}"
        )
    return found


def refuse(error: Exception, group: dist.ProcessGroup) -> None:
    """Take part in ``layout`` on a rank whose arguments are wrong: the other ranks raise ValueError with ``error``."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with suppress(ValueError):
        _exchange([-1.0] * (7 + len(RewardWeights().encode())), group, device, str(error))


def _exchange(mine: list[float], group: dist.ProcessGroup, device: torch.device, refused: str = "") -> Tensor:
    """Every rank's numbers, [W, n] on the host. Raises ValueError on every rank where one sends a negative first."""
    types = {found.type for found in group._device_types}
    sent = torch.tensor(mine, dtype=torch.float64, device="cpu" if "cpu" in types else device)
    table = all_gather(sent[None], group).cpu()
    if bool((table[:, 0] < 0).any()):
        said: list[Any] = [""] * group.size()
        dist.all_gather_object(said, refused, group=group)
        rank = next(i for i, text in enumerate(said) if text)
        raise ValueError(f"score_rewrites_ on rank {rank} of the group: {said[rank]}")
    return table


def _own_from_holders(
    own: Tensor, local: Tensor, n_local: int, weights: RewardWeights, group: dist.ProcessGroup
) -> Tensor:
    """Own similarities [W R, P] from the rank that holds each anchor; NaN where no rank does."""
    columns = local[:, None] + torch.arange(weights.positives, device=own.device)
    held = ((columns >= 0) & (columns < n_local)).repeat_interleave(own.shape[0] // local.shape[0], dim=0)
    sent = torch.stack([own.masked_fill(~held, 0.0), held.double()])
    dist.all_reduce(sent, group=group)
    return sent[0].masked_fill(sent[1] == 0, torch.nan)


def _mask_columns(mask: Tensor, bank: Bank, group: dist.ProcessGroup) -> Tensor:
    """[W B, A local]: everybody's mask of this rank's anchors, from [B, A] of the whole bank."""
    n_items, n_local = mask.shape[0], bank.sizes[group.rank()]
    sent = torch.cat([part.reshape(-1) for part in mask.byte().split(bank.sizes, dim=1)])
    received = sent.new_empty(group.size() * n_items * n_local)
    dist.all_to_all_single(
        received, sent, [n_items * n_local] * group.size(), [n_items * size for size in bank.sizes], group=group
    )
    return received.view(group.size() * n_items, n_local).bool()
