"""One decode step of B prompts x G rollouts, keys of prompts of mixed length in the cache, against its bare products.

The floor is every linear layer's product, recorded as a CUDA graph on a GPU: the weights read once. "ours" is what
rollouts run; "ours, by modules" the same step through transformers' own layers. No weights are loaded: random ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.joint_step import stock_model
from rime_fast.bench.harness import FLOOR, Results, Row, compare, dtype_name
from rime_fast.engine import fused_decode
from rime_fast.engine.decode import DecodeCache, DecodeStep, PrefillRecorder, graph_pool, record_graph
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.packing import PACKED_SDPA

BENCH = "decode_step"


@dataclass(frozen=True)
class Shape:
    """The model (of benchmarks.lib.joint_step.MODELS), the rollouts, and the tokens behind them."""

    model: str
    prompts: int
    group: int
    prompt: int  # tokens of the longest
    own: int  # tokens that each rollout has already

    def __str__(self) -> str:
        return f"{self.model}-{self.prompts}x{self.group}-prompt{self.prompt}-own{self.own}"


SHAPES = {
    "tiny": [Shape("tiny", 2, 2, 8, 3)],
    "cpu": [Shape("14M", 4, 4, 256, 32)],
    "cuda": [
        Shape("qwen2-vl-2b", 4, 8, 1024, 64),
        Shape("qwen2-vl-2b", 16, 8, 1024, 64),
        Shape("qwen2-vl-2b", 64, 8, 256, 64),
    ],
}


def measure(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 7,
) -> dict[str, Row]:
    """Rows of the floor and of a step, fused and by modules (on a GPU, where both are recorded as graphs)."""
    policy: Any = DualModeModel.from_model(stock_model(shape.model, device, dtype))
    policy.eval()
    policy.model.language_model.config._attn_implementation = PACKED_SDPA
    linears = [m for part in (policy.model.language_model, policy.lm_head) for m in part.modules()]
    linears = [m for m in linears if isinstance(m, nn.Linear)]
    impls = {FLOOR: floor(linears, shape.prompts * shape.group), "ours": step(policy, shape, fused=True)}
    if device == "cuda":
        impls["ours, by modules"] = step(policy, shape, fused=False)
    weights = sum(m.weight.numel() for m in linears)
    return compare(
        BENCH,
        str(shape),
        impls,
        shape={"rows": shape.prompts * shape.group, "parameters": weights, "dtype": dtype_name(dtype)},
        device=device,
        rounds=rounds,
        results=results,
        step=True,
        flops=2.0 * weights * shape.prompts * shape.group,
        nbytes=float(weights * dtype.itemsize),
    )


@torch.no_grad()
def floor(linears: list[Any], rows: int) -> Callable[[], object]:
    """Make the call that multiplies ``rows`` rows by every weight."""
    like = linears[0].weight
    inputs = {m.in_features: torch.randn(rows, m.in_features, device=like.device, dtype=like.dtype) for m in linears}

    @torch.no_grad()
    def products() -> tuple[Tensor, Tensor]:
        last = [torch.nn.functional.linear(inputs[m.in_features], m.weight) for m in linears][-1]
        return last, last

    return record_graph(products, graph_pool())[1] if like.is_cuda else products


def step(policy: Any, shape: Shape, fused: bool) -> Callable[[], Tensor]:
    """Make the call of one step, always the same: the place of the next token is put back after it."""
    text = policy.model.language_model
    weight = text.embed_tokens.weight
    lengths = [shape.prompt - i % 5 for i in range(shape.prompts)]
    recorder = PrefillRecorder(lengths, weight.device)
    size = sum(lengths), text.config.num_key_value_heads, text.layers[0].self_attn.head_dim
    for layer in range(len(text.layers)):
        recorder.keys[layer], recorder.values[layer] = (
            torch.randn(size, device=weight.device, dtype=weight.dtype) for _ in range(2)
        )
    cache, n = DecodeCache(recorder, shape.group, shape.own + 1, static=True), shape.prompts * shape.group
    start = torch.zeros(n, text.config.hidden_size, device=weight.device, dtype=weight.dtype)
    decoder = DecodeStep(policy, cache, "graph" if weight.is_cuda else "eager", start, start)
    token = torch.arange(n, device=weight.device) % 100
    position = torch.full_like(token, shape.prompt + shape.own)
    cache.step += shape.own
    cache.at += shape.own

    @torch.inference_mode()
    def call() -> Tensor:
        served, fused_decode.DEVICES = fused_decode.DEVICES, fused_decode.DEVICES if fused else set()
        try:
            hidden = decoder.feed(token, position)
        finally:
            fused_decode.DEVICES = served
        cache.step -= 1
        cache.at -= 1
        return hidden

    return call
