"""Whole parameters for a rollout phase: gathered once, whatever the number of tokens decoded in it.

ZeRO-3 and FSDP2 keep a part of every parameter on each rank and gather the rest in hooks around each module's forward.
Decoding calls every module once a token, and ranks decode for different numbers of tokens: their hooks would move the
whole model once a token, and then wait for a rank that has stopped. Here all parameters are gathered when the phase
begins, the hooks sleep, and the parts are put back when it ends.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# The modules inside a block.
_WHOLE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_gathered(model: nn.Module) -> bool:
    """Whether ``model`` is sharded and whole at the moment, by a ``whole_parameters`` block."""
    return model in _WHOLE


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """All parameters of ``model`` on every rank inside this block, without a collective call in its forwards.

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
        with _zero3(partitioned), _fsdp2(sharded), _hooks_asleep(model):
            yield
    finally:
        _WHOLE.difference_update(inside)


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
