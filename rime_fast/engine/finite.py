"""Steps whose loss or gradient is not finite: seen before the optimizer takes them, without a wait for the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class NonFiniteError(RuntimeError):
    """Training met a NaN or an infinity that it may not go on with.

    what: the step (``describe_step``), or anything else. terms: loss terms that are not finite; None where no step is
    to blame. taken: DeepSpeed steps inside of the backward, before anybody can look.
    """

    def __init__(self, what: str, terms: Sequence[str] | None = None, *, taken: bool = False) -> None:
        if terms is not None:
            what += f"; not finite among the logged terms: {', '.join(terms) or 'none, so it is the gradient'}. "
            if taken:
                what += "DeepSpeed steps by itself and may have taken it: go on from the last checkpoint, before it"
            else:
                what += "The optimizer did not take it; on_nonfinite='skip' leaves such steps out"
            what += ". No checkpoint was written since"
        super().__init__(what)


def describe_step(step: int, norm: Tensor | float, rows: Sequence[str]) -> str:
    """How messages call a step that is not finite."""
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return f"step {step} is not finite (gradient norm {float(norm):.4g}; rows of this rank: {shown})"


class FiniteGuard:
    """Looks at every step's loss and gradient norm; ranks see the same.

    A fused optimizer is told on the device (its ``found_inf``) and leaves weights and state alone; the host learns of
    the step at the next one. For any other optimizer the host reads one flag a step, and its caller clears the
    gradients.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.device, self.group = device, group
        self.bad = torch.zeros((), device=device)  # of the batches of this step, so far
        self.late: tuple[Tensor, Any, Any] | None = None  # the last step's flag on its way to the host

    def see(self, loss: Tensor) -> None:
        """Look at the loss of one batch; called for every batch of a step."""
        self.bad = torch.maximum(self.bad, (~loss.detach().isfinite()).to(self.bad.dtype))

    def step(self, norm: Tensor | float | None, optimizer: Any, what: Any) -> Any:
        """Decide about a step before the optimizer takes it. what: describes the step. Returns the description of a
        step that was bad: this one, whose gradients the caller must clear, or the one before, which the optimizer has
        left out; else None."""
        bad, self.bad = self.bad, torch.zeros_like(self.bad)
        norm = torch.as_tensor(0.0 if norm is None else norm, device=self.device)  # DeepSpeed may know none
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = torch.maximum(bad, (~norm.isfinite()).to(bad.dtype))
        if self.group is not None:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self.group)
        inner = getattr(optimizer, "optimizer", optimizer)
        groups = getattr(inner, "param_groups", ())
        if not groups or not all(group.get("fused") for group in groups):
            return what if bool(bad) else None
        inner.found_inf = bad
        before, event = self.settle(), None
        if self.device.type == "cuda":
            flag = torch.empty((), pin_memory=True).copy_(bad, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            flag = bad
        self.late = flag, event, what
        return before

    def settle(self) -> Any:
        """Wait for the last step's flag; its description where it was bad, else None."""
        late, self.late = self.late, None
        if late is None:
            return None
        flag, event, what = late
        if event is not None:
            event.synchronize()
        return what if bool(flag) else None


def finite_rows(rows: Mapping[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Give rows with 0 in place of what is not finite, and a factor for what is made of them: 1, or NaN where something
    was. An operator may refuse such rows on all ranks or on none; so every rank goes on to the verdict on the step."""
    factor = torch.ones((), device=device)
    for x in rows.values():
        factor = torch.where(x.detach().isfinite().all(), factor, torch.nan)
    return {name: x.nan_to_num(0.0, 0.0, 0.0) for name, x in rows.items()}, factor


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> bool:
    """Whether every element is finite, on every rank; reads one number on the host."""
    # of what FSDP2 or ZeRO-3 shards, this rank's part
    parts = [x.to_local() if hasattr(x, "to_local") else getattr(x, "ds_tensor", x) for x in tensors]
    parts = [x for x in parts if x.is_floating_point() and x.numel()]
    flag = torch.ones(())
    if parts:
        # the largest magnitude of a tensor is NaN or infinite where one of its elements is
        largest = [norm.isfinite().to(parts[0].device) for norm in torch._foreach_norm(parts, float("inf"))]
        flag = torch.stack(largest).all().to(torch.float32)
    if group is not None and dist.get_backend(group) == "nccl":
        flag = flag.cuda()
    if group is not None:
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag)
