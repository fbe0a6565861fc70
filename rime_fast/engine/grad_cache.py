"""The gradient cache: a contrastive batch of any size in the memory of one micro-batch, with the exact gradients.

Pass 1 encodes every micro-batch and keeps its embeddings only. The loss over the whole batch (all ranks) is computed
from these, and its gradients with respect to them are the cache. Pass 2 encodes every micro-batch again, now with its
graph, and runs ONE backward through it: of the micro-batch's own loss (the rewrite's cross-entropy) plus the product of
its embeddings with their cached gradients, whose gradient is the cached one. (Gao et al., arXiv 2101.06983, without the
second loss; the sum of both in one backward and the kept graphs below are this project's.)

A micro-batch whose graph was kept in pass 1 is not encoded twice. The last one always is kept: its graph costs what
pass 2 needs anyway. ``keep_bytes`` is the memory that further graphs may take: infinite makes the plain step, 0 the
classic cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rime_fast.engine.wrappers import GradSync


@dataclass
class Encoded:
    """What an encoder makes of one micro-batch.

    embeddings: name -> [n, D]; the same names for every micro-batch (none where only the losses count), any n >= 0.
    loss: 0-d, the micro-batch's own share of the step's loss; read only where the encoder was called with
        ``scored=True``.
    metrics: name -> 0-d without gradient, summed over the micro-batches.
    """

    embeddings: dict[str, Tensor]
    loss: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


# encode(micro_batch, scored): scored is False in the pass whose loss would be thrown away.
Encoder = Callable[[Any, bool], Encoded]
# loss(embeddings of all micro-batches, concatenated in their order) -> 0-d
BatchLoss = Callable[[dict[str, Tensor]], Tensor]
EVERY = 2**31  # more micro-batches than any step has


@dataclass
class CachedStep:
    """What one step did, for the trainer's log. loss: 0-d, of the batch and of the micro-batches, before ``scale``.
    metrics: summed.

    kept: micro-batches encoded once; encoded: forwards run, the re-encoded and the idle ones included.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    kept: int
    encoded: int


@dataclass
class _Slot:
    """A micro-batch between the passes."""

    data: Any
    idle: bool = False  # encoded only because other ranks have more micro-batches
    rows: int = 0
    rng: RngState | None = None
    graph: Encoded | None = None


@dataclass
class FirstPass:
    """What is kept between the passes: micro-batches, cached gradients by name, the batch's loss (0-d, detached)."""

    encode: Encoder
    slots: list[_Slot]
    gradients: dict[str, list[Tensor]]
    loss: Tensor
    scale: float


class GradCache:
    """Runs the two passes of the gradient cache, for any encoder function.

        cache = GradCache(encode, lambda rows: my_contrastive_loss(rows["query"], rows["target"]))
        for batch in batches:
            cache.step(split(batch))      # gradients are in .grad as after loss.backward() of the whole batch
            optimizer.step()

    encode: ``Encoder``. It must depend on its arguments, the model and torch's random state alone; called again with
        the same micro-batch it must give the same embeddings. Autocast is the caller's, around ``step``.
    loss: ``BatchLoss``. Whatever else it reads with a gradient (a temperature) gets that gradient once.
    sync: how gradients travel between ranks, see ``rime_fast.engine.wrappers.grad_sync``; None: one process. Ranks
        average gradients there: a loss whose gradients are to be summed must be multiplied by the number of ranks.
    keep_bytes: memory for graphs kept beyond the last one's, per process; 0 none, ``math.inf`` all.
    cost: of a micro-batch, in any unit its graph's memory is proportional to (tokens); default: all alike.
    """

    def __init__(
        self,
        encode: Encoder | None = None,
        loss: BatchLoss | None = None,
        *,
        sync: GradSync | None = None,
        keep_bytes: float = 0.0,
        cost: Callable[[Any], float] | None = None,
    ) -> None:
        if not (isinstance(keep_bytes, (int, float)) and keep_bytes >= 0):
            raise ValueError(f"keep_bytes is {keep_bytes!r}; expected a number >= 0 (math.inf keeps every graph)")
        self.encode = encode
        self.loss = loss
        self.sync = GradSync() if sync is None else sync
        self.keep_bytes = keep_bytes
        self.cost = cost or (lambda micro_batch: 1.0)
        # Bytes of graph per unit of cost: measured on the last micro-batch of a step, the largest seen.
        self.bytes_per_cost = 0.0

    def step(
        self,
        micro_batches: Sequence[Any],
        *,
        encode: Encoder | None = None,
        loss: BatchLoss | None = None,
        scale: float = 1.0,
        synchronise: bool = True,
    ) -> CachedStep:
        """Run both passes: adds the gradients of ``scale`` x (loss + sum of the encoder's losses) into ``.grad``.

        encode, loss: of this batch, in place of those given at construction. scale: 1 / accumulation steps.
        synchronise: False for all but the last batch of an accumulated step. Raises ValueError for no micro-batch, or
        without an encoder or a loss.
        """
        first = self.first_pass(micro_batches, encode=encode, loss=loss, scale=scale)
        return self.second_pass(first, synchronise=synchronise)

    def first_pass(
        self,
        micro_batches: Sequence[Any],
        *,
        encode: Encoder | None = None,
        loss: BatchLoss | None = None,
        scale: float = 1.0,
    ) -> FirstPass:
        """Encode every micro-batch, compute the loss over all of them, and its gradients with respect to the
        embeddings."""
        encode, loss = encode or self.encode, loss or self.loss
        if encode is None:
            raise ValueError("encode is None; expected an encoder, here or at construction")
        if loss is None:
            raise ValueError("loss is None; expected a function of the embeddings, here or at construction")
        slots, kept = self._plan(micro_batches)
        rows: list[dict[str, Tensor]] = []
        self.sync.begin()
        with self.sync.local():
            for i, slot in enumerate(slots):
                if i < len(slots) - kept:
                    slot.rng = RngState()
                    with torch.no_grad():
                        out = encode(slot.data, False)
                else:
                    out = slot.graph = self._encode_kept(encode, slot.data, last=i == len(slots) - 1)
                slot.rows = next((x.shape[0] for x in out.embeddings.values()), 0)
                if not slot.idle:
                    rows.append({name: x.detach() for name, x in out.embeddings.items()})
        value, gradients = _batch_gradients(rows, loss, scale)
        counts = [0 if slot.idle else slot.rows for slot in slots]
        return FirstPass(encode, slots, {name: list(g.split(counts)) for name, g in gradients.items()}, value, scale)

    def second_pass(self, first: FirstPass, *, upstream: Tensor | None = None, synchronise: bool = True) -> CachedStep:
        """Run one backward per micro-batch, gradients exchanged in the last.

        From the last micro-batch to the first: the kept graphs go first, which frees them, and gradients add up in the
        same order however many were kept, so that the budget changes no bit of them. upstream: 0-d, multiplies every
        gradient.
        """
        slots, encoded, kept = first.slots, len(first.slots), 0
        loss = first.loss
        metrics: dict[str, Tensor] = {}
        for i in reversed(range(len(slots))):
            slot = slots[i]
            out, slot.graph = slot.graph, None
            with nullcontext() if slot.rng is None else slot.rng.replayed(), torch.enable_grad():
                if out is None:
                    encoded += 1
                    with self.sync.local():
                        out = first.encode(slot.data, True)
                else:
                    kept += 1
                gradients = {name: parts[i] for name, parts in first.gradients.items()}
                total = _surrogate(out, gradients, slot.idle, first.scale, upstream)
                if not slot.idle:
                    loss = loss if out.loss is None else loss + out.loss.detach().to(loss.dtype)
                    for name, metric in out.metrics.items():
                        metrics[name] = metrics[name] + metric if name in metrics else metric
                del out  # the graph goes as the backward consumes it
                self.sync.backward(total, last=synchronise and i == 0)
        return CachedStep(loss, metrics, kept, encoded)

    def _plan(self, micro_batches: Sequence[Any]) -> tuple[list[_Slot], int]:
        """The micro-batches in the order of pass 1, and how many of the last ones keep their graphs."""
        slots = [_Slot(data) for data in micro_batches]
        if not slots:
            raise ValueError("micro_batches is empty; expected at least one on every rank")
        costs = [self.cost(slot.data) for slot in slots]
        kept = self._affordable(costs)
        if self.sync.lockstep:
            count, kept = self.sync.agree(len(slots), EVERY if kept == len(slots) else kept)
            cheapest = slots[costs.index(min(costs))].data
            # copies: whatever an encoder notes on a micro-batch between the passes is not shared with the idle runs
            slots = [_Slot(copy(cheapest), idle=True) for _ in range(count - len(slots))] + slots
        return slots, min(kept, len(slots))

    def _affordable(self, costs: list[float]) -> int:
        """How many of the last micro-batches fit into the budget, the very last not counted against it."""
        if math.isinf(self.keep_bytes):
            return len(costs)
        if not self.bytes_per_cost:
            return 1
        kept, left = 1, self.keep_bytes
        for cost in reversed(costs[:-1]):
            left -= cost * self.bytes_per_cost
            if left < 0:
                break
            kept += 1
        return kept

    def _encode_kept(self, encode: Encoder, data: Any, last: bool) -> Encoded:
        # autocast caches cast weights, also those cast without a graph; a graph built on these reaches no parameter
        torch.clear_autocast_cache()
        with torch.enable_grad():
            if not last or self.keep_bytes == 0 or math.isinf(self.keep_bytes):
                return encode(data, True)
            with measured_graph(self.sync.parameters()) as graph:
                out = encode(data, True)
            self.bytes_per_cost = max(self.bytes_per_cost, graph.value / max(self.cost(data), 1e-9))
            return out


def _batch_gradients(rows: list[dict[str, Tensor]], loss: BatchLoss, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's loss (detached) and ``scale`` times its gradients with respect to all rows, by name."""
    names = list(rows[0])
    for part in rows:
        if list(part) != names:
            raise ValueError(f"the encoder returned embeddings {list(part)} after {names}; expected the same names")
    with torch.enable_grad():
        leaves = {name: torch.cat([part[name] for part in rows]).requires_grad_() for name in names}
        value = loss(leaves)
        if value.dim() != 0:
            raise ValueError(f"loss returned a tensor of shape {list(value.shape)}; expected a scalar")
        if value.requires_grad:
            (value if scale == 1.0 else value * scale).backward()
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return value.detach(), gradients


def _surrogate(out: Encoded, gradients: dict[str, Tensor], idle: bool, scale: float, upstream: Tensor | None) -> Tensor:
    """The scalar whose gradient is that of the step's loss through this micro-batch."""
    parts: list[Tensor] = []
    for name, x in out.embeddings.items():
        if not x.requires_grad:
            continue
        # An idle micro-batch only keeps step with other ranks: its gradient is 0 on every parameter.
        parts.append(x.sum() * 0.0 if idle else torch.dot(x.flatten(), gradients[name].to(x.dtype).flatten()))
    if out.loss is not None:
        parts.append(out.loss * (0.0 if idle else scale))
    if not parts:
        raise ValueError("the encoder returned neither a loss nor an embedding with a gradient")
    total = torch.stack([part.float() if part.dtype in (torch.bfloat16, torch.float16) else part for part in parts])
    return total.sum() if upstream is None else total.sum() * upstream


# --- the random state and the memory of a forward --------------------------------------------------------------------


class RngState:
    """What torch's generators (CPU and the current accelerator) held when this object was made.

    ``replayed()`` runs a block from that state and leaves the generators as they were before the block, so that a
    second run draws the same numbers and the draws after it are those of a program without the second run. Nothing
    here waits for a device: its generator's seed and offset live on the host.
    """

    def __init__(self) -> None:
        self._states = _states()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a block from the recorded state."""
        before = _states()
        _restore(self._states)
        try:
            yield
        finally:
            _restore(before)


def _states() -> tuple[torch.Tensor, Any]:
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), device


def _restore(states: tuple[torch.Tensor, Any]) -> None:
    host, device = states
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device)


class GraphBytes:
    """The measurement of ``measured_graph``, filled when its block ends."""

    value: int = 0


@contextmanager
def measured_graph(parameters: Iterable[Tensor]) -> Iterator[GraphBytes]:
    """Measure the memory that the block's graph holds, outputs included on CUDA.

    CUDA: the growth of the allocator's own count, which costs nothing. CPU: the storages saved for the backward, each
    counted once; those of ``parameters`` are not the graph's.
    """
    found = GraphBytes()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        yield found
        found.value = max(0, torch.cuda.memory_allocated() - before)
        return
    own = {_local(parameter).untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.value = sum(seen.values())


@torch.no_grad()
def _local(parameter: Tensor) -> Tensor:
    """A sharded parameter's own part (a DTensor has no storage itself)."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
