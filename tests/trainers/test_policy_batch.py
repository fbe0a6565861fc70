"""The prompt once or G times, decoding here or elsewhere: the same step. And the step does not wait for the device."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rime_fast
from rime_fast.engine.rollout import LocalBackend
from rime_fast.trainers.config import RefineConfig
from rime_fast.trainers.refine import RefineRLTrainer

QUIET = {
    "save_strategy": "no",
    "logging_steps": 1,
    "progress": "none",
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "num_generations": 3,
    "max_completion_length": 5,
}


def trainer(tiny, folder, *, more=None, **settings):
    args = RefineConfig(output_dir=str(folder), **(QUIET | settings))
    processor = tiny.processor()
    return RefineRLTrainer(
        tiny.model(processor), args, tiny.pairs(4), processing_class=processor, template=tiny.template, **(more or {})
    )


def trained(*args, **settings):
    run = trainer(*args, max_steps=2, **settings)
    run.train()
    return run


def numbers(log):
    measured = ("second", "data_wait", "runtime", "flos", "step", "epoch")
    return {k: v for k, v in log.items() if not any(word in k for word in measured)}


@pytest.mark.parametrize(
    "settings", [{}, {"num_iterations": 2}, {"reward_mode": "ume_r1"}, {"anchors": "policy"}], ids=str
)
def test_the_step_is_that_of_separate_sequences(tiny, tmp_path, settings):
    shared, separate = (trained(tiny, tmp_path, shared_prefix=shared, **settings) for shared in (True, False))
    # The second step's rollouts come from updated weights: a last bit may change a draw, so only the first is compared.
    a, b = (numbers(run.state.log_history[0]) for run in (shared, separate))
    assert a["ratio"] == b["ratio"] == 1.0
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert math.isclose(a[name], value, rel_tol=1e-3, abs_tol=1e-6), name


class Elsewhere(LocalBackend):
    """A backend that counts what it is told and gives more than it has to."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def refresh(self, policy):
        self.calls.append("refresh")

    def generate(self, policy, sides, prompts, sampling, out=None):
        self.calls.append("generate")
        assert len(sides) == len(prompts["lengths"])
        return super().generate(policy, sides, prompts, sampling)


def test_another_backend_decodes_with_fresh_weights(tiny, tmp_path):
    backend = Elsewhere()
    run = trained(tiny, tmp_path, more={"rollout_backend": backend})
    assert backend.calls == ["refresh", "generate"] * 2
    plain = trained(tiny, tmp_path)
    assert numbers(run.state.log_history[0]) == numbers(plain.state.log_history[0])


def test_rollouts_in_parts_and_without_loops(tiny, tmp_path):
    run = trained(tiny, tmp_path, rollout_batch=3, repetition_limit=2, max_completion_length=12)
    log = run.state.log_history[0]
    assert log["ratio"] == 1.0
    assert all(math.isfinite(value) for value in log.values())
    with pytest.raises(ValueError, match="repetition_limit"):
        RefineConfig(output_dir=str(tmp_path), repetition_limit=1)


# Where a host read on the CPU is not one on a device: (file, function) and why.
HOST_ONLY = {
    ("model/prefix_attention.py", "make"): "bounds of host tensors",
    ("model/packing.py", "_index"): "layouts of host tensors",
    ("model/shared_prefix.py", "_places"): "row arithmetic on host tensors",
    ("model/vision.py", "_geometry"): "grids are host tensors",
    ("model/vision.py", "vision_features"): "grids are host tensors",
    ("model/dual_mode.py", "_placeholders"): "checks the numbers of image tokens on the CPU only; asynchronous on CUDA",
    ("ops/checks.py", "require"): "value checks, on the CPU only; asynchronous on CUDA",
    ("ops/checks.py", "require_range"): "the same",
    ("ops/reward/op.py", "_check_distinct"): "offsets in memory are host tensors",
    ("ops/logprob_pool/arguments.py", "_check_targets"): "the same",
    ("ops/logprob_pool/cpu.py", "__init__"): "the CPU's schedule numbers its scored rows; Triton's does not",
    ("ops/logprob_pool/read_outs.py", "read_outs_forward"): "the CPU's; Triton's does not look at the spans",
    ("ops/logprob_pool/read_outs.py", "start_gradient_"): "the same",
    ("ops/logprob_pool/read_outs.py", "scale_"): "the same",
}
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount}


class HostReads(TorchDispatchMode):
    """Collects where the host reads values of tensors: item, bool, float, int, nonzero, boolean indexing, unique; and
    by patches tolist, cpu and numpy."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.places = set()
        for name in ("tolist", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self.noted(getattr(torch.Tensor, name)))

    def noted(self, method):
        def read(tensor, *args, **kwargs):
            self.note()
            return method(tensor, *args, **kwargs)

        return read

    def note(self):
        frame, package = sys._getframe(1), str(Path(rime_fast.__file__).parent)
        while frame is not None and not frame.f_code.co_filename.startswith(package):
            frame = frame.f_back
        if frame is None:
            self.places.add(("outside", "the package"))
        else:
            self.places.add((frame.f_code.co_filename.removeprefix(package + "/"), frame.f_code.co_name))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masks = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if packet in READS or masks:
            self.note()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shared_prefix": False},
        {"micro_batch_tokens": 1, "loss_type": "token_mean"},
        {"num_iterations": 2},
        {"reward_mode": "ume_r1", "micro_batch_tokens": 1},
        {"anchors": "policy"},
        {"anchors": "policy", "trained_sides": "query"},
    ],
    ids=str,
)
def test_a_step_waits_for_no_device(tiny, tmp_path, monkeypatch, settings):
    run = trained(tiny, tmp_path, **settings)
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    drawn = run.generator.generate(run.policy, inputs["sides"], inputs["prompts"])
    monkeypatch.setattr(run.generator, "generate", lambda *_: drawn)
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    reads = HostReads(monkeypatch)
    with reads:
        for _ in range(settings.get("num_iterations", 1)):
            run.training_step(run.model, inputs)
    found = {place for place in reads.places if not place[0].startswith("data/")}  # collation is host work
    assert found <= HOST_ONLY.keys()


def test_the_count_of_host_reads_can_fail(monkeypatch):
    x = torch.arange(3.0)
    for read in (
        lambda: bool(x[0] > 0),
        lambda: int(x[0]),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x.unique(),
    ):
        with monkeypatch.context() as patch:
            reads = HostReads(patch)
            with reads:
                read()
            assert reads.places == {("outside", "the package")}


def test_the_host_reads_rollouts_once(tiny, tmp_path, monkeypatch):
    """After decoding, the tokens come to the host in one transfer."""
    run = trained(tiny, tmp_path)
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    samples = run.generator.backend.generate(run.policy, inputs["sides"], inputs["prompts"], run.generator.sampling)
    monkeypatch.setattr(run.generator.backend, "generate", lambda *_: samples)
    calls = []
    tolist = torch.Tensor.tolist
    reads = HostReads(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: calls.append(x) or tolist(x))
    with reads:
        run.generator.generate(run.policy, inputs["sides"], inputs["prompts"])
    assert len(calls) == 1
    assert not reads.places


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"micro_batch_tokens": 1}, {"num_iterations": 2}, {"bf16": True}], ids=str)
def test_a_step_on_a_gpu_never_synchronises(tiny, tmp_path, monkeypatch, settings):
    run = trained(tiny, tmp_path, **settings)
    inputs = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    drawn = run.generator.generate(run.policy, inputs["sides"], inputs["prompts"])
    monkeypatch.setattr(run.generator, "generate", lambda *_: drawn)
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(settings.get("num_iterations", 1)):
            run.training_step(run.model, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
