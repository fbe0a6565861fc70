"""The rule that picks a backend, and its explanation, on a table made for the test and on the operators' own."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rime_fast.ops import dispatch, native
from rime_fast.ops.dispatch import BackendTable, explain

TABLE = BackendTable(
    op="made",
    probes={"reference": lambda _: None, "chunked": lambda x: "fp32 only" if x.dtype != torch.float32 else None},
    order={"cpu": ("chunked", "reference")},
)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)


def test_auto_takes_the_first_that_can_serve():
    assert TABLE.choose("auto", torch.zeros(1)) == "chunked"
    assert TABLE.choose("auto", torch.zeros(1, dtype=torch.float64)) == "reference"


def test_explanation_says_why_each_other_was_not_taken():
    found = TABLE.explain(torch.zeros(1, dtype=torch.float64))
    assert found.backend == "reference"
    assert "chunked, reference of cpu" in found.why
    assert found.others == {
        "chunked": "fp32 only",
        "triton": "made has no triton backend",
        "cuda": "made has no cuda backend",
    }
    assert TABLE.explain(torch.zeros(1)).others["reference"] == "chunked comes first"


@pytest.mark.parametrize("value", ["reference", "made=reference,reward=chunked"])
def test_environment_replaces_auto_and_is_named(value, monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, value)
    found = TABLE.explain(torch.zeros(1))
    assert (found.backend, found.why) == ("reference", f"{dispatch.ENVIRONMENT} asks for it")
    assert TABLE.choose("chunked", torch.zeros(1)) == "chunked"


def test_impossible_choices_raise_with_the_reason(monkeypatch):
    with pytest.raises(ValueError, match="backend='chunked' cannot run here: fp32 only"):
        TABLE.choose("chunked", torch.zeros(1, dtype=torch.float16))
    with pytest.raises(ValueError, match="backend is 'warp'; expected one of auto"):
        TABLE.choose("warp", torch.zeros(1))
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    with pytest.raises(ValueError, match="RIME_FAST_BACKEND for made='triton' cannot run"):
        TABLE.explain(torch.zeros(1))
    for value in ("nope=chunked", "reward=chunked, contrastive"):
        monkeypatch.setenv(dispatch.ENVIRONMENT, value)
        with pytest.raises(ValueError, match="expected OPERATOR=BACKEND of logprob, contrastive, reward"):
            TABLE.explain(torch.zeros(1))


@pytest.mark.parametrize("op", dispatch.TABLES)
def test_operators_explain_themselves(op):
    found = explain(op)
    assert found.backend in ("chunked", "reference")
    assert {found.backend, *found.others} == {"reference", "chunked", "triton", "cuda"}
    assert all(found.others.values())


@pytest.mark.parametrize("op", dispatch.TABLES)
def test_operators_run_on_their_tensors_device(op, monkeypatch):
    """Triton launches on the current device, so every body makes its tensors' device the current one."""
    if op == "reward" and not native.available():
        pytest.skip("on the CPU nothing but csrc's kernels runs beside the reference")
    entered = []
    module = import_module(dispatch.TABLES[op])
    monkeypatch.setattr(module, "on_device_of", lambda tensor: entered.append(tensor.device.type) or nullcontext())
    rows = torch.randn(4, 8, requires_grad=True)
    if op == "logprob":
        module.fused_linear_ce(rows, torch.randn(9, 8), torch.tensor([1, 2, 3, 4]))[0].backward()
    elif op == "contrastive":
        module.contrastive_loss({"q": rows}, {"k": torch.randn(4, 8)}, terms=[("q", "k", 1.0)]).loss.backward()
    else:
        tensors = {"gen": rows.detach().view(2, 2, 8), "anchors": torch.randn(2, 8), "positive": torch.tensor([0, 1])}
        module.score_rewrites_(*torch.empty(2, 2, 2), **tensors, format_ok=torch.ones(2, 2, dtype=torch.bool))
    assert entered == ["cpu"] * {"logprob": 2, "contrastive": 2, "reward": 1}[op]


def test_the_tensors_device_is_the_current_one_inside(monkeypatch):
    with FakeTensorMode():
        away = torch.empty(1, device="cuda:1")
    assert isinstance(dispatch.on_device_of(away), nullcontext)  # no CUDA in this process: tracing
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert dispatch.on_device_of(away).idx == 1
    assert isinstance(dispatch.on_device_of(torch.empty(1)), nullcontext)


def test_a_compiled_program_may_ask_for_the_kernels():
    """What is found on the disk and loaded once is a constant to torch.compile, not code to trace."""

    def ask(x):
        return x + 1 if native.why_not() is None else x - 1

    x = torch.zeros(2)
    assert torch.equal(torch.compile(ask, fullgraph=True, backend="eager")(x), ask(x))
