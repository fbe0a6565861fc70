"""A decode step of Qwen's text models by few kernels: 13 launches a layer, where their modules take 55 to 76.

The products stay the modules' own (a LoRA adapter, autocast and tied weights are theirs); what lies between them is
fused (triton_decode.py). A step is what ``transformers`` computes, rounded fewer times on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rime_fast.ops.dispatch import on_device_of

DEVICES = {"cuda"}  # a test adds the CPU, where Triton interprets
PROGRAMS = 264  # that a launch should have: two for each processor of an H100
BLOCK = 64  # keys of a step of the softmax
_PARTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "input_layernorm": ("weight", "variance_epsilon"),
    "post_attention_layernorm": ("weight", "variance_epsilon"),
}


def why_not(text_model: Any, cache: Any) -> str | None:
    """The reason this model's step over a ``decode.DecodeCache`` cannot be fused, or None."""
    if not cache.static:
        return "the cache grows"
    if torch.compiler.is_compiling():
        return "a compiler fuses on its own"
    if cache.rows.device.type not in DEVICES:
        return f"it runs on {cache.rows.device.type}"
    if text_model.config.hidden_act != "silu":
        return f"the activation is {text_model.config.hidden_act}"
    for layer in text_model.layers:
        for name, parts in _PARTS.items():
            module = getattr(layer, name, None)
            if any(getattr(module, part, None) is None for part in parts):
                return f"a layer has no {name} of the known form"
            if module._forward_hooks or module._forward_pre_hooks:  # type: ignore[union-attr]
                return f"{name} has hooks, which a fused layer would not call"
        if layer._forward_hooks or layer._forward_pre_hooks:
            return "a layer has hooks, which a fused one would not call"
        width = layer.self_attn.head_dim
        if width < 32 or width & (width - 1):
            return f"heads are {width} wide; expected a power of two of at least 32"
        if getattr(layer.self_attn, "sliding_window", None):
            return "attention slides"
    return None


def next_hidden(text_model: Any, cache: Any, embeds: Tensor, position: Tensor) -> Tensor:
    """Compute the last hidden state [N, H] at the tokens whose embeddings [N, H] and positions [N] are given, and write
    their keys and values to the cache."""
    positions = position[None, :, None].expand(3, -1, 1)
    cos, sin = (
        x.reshape(-1, embeds.shape[0], x.shape[-1])[0].contiguous()
        for x in text_model.rotary_emb(embeds[:, None], positions)
    )
    with on_device_of(embeds):
        residual, more = embeds.contiguous(), None
        for layer in text_model.layers:
            residual, x = _add_norm(residual, more, layer.input_layernorm)
            x = layer.self_attn.o_proj(_attention(layer.self_attn, cache, x, cos, sin))
            residual, x = _add_norm(residual, x, layer.post_attention_layernorm)
            more = layer.mlp.down_proj(_gated(layer.mlp.gate_proj(x), layer.mlp.up_proj(x)))
        return _add_norm(residual, more, text_model.norm)[1]


def _add_norm(residual: Tensor, more: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """(residual + more, its norm); both in the dtypes that the modules give."""
    from rime_fast.engine.triton_decode import add_norm_kernel

    rows, width = residual.shape
    dtype = residual.dtype if more is None else torch.result_type(residual, more)
    total = residual if more is None else residual.new_empty(rows, width, dtype=dtype)
    out = residual.new_empty(rows, width, dtype=torch.result_type(total, norm.weight))
    block = 1 << (width - 1).bit_length()
    add_norm_kernel[(rows,)](
        residual, more, norm.weight, total, out, norm.variance_epsilon, width, BLOCK=block, num_warps=8
    )
    return total, out


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    from rime_fast.engine.triton_decode import gated_kernel

    out = torch.empty_like(gate)
    gated_kernel[(-(-out.numel() // 1024),)](gate, up, out, out.numel(), BLOCK=1024)
    return out


def _attention(module: Any, cache: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Project, attend to the prompt's keys and the row's own, [N, H] -> [N, heads D]; writes the cache."""
    from rime_fast.engine.triton_decode import attention_kernel, merge_kernel

    layer, width = int(module.layer_idx), module.head_dim
    q, k, v = (part(x).contiguous() for part in (module.q_proj, module.k_proj, module.v_proj))
    prompt_keys, own_keys = cache.prompt_keys[layer], cache.own_keys[layer]
    prompts, kv, longest = prompt_keys.shape[:3]
    n, heads = q.shape[0], q.shape[1] // width
    together = cache.group * heads // kv  # rows that meet one prompt's keys of one head
    block = min(64, max(16, 1 << (together - 1).bit_length()))
    row_blocks = -(-together // block)
    splits = min(-(-longest // (2 * BLOCK)), max(1, PROGRAMS // (prompts * kv * row_blocks)), 15)
    splits = (1 << (splits + 1).bit_length() - 1) - 1  # 1, 3, 7 or 15: few binaries, and with the own part 2^k slots
    partial = x.new_empty(n, heads, 1 + splits, width, dtype=torch.float32)
    peaks, totals = partial.new_empty(2, n, heads, 1 + splits).unbind()
    out = x.new_empty(n, heads * width, dtype=own_keys.dtype)
    q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
    programs = prompts * kv * row_blocks * splits
    attention_kernel[(programs + n * kv,)](
        *(q, k, v, cos, sin),
        None if q_norm is None else q_norm.weight,
        None if k_norm is None else k_norm.weight,
        0.0 if q_norm is None else q_norm.variance_epsilon,
        *(prompt_keys, cache.prompt_values[layer], cache.lengths, own_keys, cache.own_values[layer], cache.at),
        *(partial, peaks, totals, module.scaling, programs, longest, cache.capacity),
        -(-longest // (splits * BLOCK)) * BLOCK,
        GROUP=cache.group,
        SHARED=heads // kv,
        KV=kv,
        HALF=width // 2,
        SPLITS=splits,
        ROW_BLOCKS=row_blocks,
        BM=block,
        BO=max(16, 1 << (heads // kv - 1).bit_length()),
        BN=BLOCK,
    )
    merge_kernel[(n * heads,)](partial, peaks, totals, out, SLOTS=1 + splits, D=width, num_warps=2)
    return out
