"""torch's process-wide switches of fp32 products, by the old and the new interface: used before, and left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SWITCHES = {
    "old": "torch.set_float32_matmul_precision('medium')",
    "new": "torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = 'tf32'",
    "new, for all": "torch.backends.fp32_precision = 'tf32'",
}
SCRIPT = """
import torch
{switch}
from rime_fast.ops import dispatch
from rime_fast.ops.reward import cpu, triton
from tests.ops.contrastive_cases import check_rule, make_case, run
from tests.ops.reward_cases import assert_same, score, make_case as make_reward_case

def state():
    backends = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return [getattr(x, "fp32_precision", None) for x in backends]

before = state()
assert dispatch.tf32_allowed()
triton_runs = triton.why_not(torch.zeros(1)) is None
case = make_case(20, 30, 8, ids=True, margin=0.1)
truth, eager = run(case, torch.float64, "reference"), run(case, torch.float32, "reference")
rewards = make_reward_case(2, 3, 24, 600)
want = score(rewards, backend="reference")
for backend in ["chunked", *(["triton"] if triton_runs else [])]:
    check_rule(run(case, torch.float32, backend), eager, truth, torch.float32)
    if backend == "triton" or cpu.why_not(torch.zeros(1)) is None:
        assert_same(score(rewards, backend=backend), want)
assert state() == before
"""


@pytest.mark.parametrize("name", SWITCHES)
def test_operators_run_and_leave_the_switch(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(switch=SWITCHES[name])],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
