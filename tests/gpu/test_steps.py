"""Whole training steps on a GPU: the plain recipe's loss and gradient, the CPU's, and no waiting on the way."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lib import joint_step, refine_step
from tests.gpu.devices import BOTH, CUDA, no_synchronisation

SHAPES = {"cached": joint_step.SHAPES["tiny"][0], "one pass": joint_step.SHAPES["tiny"][1]}


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_steps_equal_the_plain_recipe(device: str, dtype: torch.dtype, bound: float) -> None:
    """The benchmarks' own checks: one loss (raises), gradients within ``bound``. On the CPU: tests/bench."""
    for shape in SHAPES.values():
        found = joint_step.measure(shape, device, dtype, rounds=1)
        assert found["ours"].error_fp64 < bound
    found = refine_step.measure(refine_step.SHAPES["tiny"][0], device, dtype, rounds=1)
    assert found["ours"].error_fp64 < bound


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("name", SHAPES)
def test_joint_step_equals_the_cpus(device: str, name: str) -> None:
    """Same weights and batch: loss and whole gradient in fp32."""
    here, there = (joint_step.Setting(SHAPES[name], one, torch.float32) for one in ("cpu", device))
    there.stock.load_state_dict(here.stock.state_dict())
    wanted, found = float(joint_step.ours(here)), float(joint_step.ours(there))
    assert abs(found - wanted) < 1e-5 * abs(wanted)
    assert joint_step.gradient_difference(there.gradients(), here.gradients()) < 1e-3


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("name", SHAPES)
def test_joint_step_never_waits(device: str, name: str) -> None:
    """Forward, loss, both passes of the cache, backward and optimizer, once the shapes are known."""
    setting = joint_step.Setting(SHAPES[name], device, torch.float32)
    first = float(joint_step.ours(setting))
    with no_synchronisation(device):
        again = joint_step.ours(setting)
    assert float(again) == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("device", BOTH)
def test_kept_graphs_change_no_bit(device: str) -> None:
    setting = joint_step.Setting(SHAPES["cached"], device, torch.float32)
    loss = joint_step.ours(setting)
    gradients = setting.gradients()
    assert torch.equal(joint_step.ours(setting, float("inf")), loss)
    assert all(map(torch.equal, setting.gradients(), gradients))
