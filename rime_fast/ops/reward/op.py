"""score_rewrites_: the public call, its checks, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.checks import FLOATS, INDICES, check_tensor, describe, require_range
from rime_fast.ops.collectives import gather_rows
from rime_fast.ops.dispatch import BackendTable, on_device_of
from rime_fast.ops.reward import cpu, cuda, reference, stream, triton
from rime_fast.ops.reward.weights import PLANES, TERM_NAMES, RewardWeights

TABLE = BackendTable(
    op="reward",
    probes={
        "reference": lambda _: None,
        "chunked": cpu.why_not,
        "triton": triton.why_not,
        "cuda": cuda.why_not,
    },
    order={"cpu": ("chunked", "reference"), "cuda": ("cuda", "triton", "reference")},
)
SMALL = cuda.CudaKernels()
ENGINES: dict[str, stream.Engine] = {"chunked": cpu.Compiled(), "cuda": SMALL, "triton": triton.Engine()}


@torch.no_grad()
def score_rewrites_(
    rewards: Tensor,
    advantages: Tensor,
    *,
    gen: Tensor,
    anchors: Tensor,
    positive: Tensor,
    format_ok: Tensor,
    lengths: Tensor | None = None,
    disc_similarity: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    largest_norm: Tensor | None = None,
    weights: RewardWeights = RewardWeights(),  # noqa: B008 (frozen)
    group: dist.ProcessGroup | None = None,
    terms: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """Score G rewrites of each of B items against an anchor bank and write rewards and advantages in place.

    The formulas are in ``RewardWeights`` (recipe section 4); every rank, mean and standard deviation is formed from
    similarities of at least fp32 precision whatever the input dtype, since inside a group they differ by about 1e-3.

    rewards, advantages: [B, G] fp32, written; any strides, so views into a rollout buffer are fine, as long as no two
        written elements, of these or of ``terms``, are the same memory.
    gen: [B, G, D] floating, the generated embeddings, unit norm. NaN or Inf marks a missing embedding.
    anchors: [A, D] floating, unit norm; on gen's device, or on the CPU (pinned for speed) while gen is on a GPU, in
        which case it streams. An anchor that is not finite is nobody's negative.
    positive: [B] int64, the item's own anchor in the whole bank (mode "ume_r1": the first of its group).
    format_ok: [B, G] bool. lengths: [B, G] integer or floating, rewrite tokens; None leaves the length term out.
    disc_similarity: [B] or [B, G] floating, cos(d, a+) of the item's discriminative embedding; None leaves the
        refine term out.
    negatives_mask: [B, A] bool, True where an anchor may be a negative of the item (False for equal ids or texts);
        A is the size of the whole bank. The own anchors never are.
    largest_norm: [1] fp32 on gen's device, no anchor of ``anchors`` is longer: similarities are compared anew, exactly,
        within a band of this width. None: measured, one more read of the bank (``AnchorBank.largest_norm`` keeps it).
    group: a torch.distributed group over which the bank is sharded: ``anchors`` is this rank's part, the bank is all
        parts in rank order, ``positive`` and ``negatives_mask`` speak of the whole bank, everything else is local.
        B, G, D and ``weights`` must be the same on every rank.
    terms: name -> [B, G] fp32 buffer to fill, names as in ``TERM_NAMES``.

    A rollout whose embedding or own anchor is missing gets the format-failed reward (no format, score or refine
    term) and counts 1 in terms["nan"]. On the CPU a ``positive`` outside the bank raises; on a GPU, where looking
    would stop the host, it is such a missing anchor.

    Raises TypeError or ValueError, naming the argument, for wrong shapes, dtypes, devices, empty sizes or names; with
    ``group`` on every rank, also for another rank's argument.
    """
    n_columns = anchors.shape[0] if group is None and isinstance(anchors, Tensor) and anchors.dim() else "A"
    try:
        _check(rewards, advantages, gen, anchors, positive, format_ok, lengths, disc_similarity, terms)
        if negatives_mask is not None:
            shape = (gen.shape[0], n_columns)
            check_tensor("negatives_mask", negatives_mask, shape=shape, dtypes=(torch.bool,), device=gen.device)
        if largest_norm is not None:
            check_tensor("largest_norm", largest_norm, shape=(1,), dtypes=(torch.float32,), device=gen.device)
        if not isinstance(weights, RewardWeights):
            raise TypeError(f"weights: expected RewardWeights, got {describe(weights)}")
        chosen = TABLE.choose(backend, gen)
    except (TypeError, ValueError) as error:
        if group is not None and group.size() > 1:
            stream.refuse(error, group)
        raise
    per_item = disc_similarity if disc_similarity is None or disc_similarity.dim() == 2 else disc_similarity[:, None]
    wanted = terms or {}
    torch.ops.rime_fast.score_rewrites_(
        rewards,
        advantages,
        list(wanted.values()),
        [PLANES.index(name) for name in wanted],
        gen,
        anchors,
        positive,
        format_ok,
        lengths,
        per_item,
        negatives_mask,
        largest_norm,
        weights.encode(),
        "" if group is None or group.size() == 1 else group.group_name,
        chosen,
        torch.compiler.is_compiling(),
    )


def _score_rewrites(
    rewards: Tensor,
    advantages: Tensor,
    terms: Sequence[Tensor],
    planes: Sequence[int],
    gen: Tensor,
    anchors: Tensor,
    positive: Tensor,
    format_ok: Tensor,
    lengths: Tensor | None,
    disc_similarity: Tensor | None,
    negatives_mask: Tensor | None,
    largest_norm: Tensor | None,
    numbers: Sequence[float],
    group_name: str,
    backend: str,
    traced: bool,
) -> None:
    torch.autograd.graph.increment_version([rewards, advantages, *terms])
    weights = RewardWeights.decode(tuple(numbers))
    resolve: Any = dist.distributed_c10d._resolve_process_group
    group = resolve(group_name) if group_name else None
    if traced:
        named = zip((f"terms[{PLANES[plane]!r}]" for plane in planes), terms, strict=True)
        _check_distinct({"rewards": rewards, "advantages": advantages, **dict(named)})
    positive = positive.contiguous()  # the kernels read it as it lies
    if backend == "reference" and group is not None:
        bank = stream.layout(gen, anchors, negatives_mask, weights, group, whole=True)
        anchors = gather_rows(anchors, bank.sizes, group)
        group = None
    if group is None and positive.device.type == "cpu":
        require_range("positive", positive, 0, anchors.shape[0] - weights.positives + 1)
    if backend == "cuda" and group is None and SMALL.small(gen, anchors, weights):
        filled = gen.new_empty(len(PLANES), *format_ok.shape, dtype=torch.float32) if terms else None
        SMALL.score_small(
            rewards,
            advantages,
            filled,
            gen,
            anchors,
            positive,
            format_ok,
            lengths,
            disc_similarity,
            negatives_mask,
            weights,
        )
        if filled is not None:
            for buffer, plane in zip(terms, planes, strict=True):
                buffer.copy_(filled[plane])
        return
    if backend == "reference":
        found = reference.statistics(gen, anchors.to(gen.device), positive, negatives_mask, weights)
        result = reference.rewards(found, format_ok, lengths, disc_similarity, weights)
        values = [result[name] for name in PLANES]
        rewards.copy_(values[0])
        advantages.copy_(values[1])
    else:
        call = gen, anchors, positive, format_ok, lengths, disc_similarity, negatives_mask, weights, group
        with on_device_of(gen):
            every = stream.score(
                ENGINES[backend], *call, rewards=rewards, advantages=advantages, largest_norm=largest_norm
            )
        values = list(every) if terms else []
    for buffer, plane in zip(terms, planes, strict=True):
        buffer.copy_(values[plane])


# By the plain registration: ``custom_op``'s wrappers around a call with so many arguments take longer than all else
# that this operator does on the host (0.1 of 0.2 ms), and a small bank is scored in 1 ms.
_MUTATED = ("rewards", "advantages", "terms")
_LIBRARY = torch.library.Library("rime_fast", "FRAGMENT")
_LIBRARY.define("score_rewrites_" + torch.library.infer_schema(_score_rewrites, mutates_args=_MUTATED))
_LIBRARY.impl("score_rewrites_", _score_rewrites, "CompositeExplicitAutograd")
torch.library.register_fake("rime_fast::score_rewrites_", lambda *_: None, lib=_LIBRARY)


def _check(
    rewards: Tensor,
    advantages: Tensor,
    gen: Tensor,
    anchors: Tensor,
    positive: Tensor,
    format_ok: Tensor,
    lengths: Tensor | None,
    disc_similarity: Tensor | None,
    terms: Mapping[str, Tensor] | None,
) -> None:
    check_tensor("gen", gen, shape=("B", "G", "D"), dtypes=FLOATS)
    n_items, group_size, width = gen.shape
    if 0 in gen.shape:
        raise ValueError(f"gen: expected at least one item, rollout and feature, got {describe(gen)}")
    check_tensor("anchors", anchors, shape=("A", width), dtypes=FLOATS)
    if anchors.shape[0] == 0:
        raise ValueError(f"anchors: expected at least one anchor, got {describe(anchors)}")
    if anchors.device.type != "cpu":
        check_tensor("anchors", anchors, device=gen.device)
    buffers = {"rewards": rewards, "advantages": advantages}
    for name, buffer in (terms or {}).items():
        if name not in TERM_NAMES:
            raise ValueError(f"terms: unknown term {name!r}; expected names out of {', '.join(TERM_NAMES)}")
        buffers[f"terms[{name!r}]"] = buffer
    for name, buffer in buffers.items():
        check_tensor(name, buffer, shape=(n_items, group_size), dtypes=(torch.float32,), device=gen.device)
    if not torch.compiler.is_compiling():  # traced tensors have no addresses: the operator looks
        _check_distinct(buffers)
    check_tensor("positive", positive, shape=(n_items,), dtypes=(torch.int64,), device=gen.device)
    check_tensor("format_ok", format_ok, shape=(n_items, group_size), dtypes=(torch.bool,), device=gen.device)
    if lengths is not None:
        check_tensor("lengths", lengths, shape=(n_items, group_size), dtypes=INDICES + FLOATS, device=gen.device)
    if disc_similarity is not None:
        shape = (n_items,) if disc_similarity.dim() == 1 else (n_items, group_size)
        check_tensor("disc_similarity", disc_similarity, shape=shape, dtypes=FLOATS, device=gen.device)


def _check_distinct(buffers: Mapping[str, Tensor]) -> None:
    """No element of memory is written twice; elements are compared only where two buffers lie over each other."""
    spans = sorted((buffer.data_ptr(), _end(buffer), name) for name, buffer in buffers.items())
    groups: list[list[str]] = []
    reach = 0
    for start, end, name in spans:
        if start >= reach:
            groups.append([])
        groups[-1].append(name)
        reach = max(reach, end)
    for names in groups:
        if len(names) == 1 and buffers[names[0]].is_contiguous():
            continue
        names.sort(key=list(buffers).index)  # errors name the later argument
        places = []
        for buffer in (buffers[name] for name in names):
            steps = (buffer.element_size() * stride for stride in buffer.stride())
            rows, columns = (torch.arange(size) * step for size, step in zip(buffer.shape, steps, strict=True))
            places.append((rows[:, None] + columns).flatten() + buffer.data_ptr())
        place, order = torch.cat(places).sort(stable=True)
        twice = (place[1:] == place[:-1]).nonzero()
        if len(twice):
            first, second = (names[int(order[int(twice[0]) + step]) // len(places[0])] for step in (0, 1))
            if first == second:
                raise ValueError(f"{first}: expected memory for each element, got strides {buffers[first].stride()}")
            raise ValueError(f"{second}: expected a buffer of its own, got the same memory as {first}")


def _end(buffer: Tensor) -> int:
    """The address after a buffer's last element."""
    last = sum((size - 1) * stride for size, stride in zip(buffer.shape, buffer.stride(), strict=True))
    return buffer.data_ptr() + buffer.element_size() * (last + 1)
