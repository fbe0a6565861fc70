"""Decoding reads the device in its stop check, and once more at the end; nowhere else.

On the CPU: reads are counted where Python makes them (item, tolist, int(...), if tensor: ...) and where an operator
makes them (a scalar or a size that depends on values). On a GPU: CUDA's own check, which raises.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rime_fast.engine.decode as decode_step
from rime_fast.engine.rollout import _State, generate_rollouts
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.tiny_batch import tiny_batch

VOCAB = 96
PROMPTS = [[3, ("image", 4, 6), 9], [12], [2, ("video", 2, 4, 4), 16]]
PYTHON_READS = ("item", "tolist", "nonzero", "numpy", "__bool__", "__int__", "__float__", "__index__")
OPERATOR_READS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal"}
EVERYTHING = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_limit": 3, "suppress_ids": [11, 12]}


def setting(family, **where):
    model = DualModeModel.from_model(tiny_model(family, vocab_size=VOCAB, seed=0, init_std=0.15)).eval().to(**where)
    batch = tiny_batch(model.config, PROMPTS, seed=2)
    for kind in ("image", "video"):  # as the collator gives them: on the host
        batch[f"{kind}_grids"] = batch.pop(f"{kind}_grid_thw").tolist()
    return model, {k: v.to(**where) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class OperatorReads(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in OPERATOR_READS or by_mask:
            self.reads[caller(), "operator"] += 1
        return func(*args, **(kwargs or {}))


def caller():
    """The function of ours that asked."""
    frame = sys._getframe(2)
    while frame is not None and "rime_fast" not in frame.f_code.co_filename:
        frame = frame.f_back
    return None if frame is None else frame.f_code.co_name


@pytest.fixture
def reads(monkeypatch):
    """(function, way of reading) -> how often."""
    found = Counter()

    def counted(name):
        stock, inside = getattr(torch.Tensor, name), []

        def read(self, *args, **kwargs):
            if not inside and name != "nonzero":  # nonzero is an operator, counted there
                found[caller(), name] += 1
            inside.append(1)
            try:
                return stock(self, *args, **kwargs)
            finally:
                inside.pop()

        return read

    for name in PYTHON_READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return found


def count(reads, model, batch, **options):
    reads.clear()
    with OperatorReads(reads):
        generate_rollouts(model, batch, **({"gen_id": VOCAB, "group_size": 2, "stop_ids": []} | options))
    totals = Counter()
    for (function, _), times in reads.items():
        totals[function] += times
    return totals


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("steps", "every"), [(5, 1), (12, 1), (12, 4), (13, 8)])
def test_the_host_waits_only_for_the_stop_check(family, steps, every, reads):
    model, batch = setting(family)
    generate_rollouts(model, batch, gen_id=VOCAB, max_new_tokens=1, stop_ids=[])  # layouts and geometry are kept
    totals = count(reads, model, batch, max_new_tokens=steps, check_every=every, **EVERYTHING)
    # _placeholders: a check of the batch that is made on the CPU only
    allowed = {"all_done": steps // every, "rollout": totals["rollout"], "_placeholders": totals["_placeholders"]}
    assert totals == allowed, reads
    assert 1 <= totals["rollout"] <= 2  # int(...) and the operator behind it: one read
    assert totals["all_done"] >= 1


def test_the_count_sees_what_it_should(reads):
    """Reads of every kind are found."""
    x = torch.ones(3)
    with OperatorReads(reads):
        for read in (
            lambda: x.sum().item(),
            lambda: int(x[0]),
            lambda: bool(x[0] > 0),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: x.tolist(),
            lambda: float(x[0]),
        ):
            before = sum(reads.values())
            frame_of_ours(read)
            assert sum(reads.values()) > before


def frame_of_ours(read):
    """Calls ``read`` from a file whose path has our name in it, wherever the tests lie."""
    space = {"read": read}
    exec(compile("def ours():\n    read()\nours()", "rime_fast/ours.py", "exec"), space)


@contextmanager
def waiting_allowed():
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def let_wait(function):
    def call(*args, **kwargs):
        with waiting_allowed():
            return function(*args, **kwargs)

    return call


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decode", ["eager", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_else_waits_on_the_gpu(family, decode, monkeypatch):
    """CUDA raises at any wait outside the stop check, the end of the phase, and the recording of a graph."""
    model, batch = setting(family, device="cuda")
    options = {"gen_id": VOCAB, "group_size": 2, "stop_ids": [], "max_new_tokens": 20, "decode": decode}
    generate_rollouts(model, batch, **options, **EVERYTHING)
    for owner, name in ((_State, "all_done"), (_State, "rollout"), (decode_step, "record_graph")):
        monkeypatch.setattr(owner, name, let_wait(getattr(owner, name)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = generate_rollouts(model, batch, **options, **EVERYTHING)
    finally:
        torch.cuda.set_sync_debug_mode(0)
    assert (out.lengths > 0).all()
