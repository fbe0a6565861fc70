"""Models as they come wrapped (DDP, FSDP2, DeepSpeed, peft): when gradients travel, and whole parameters for decoding.

Gradients travel once a step, with the backward of its last micro-batch:

| model              | gradients leave a rank                        | ranks must run equally many micro-batches      |
|--------------------|-----------------------------------------------|------------------------------------------------|
| one process        | never                                         | no                                             |
| DDP                | once: the last backward fires the reducer     | no                                             |
| FSDP2              | once: the last backward reduce-scatters       | yes, every forward gathers the parameters      |
| DeepSpeed ZeRO-0/1 | once: at the accumulation boundary            | no                                             |
| DeepSpeed ZeRO-2/3 | with every backward: a rank keeps no full     | yes, every backward reduces (ZeRO-3: every     |
|                    | gradient, so there is nothing to add up to    | forward gathers as well)                       |

Where ranks must keep step they agree on the number once a step (16 bytes), and a rank with fewer runs idle ones.

ZeRO-3 and FSDP2 keep a part of every parameter on each rank and gather the rest in hooks around each module's forward.
Decoding calls every module once a token, and ranks decode for different numbers of tokens: their hooks would move the
whole model once a token, and then wait for a rank that has stopped. Here all parameters are gathered when the phase
begins, the hooks sleep, and the parts are put back when it ends.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rime_fast.model.dual_mode import DualModeModel

Backward = Callable[[Tensor], None]
# The modules inside a ``whole_parameters`` block.
_WHOLE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def dual_mode_of(model: nn.Module) -> Any:
    """The ``DualModeModel`` inside DDP, FSDP, DeepSpeed and peft wrappers; TypeError when there is none."""
    inner: Any = model
    while not isinstance(inner, DualModeModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise TypeError(f"model is a {type(model).__name__}; expected a DualModeModel, wrapped or not")
    return inner


def vision_tower(model: nn.Module) -> nn.Module:
    """The vision tower with its merger(s) of a dual-mode model, wrapped or not."""
    return dual_mode_of(model).model.visual


# --- when gradients travel -------------------------------------------------------------------------------------------


class GradSync:
    """How gradients travel on one process: not at all. Base of the others.

    model: the wrapped model (DDP, FSDP2, DeepSpeed engine). backward: runs one backward of a scalar, in place of
    ``loss.backward()`` (a gradient scaler). group: the ranks that share the batch; None: the default group.
    """

    lockstep = False

    def __init__(self, model: nn.Module | None = None, *, backward: Backward | None = None, group: Any = None) -> None:
        self.model, self.run_backward, self.group = model, backward or torch.autograd.backward, group

    def parameters(self) -> Iterable[Tensor]:
        """The model's parameters."""
        return () if self.model is None else self.model.parameters()

    def begin(self) -> None:
        """Called before the first forward of a step."""

    def local(self) -> AbstractContextManager[Any]:
        """Stand around every forward of the step."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run the backward of one micro-batch; with ``last`` the gradients of the whole step are exchanged."""
        self.run_backward(loss)

    def agree(self, count: int, kept: int) -> tuple[int, int]:
        """Agree on the largest count and the smallest kept of all ranks: one small all-reduce, read on the host.

        Ranks that gather parameters in every forward have to run the same sequence of forwards and backwards.
        """
        if not (dist.is_initialized() and dist.get_world_size(self.group) > 1):
            return count, kept
        nccl = dist.get_backend(self.group) == "nccl"
        numbers = torch.tensor([count, -kept], device="cuda" if nccl else "cpu")
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        largest, smallest = numbers.tolist()
        return largest, -smallest


class DDPSync(GradSync):
    """Under DistributedDataParallel every forward runs unsynchronised, then the last backward is armed.

    Not by running the last forward outside of ``no_sync``: other backwards lie between that forward and its own
    backward when its graph was kept, and each would fire the reducer. Arming the reducer for a graph made earlier is
    what accelerate's ``trigger_sync_in_backward`` and Lightning do too; the loss is handed over so that
    ``find_unused_parameters`` finds what the last graph does not use (gradients of earlier micro-batches still count).
    """

    model: DistributedDataParallel

    def __init__(self, model: DistributedDataParallel, **options: Any) -> None:
        if model.static_graph:
            raise ValueError("model is DDP with static_graph=True, which cannot skip the reduction; set it to False")
        super().__init__(model, **options)

    def begin(self) -> None:
        """Exchange here what DDP's forwards would exchange: they do so in an order that depends on whether the first
        has a graph, and a rank may keep all its graphs, or have one micro-batch, while another's first forward has
        none."""
        model: Any = self.model
        model.reducer._rebuild_buckets()
        if model.will_sync_module_buffers():
            model._sync_buffers()
        model.require_forward_param_sync = False

    def local(self) -> AbstractContextManager[Any]:
        return self.model.no_sync()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        model = self.model
        if last:
            # so that the next step's first forward broadcasts the buffers, as after any synchronised step
            model.require_forward_param_sync = True
            model.reducer.prepare_for_backward([loss] if model.find_unused_parameters else [])
            self.run_backward(loss)
            return
        with model.no_sync():
            self.run_backward(loss)


class FSDPSync(GradSync):
    """Under FSDP2 (``fully_shard``) gradients add up unsharded until the last backward reduces them.

    That takes the memory of one full gradient; ``every=True`` reduces with every micro-batch instead.
    """

    lockstep = True

    def __init__(self, model: nn.Module, *, every: bool = False, **options: Any) -> None:
        super().__init__(model, **options)
        self.every = every
        self.units: list[Any] = [module for module in model.modules() if _is_fsdp(module)]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        for unit in self.units:
            unit.set_requires_gradient_sync(last or self.every, recurse=False)
            unit.set_is_last_backward(last)
        self.run_backward(loss)


class DeepSpeedSync(GradSync):
    """In a DeepSpeed engine the accumulation boundary is the last backward. The caller runs ``engine.step()`` after it.

    last: runs the last backward in place of ``engine.backward`` (accelerate's also takes the optimizer step).
    """

    def __init__(self, model: Any, *, last: Backward | None = None, group: Any = None) -> None:
        super().__init__(model, group=group)
        self.last = last
        self.lockstep = model.zero_optimization_stage() >= 2

    def backward(self, loss: Tensor, *, last: bool) -> None:
        engine: Any = self.model
        # ZeRO-3 counts a finished backward at the next forward; of two backwards in a row (kept graphs) the second
        # would overwrite the first one's gradients instead of adding to them
        count = getattr(engine.optimizer, "clear_backward_seen_flag", None)
        if count is not None:
            count()
        if last and self.last is not None:
            self.last(loss)
            return
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, scale_wrt_gas=False)


def grad_sync(model: nn.Module, *, backward: Backward | None = None, group: Any = None) -> GradSync:
    """The ``GradSync`` of a wrapped model.

    backward: in place of ``loss.backward()``; for a DeepSpeed engine, in place of its LAST ``engine.backward``.
    Raises TypeError for FSDP1 (``FullyShardedDataParallel``), ValueError for DDP with a static graph.
    """
    if isinstance(model, DistributedDataParallel):
        return DDPSync(model, backward=backward, group=group)
    if hasattr(model, "zero_optimization_stage"):
        return DeepSpeedSync(model, last=backward, group=group)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TypeError("model is wrapped by FSDP1 (FullyShardedDataParallel); expected FSDP2 (fully_shard)")
    if any(_is_fsdp(module) for module in model.modules()):
        return FSDPSync(model, backward=backward, group=group)
    return GradSync(model, backward=backward, group=group)


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync") and hasattr(module, "unshard")


# --- whole parameters ------------------------------------------------------------------------------------------------


def is_gathered(model: nn.Module) -> bool:
    """Whether ``model`` is sharded and whole at the moment, by a ``whole_parameters`` block."""
    return model in _WHOLE


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Make all parameters of ``model`` whole on every rank inside this block, without a collective call in its
    forwards.

    model: as it is, in DDP or in ZeRO-1 and 2 (nothing to do), in DeepSpeed ZeRO-3, or sharded by FSDP2's
    ``fully_shard``; wrapped or unwrapped. Every rank must enter and leave, in step; inside they may differ: call the
    inner model (``dual_mode_of``), as often as needed, without gradients. The block may change no parameter. It costs
    the memory of the whole model in the dtype in which the forward has it, and one gather a parameter group (FSDP2) or
    a model (ZeRO-3). Forward hooks of all modules sleep where parameters are sharded.

    Raises TypeError for FSDP1.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TypeError("model is wrapped by FSDP1 (FullyShardedDataParallel); expected FSDP2 (fsdp_version 2)")
    if is_gathered(model):
        yield
        return
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    sharded: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    if not partitioned and not sharded:
        yield
        return
    inside = list(model.modules())
    _WHOLE.update(inside)
    try:
        _wait_for_flying(model)
        with _zero3(partitioned), _fsdp2(sharded), _hooks_asleep(model):
            yield
    finally:
        _WHOLE.difference_update(inside)


def _wait_for_flying(model: nn.Module) -> None:
    """ZeRO-3 fetches parameters ahead of their module; those whose module then did not run (the last of a forward, in
    another order than the one before) are still in flight, and can be neither gathered nor put back."""
    for module in model.modules():
        registry = getattr(module, "ds_inflight_param_registry", None)
        for parameter in list(registry or ()):
            registry.pop(parameter).wait()  # type: ignore[union-attr]


@contextmanager
def _zero3(parameters: list[nn.Parameter]) -> Iterator[None]:
    if not parameters:
        yield
        return
    import deepspeed

    # Small ones may be whole since their first use (ZeRO-3's persistence threshold), and stay so.
    missing = [p for p in parameters if p.ds_status.name != "AVAILABLE"]  # type: ignore[attr-defined]
    with deepspeed.zero.GatheredParameters(missing, enabled=bool(missing)):
        yield


@contextmanager
def _fsdp2(modules: list[Any]) -> Iterator[None]:
    handles = [module.unshard(async_op=True) for module in modules]  # the gathers of all units run one after another
    for handle in handles:
        handle.wait()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


@contextmanager
def _hooks_asleep(model: nn.Module) -> Iterator[None]:
    kept = [(m, m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    for module, _, _ in kept:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after
