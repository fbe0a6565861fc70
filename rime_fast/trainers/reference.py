"""The KL's reference policy: the adapter switched off, a frozen copy, or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rime_fast.trainers.setup import vision_tower


class Reference:
    """Log-probabilities of the model as it was before Refine-RL.

    kind: "auto", "adapter", "copy" or "none" (see RefineConfig.reference). Raises ValueError for "adapter" without
    one, and for a copy of a model whose parameters are sharded at load (ZeRO-3): use an adapter or beta=0 there. Under
    FSDP2 the copy is made before the sharding: every rank holds it whole.
    """

    def __init__(self, model: nn.Module, kind: str, beta: float) -> None:
        adapted = hasattr(model, "disable_adapter")
        if kind == "auto":
            kind = "none" if beta == 0 else "adapter" if adapted else "copy"
        if kind == "adapter" and not adapted:
            raise ValueError("reference='adapter' needs a peft model (peft_config); this model has no adapter")
        self.kind = kind
        self.copy: Any = None
        if kind == "copy":
            if any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters()):
                raise ValueError("reference='copy' cannot copy sharded parameters; use an adapter, or beta=0")
            self.copy = copy.deepcopy(model).eval().requires_grad_(False)

    @contextmanager
    def model(self, policy: Any) -> Iterator[Any]:
        """The reference to call in this block; ``policy`` is the unwrapped policy."""
        if self.kind == "adapter":
            training = policy.training
            policy.eval()
            with policy.disable_adapter():
                yield policy
            policy.train(training)
        else:
            device = next(policy.parameters()).device
            yield self.copy.to(device)

    @torch.no_grad()
    def logp(self, policy: Any, batch: dict[str, Any], temperature: float) -> Tensor | None:
        """[T] fp32 of ``batch["targets"]``; None without a reference."""
        if self.kind == "none":
            return None
        with self.model(policy) as model:
            if self._dtype(model) != self._dtype(policy):  # DeepSpeed casts the policy, not the copy made before
                batch = {name: value for name, value in batch.items() if name != "vision_cache"}
            return model(**batch, pools={}, temperature=temperature).logp

    @staticmethod
    def _dtype(model: nn.Module) -> torch.dtype:
        return next(vision_tower(model).parameters()).dtype
