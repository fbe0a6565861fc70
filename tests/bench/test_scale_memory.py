"""Memory formulas of the scale model against bytes counted by torch's allocator on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.scale import memory
from benchmarks.scale.network import Contrast
from benchmarks.scale.shapes import checkpoint_shape, shape_of
from rime_fast.engine.grad_cache import measured_graph
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import FAMILIES, tiny_config, tiny_model
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.ops import cpu_products
from rime_fast.ops.contrastive import contrastive_loss
from rime_fast.ops.contrastive.cpu import TILE
from rime_fast.ops.cpu_products import COLUMNS, PART_BYTES, prefers_onednn
from rime_fast.ops.logprob_pool import fused_linear_ce
from rime_fast.ops.logprob_pool.cpu import block_rows


def peak(call: Callable[[], Any]) -> int:
    """Bytes of tensors alive at once during ``call`` beyond those before it, by the allocator's own record."""
    profiled = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profiled:
        call()
    alive = most = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def test_the_measure_itself() -> None:
    def call() -> None:
        kept = torch.zeros(1000)
        for _ in range(3):
            _ = torch.zeros(5000) + 1
        del kept

    assert peak(call) == pytest.approx(4 * (1000 + 2 * 5000), abs=64)


@pytest.mark.parametrize("n", [1024, 4096])
def test_contrast(n: int) -> None:
    """Within 5 %; on the CPU the workspace is a tile of similarities, and where oneDNN multiplies, which gives new
    tensors, one of products and a part of dk."""
    width = 128
    sides = [{m: F.normalize(torch.randn(n, width), dim=1).requires_grad_() for m in ("d", "g")} for _ in range(2)]
    terms = [("d", "d", 1.0), ("g", "g", 1.0), ("g", "d", 0.5), ("d", "g", 0.5)]

    def call() -> None:
        contrastive_loss(*sides, terms=terms, temperature=0.02, backend="chunked").loss.backward()

    call()
    for side in sides:
        for rows in side.values():
            rows.grad = None
    tile = 4.0 * min(n, TILE[0]) * min(n, TILE[1])
    part = 4.0 * min(n, TILE[1]) * width
    more = tile + part if prefers_onednn(turned=True) else 0.0  # a tile's copy, and its part of a gradient
    want = memory.contrast(Contrast(n, n, width), gpus=1, workspace=tile + more)
    assert peak(call) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("tokens", [512, 4096])
def test_head(tokens: int, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 %; on the CPU the workspace is one block of logits and, where several share its memory, as many columns
    as one product gives; else what oneDNN takes for a part of dW: its operand's copy and its result."""
    monkeypatch.setattr(cpu_products, "prefers_onednn", lambda turned=False: onednn)
    text = shape_of(tiny_config("qwen2_vl", vocab_size=8192, hidden=128)).text
    hidden, table = torch.randn(tokens, 128, requires_grad=True), torch.randn(8192, 128, requires_grad=True)
    targets = torch.randint(0, 8192, (tokens,))

    def call() -> None:
        fused_linear_ce(hidden, table, targets, backend="chunked")[0].backward()

    call()
    hidden.grad = table.grad = None
    block = block_rows(8192)
    more = 4.0 * block * COLUMNS if tokens > block else 1.5 * PART_BYTES * onednn
    workspace = 4.0 * block * 8192 + more
    want = memory.head(text, tokens, element=4, workspace=workspace)
    assert peak(call) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph(family: str, dtype: torch.dtype) -> None:
    """What the language model keeps for its backward, within 5 %: the embeddings and the last norm come on top."""
    model = DualModeModel.from_model(tiny_model(family, vocab_size=512, layers=6, hidden=128, dtype=dtype))
    batch = tiny_batch(model.config, [[100]] * 3)
    with measured_graph(model.parameters()) as graph:
        model.encode_hidden(batch["input_ids"], batch["lengths"], batch["position_ids"])
    want = memory.text_graph(shape_of(model.config).text, 300, dtype.itemsize)
    assert graph.value == pytest.approx(want, rel=0.05)


def test_states_are_sharded_as_the_strategy_says() -> None:
    shape = checkpoint_shape("qwen2-vl-2b")
    n = shape.parameters
    whole = memory.states(shape, n, "ddp", 64)
    assert sum(whole.values()) == (4 + 2 + 4 + 8) * n
    assert memory.states(shape, n, "zero1", 64)["optimizer"] == 12 * n / 64
    assert memory.states(shape, n, "zero1", 64)["gradients"] == 2 * n
    assert memory.states(shape, n, "zero2", 64)["gradients"] == 2 * n / 64
    three = memory.states(shape, n, "zero3", 512)
    assert three["weights"] > 2 * n / 512
    assert three["weights"] < 0.3 * 2 * n
    assert memory.states(shape, n, "fsdp2", 64)["gradients"] == 4 * n
