"""The KL's reference policy: the adapter switched off, a frozen copy, or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Reference:
    """Log-probabilities of the model as it was before Refine-RL.

    kind: "auto", "adapter", "copy" or "none" (see RefineConfig.reference). Raises ValueError for "adapter" without
    one, and for a copy of a model whose parameters are sharded (ZeRO-3, FSDP at load): use an adapter or beta=0 there.
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
            return model(**batch, pools={}, temperature=temperature).logp
