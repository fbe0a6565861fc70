"""One switch for Liger's RMSNorm, RoPE and SwiGLU kernels on CUDA."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch

from rime_fast.model.dual_mode import dual_mode_class


def liger_problem(device: torch.device | None = None) -> str | None:
    """Why Liger's kernels cannot run here, or None when they can. ``device``: the model's."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'rime-fast[gpu]')"
    if not torch.cuda.is_available():
        return "Liger's kernels need a CUDA device and torch sees none"
    if device is not None and device.type != "cuda":
        return f"Liger's kernels need the model on CUDA; it is on {device}"
    return None


def apply_liger(model: Any) -> None:
    """Replace RMSNorm, RoPE and SwiGLU in the text part of a (dual-mode or stock) model by Liger's kernels.

    Liger's own patch functions for the three families (0.8.5) import output classes that transformers 5 no longer
    has, so its modules are put in place here; parameters and their names stay. The losses are left alone: the head is
    ours. Call it before peft, DDP or FSDP wrap the model. As with Liger's own patches, the rotary function is
    replaced for the whole family in this process.
    Raises ImportError without liger-kernel, ValueError without CUDA or for another family.
    """
    dual_mode_class(model.config)  # names an unsupported family
    problem = liger_problem()
    if problem is not None:
        raise (ImportError if "not installed" in problem else ValueError)(f"apply_liger: {problem}")
    install_liger(model)


def install_liger(model: Any) -> None:
    """Do what ``apply_liger`` does, without its checks."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb

    text = model.model.language_model
    for parent in text.modules():
        for name, norm in list(parent.named_children()):
            if not type(norm).__name__.endswith("RMSNorm") or isinstance(norm, LigerRMSNorm):
                continue
            # in_place=False: the kernel would write its gradient over one that autograd may still hold.
            new = LigerRMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, casting_mode="llama", in_place=False)
            new.weight = norm.weight
            setattr(parent, name, new.train(norm.training))
    for layer in text.layers:
        if layer.mlp.act_fn.__class__.__name__ not in ("SiLU", "SiLUActivation"):
            raise ValueError(f"hidden_act is {text.config.hidden_act!r}; Liger's SwiGLU needs 'silu'")
        layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)
    stock: Any = dual_mode_class(model.config).__mro__[2]
    sys.modules[stock.__module__].apply_rotary_pos_emb = liger_rotary_pos_emb  # type: ignore[attr-defined]
