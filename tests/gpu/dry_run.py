"""A card that is not there: Triton kernels are specialised and compiled for it at their real call sites, not run.

Inside ``dry_card`` Triton believes in an H100: every launch goes through its real binder (divisibility, None,
constants, descriptors) and compiler, and ends in a launcher that does nothing. Tensors are fakes on "cuda" (torch's
FakeTensorMode), so that the CUDA branches are taken and whatever would read a value on the host raises.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that launch nothing: they make or look at memory.
_FREE = (
    "empty", "view", "slice", "select", "expand", "as_strided", "detach", "t", "transpose", "unsqueeze", "squeeze",
    "permute", "alias", "unbind", "device", "split", "split_with_sizes", "reshape", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "unfold", "lift_fresh", "_reshape_alias", "is_pinned",
)  # fmt: skip


LAUNCHES: Counter[str] = Counter()  # by kernel: what is compiled outlives a card


class _Driver:
    """What Triton asks a driver. binaries: how many of each kernel were made. made: (metadata, machine code) of
    each."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        self.binaries: Counter[str] = Counter()
        self.newest: Any = None
        self.made: list[tuple[Any, bytes]] = []
        self.utils = self
        driver = self

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.name = metadata.name
                driver.newest = metadata

            def __call__(self, *args: Any, **options: Any) -> None:
                LAUNCHES[self.name] += 1

        self.launcher_cls = Launcher

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.binaries[name] += 1
        self.made.append((self.newest, kernel))  # the launcher is made just before
        return 1, 1, 128, 0, 1024

    def unload_module(self, module: int) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


class _Launches(TorchDispatchMode):
    """Counts the operations that would launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.first = -1  # how many came before the first product

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "mm" and self.first < 0:
            self.first = sum(self.count.values()) + sum(LAUNCHES.values())
        if name not in _FREE:
            self.count[name] += 1
        if "dtype" in func._overloadname and kwargs and "out" in kwargs:
            return kwargs["out"]  # mixed products, of which the fakes know none
        return func(*args, **(kwargs or {}))


class Card:
    """binaries: distinct kernels made for it, by name; made: each with its machine code. operations: torch's own
    launches by name."""

    def __init__(self, driver: _Driver, operations: _Launches) -> None:
        self.binaries, self.made, self.operations = driver.binaries, driver.made, operations.count
        self.torch = operations
        LAUNCHES.clear()

    @property
    def launches(self) -> int:
        return sum(LAUNCHES.values()) + sum(self.operations.values())


@contextmanager
def dry_card(capability: int = 90) -> Iterator[Card]:
    """Make the card for a block; TRITON_INTERPRET must have been unset when triton was imported."""
    with pytest.MonkeyPatch.context() as patch:
        yield from _dry_card(patch, capability)


def _guard_for_cuda() -> None:
    """A torch built for the CPU alone indexes no tensor that says it is on "cuda", a fake one neither, for want of a
    device guard: it gets one that does nothing."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", tempfile.gettempdir()))
    folder.mkdir(parents=True, exist_ok=True)
    library, home = folder / "no_guard.so", Path(torch.__file__).parent
    if not library.exists():
        words = ["-std=c++20", "-shared", "-fPIC", "-x", "c++", "-"]
        paths = f"-I{home / 'include'}", "-o", str(library), f"-L{home / 'lib'}", "-lc10"
        subprocess.run([os.environ.get("CXX", "c++"), *words, *paths], input=GUARD, text=True, check=True)
    ctypes.CDLL(str(library))


GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }
"""


def _dry_card(monkeypatch: pytest.MonkeyPatch, capability: int) -> Iterator[Card]:
    from triton.runtime.driver import driver

    if torch.version.cuda is None:
        _guard_for_cuda()
    fake = _Driver(capability)
    driver.set_active(fake)
    properties = type("Properties", (), {"multi_processor_count": 132, "major": 9, "minor": 0, "total_memory": 80 << 30,
                                         "L2_cache_size": 50 << 20, "name": "H100"})  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 256, raising=False)
    operations = _Launches()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=False), operations:
        yield Card(fake, operations)


# --- what is run ------------------------------------------------------------------------------------------------------


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="cuda")


def index(*size: int) -> torch.Tensor:
    return empty(*size, dtype=torch.int64)


def head(
    backend: str,
    rows: int,
    width: int,
    vocabulary: int,
    dtype: str = "bfloat16",
    entropy: bool = False,
    read: bool = True,
) -> None:
    """The summed loss, its scaling, log-probabilities and their backward, with two read-outs, without csrc."""
    from rime_fast.ops.logprob_pool import op
    from rime_fast.ops.logprob_pool import rows as row_kernels
    from rime_fast.ops.logprob_pool.arguments import check_late, prepare
    from rime_fast.ops.logprob_pool.problem import Needs

    kind = getattr(torch, dtype)
    x, w, y = empty(rows, width, dtype=kind), empty(vocabulary, width, dtype=kind), index(rows)
    pools = {"disc": index(4), "gen": (index(4), index(4))} if read else None
    call = prepare(x, w, y, pools, None, 1.0, None, -100, entropy, True, backend, None, rows, op.TABLE)
    options, none = call.options._replace(needs=Needs(True, True, False, False)).encode(), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_kernels, "_kernels", lambda logits: "triton")
        loss, *found = op.linear_ce._init_fn(*call.tensors, None, options, "")
        check_late(call)
        embeddings, norms, made = found[3], found[4], found[5:]
        spans = call.tensors[3:5]
        op.scale_gradients_._init_fn(made, loss, embeddings, spans, (embeddings, norms), options)
        op.scale_gradients_._init_fn(made, loss, none, spans, (embeddings, norms), options)
        known = op.logprob_pool._init_fn(*call.tensors, options, "")
        slope = torch.empty_like(known[0])
        arrived = slope, slope if entropy else none, torch.empty_like(known[3])
        op.logprob_pool_backward._init_fn(*arrived, *call.tensors, *known, options, "")


def contrast(backend: str, rows: int, width: int, terms: int = 4, margin: bool = False, widths: bool = False) -> None:
    """Forward and backward of terms over as many modes as they need; csrc's kernels only counted."""
    from rime_fast.ops.contrastive import cuda, op, tiles
    from rime_fast.ops.contrastive.problem import Options

    class Counted(cuda.CudaRows):
        def statistics(self, tile: torch.Tensor, *rest: Any) -> None:
            self.workspace(tile)
            LAUNCHES["csrc"] += 2

        def gradient(self, tile: torch.Tensor, *rest: Any) -> torch.Tensor:
            LAUNCHES["csrc"] += 1
            return tile.to(torch.bfloat16) if len(rest) < 6 else rest[5]

    modes = 1
    while modes * modes < terms:
        modes += 1
    queries, keys = ([empty(rows, width) for _ in range(modes)] for _ in range(2))
    pairs = tuple((q, k) for q in range(modes) for k in range(modes))[:terms]
    ids = index(rows) if margin else None
    cut = (width // 4, width // 2, width) if widths else ()
    keep = backend == "chunked" and 4 * terms * rows * rows <= op.memory_of(0) // op.KEEP_SHARE
    options = Options(pairs, 0.1 if margin else None, True, backend, cut, keep).encode()
    inputs = queries, keys, empty(dtype=torch.float32), None, ids, ids, options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "CudaRows", Counted)
        patch.setattr(tiles, "has_compiled_rows", lambda tensor: True)
        _, _, *solved = op.contrastive(*inputs)
        grad = empty(terms * max(1, len(cut)), dtype=torch.float32)
        op.contrastive_backward(grad, *solved, *inputs, [True] * modes, [True] * modes, False)


def decode(prompts: int, group: int, heads: int, kv: int, width: int, longest: int, normed: bool = False) -> None:
    """One layer of a decode step, and the norm after it."""
    from types import SimpleNamespace as Module

    from rime_fast.engine import fused_decode

    hidden, n = heads * width, prompts * group

    def linear(inside: int, outside: int) -> Any:
        weight = empty(outside, inside)
        return lambda x: torch.nn.functional.linear(x, weight)

    def norm(size: int) -> Any:
        return Module(weight=empty(size), variance_epsilon=1e-6)

    attention = Module(
        layer_idx=0, head_dim=width, scaling=width**-0.5, q_proj=linear(hidden, hidden), o_proj=linear(hidden, hidden)
    )
    attention.k_proj, attention.v_proj = linear(hidden, kv * width), linear(hidden, kv * width)
    if normed:
        attention.q_norm, attention.k_norm = norm(width), norm(width)
    mlp = Module(gate_proj=linear(hidden, 512), up_proj=linear(hidden, 512), down_proj=linear(512, hidden))
    layer = Module(self_attn=attention, mlp=mlp, input_layernorm=norm(hidden), post_attention_layernorm=norm(hidden))
    turned = empty(n, 1, width)
    model = Module(layers=[layer], norm=norm(hidden), rotary_emb=lambda x, at: (turned, turned))
    cache = Module(group=group, capacity=64, at=index(1), lengths=empty(prompts, dtype=torch.int32))
    cache.prompt_keys = cache.prompt_values = {0: empty(prompts, kv, longest, width)}
    cache.own_keys = cache.own_values = {0: empty(n, kv, 64, width)}
    fused_decode.next_hidden(model, cache, empty(n, hidden), index(n))


def reward(rows: int, anchors: int, width: int) -> None:
    """A bank in 16 bits by Triton's kernel, all statistics of the negatives."""
    from rime_fast.ops.reward import op
    from rime_fast.ops.reward.weights import NEGATIVES, RewardWeights

    for negative in NEGATIVES:
        numbers = RewardWeights(negative=negative).encode()
        out = empty(rows // 8, 8, dtype=torch.float32), empty(rows // 8, 8, dtype=torch.float32)
        given = empty(rows // 8, 8, width), empty(anchors, width), index(rows // 8)
        ok = empty(rows // 8, 8, dtype=torch.bool)
        op._score_rewrites(*out, [], [], *given, ok, None, None, None, None, numbers, "", "triton", False)


def merge(rows: int, heads: int, width: int) -> None:
    """The two passes of a shared prefix."""
    from rime_fast.model.triton_prefix import merge_passes

    lse = empty(heads, rows, dtype=torch.float32).T
    merge_passes(empty(rows, heads, width), lse, empty(rows, heads, width), lse)


def nucleus(rows: int, columns: int, dtype: str) -> None:
    """The smallest logit that stays in."""
    from rime_fast.engine.sampling import filter_logits

    filter_logits(empty(rows, columns, dtype=getattr(torch, dtype)), 0.9)


RUNS = {"nucleus": nucleus, "merge": merge, "head": head, "contrast": contrast, "decode": decode, "reward": reward}


def main() -> None:
    """Runs the calls given as JSON, [[name, arguments, options], ...], and prints what each launched and made."""
    for name, arguments, options in json.loads(sys.argv[1]):
        with dry_card() as card:
            RUNS[name](*arguments, **options)
            found = {"launches": card.launches, "kernels": dict(LAUNCHES), "operations": dict(card.operations)}
            found["first"] = card.torch.first
        for metadata, code in card.made if "RIME_DRY_CODE" in os.environ else ():
            one = {"name": metadata.name, "warps": metadata.num_warps, "shared": metadata.shared}
            path = Path(os.environ["RIME_DRY_CODE"]) / f"{metadata.hash}.cubin"
            path.write_bytes(code)
            found.setdefault("made", []).append(one | {"operator": name, "code": str(path)})
        print(json.dumps(found | {"binaries": sum(card.binaries.values())}), flush=True)


if __name__ == "__main__":
    main()
