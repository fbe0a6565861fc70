"""Every Triton kernel compiles for a Hopper card as it is called, few are made, and few things are launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = tuple[str, list[Any], dict[str, Any]]


def dry(tmp_path: Path, *runs: Run) -> list[dict[str, Any]]:
    """What each run launched, in one process whose Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.gpu.dry_run", json.dumps(runs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_head(tmp_path: Path) -> None:
    """Odd sizes need no binary of their own: of rows, none but the first."""
    chunked, again, large, bare, tiles = dry(
        tmp_path,
        ("head", ["chunked", 2048, 256, 1024], {}),
        ("head", ["chunked", 2047, 256, 1024], {}),
        ("head", ["chunked", 8192, 1536, 151_936], {}),
        ("head", ["chunked", 8192, 1536, 151_936], {"read": False}),
        ("head", ["triton", 301, 256, 1000], {}),
    )
    rows = {"row_statistics_kernel", "row_gradient_kernel"}
    assert rows | {"start_gradient_kernel"} <= set(chunked["kernels"])
    assert chunked["launches"] <= 120
    assert again["binaries"] == 0
    assert large["launches"] <= 250  # the summed loss in six chunks and, in the same run, log-probabilities
    assert bare["first"] <= 4  # launches before the first product: what the device waits for
    assert large["first"] <= 30  # and with the checks of the read-outs, which would follow a wrong one out of memory
    assert {"forward_kernel", "dlogits_kernel", "dhead_kernel", "dhidden_kernel"} <= set(tiles["kernels"])
    assert tiles["launches"] <= 170


def test_the_contrast(tmp_path: Path) -> None:
    """Four terms of 4,096 pairs; nine terms, whose words of modes need 36 bits, on descriptors."""
    chunked, masked, tiles, odd, other, many, nine = dry(
        tmp_path,
        ("contrast", ["chunked", 4096, 1536], {}),
        ("contrast", ["chunked", 4096, 1536], {"margin": True}),
        ("contrast", ["triton", 4096, 1536], {}),
        ("contrast", ["triton", 4097, 1536], {}),
        ("contrast", ["triton", 5003, 1536], {}),
        ("contrast", ["triton", 70_000, 1536], {}),
        ("contrast", ["triton", 70, 64], {"terms": 9}),
    )
    assert chunked["kernels"] == {"csrc": 12}
    assert chunked["launches"] <= 150
    assert masked["launches"] <= 190  # masks are made once, in the forward
    assert tiles["launches"] <= 150
    assert tiles["kernels"]["gradient_kernel"] == 4
    assert odd["binaries"] == 3  # tiles that are not full
    assert other["binaries"] == many["binaries"] == 0
    assert nine["kernels"]["gradient_kernel"] == 9


def test_a_decode_step(tmp_path: Path) -> None:
    """A layer is 13 launches: seven products, two norms, attention and its merge, the gated product; and one norm."""
    merged, two, later, long, normed = dry(
        tmp_path,
        ("merge", [1000, 28, 128], {}),
        ("decode", [4, 8, 12, 2, 128, 1024], {}),
        ("decode", [5, 8, 12, 2, 128, 1031], {}),
        ("decode", [3, 8, 12, 2, 128, 5000], {}),
        ("decode", [3, 5, 4, 2, 32, 77], {"normed": True}),
    )
    ours = {"add_norm_kernel": 3, "attention_kernel": 1, "gated_kernel": 1, "merge_kernel": 1}
    assert merged["launches"] == 1
    for found in (two, normed):
        assert found["kernels"] == ours
        assert sum(found["kernels"].values()) - 1 + 7 <= 15
    assert later["binaries"] == 0  # other prompts, another length
    assert long["binaries"] == 2  # more programs share a prompt: 1, 3, 7 or 15


@pytest.mark.slow
def test_everything_else(tmp_path: Path) -> None:
    runs: list[Run] = [("reward", [64, 5000, 96], {})]
    runs += [("head", [b, 130, 96, 1001], {"dtype": d, "entropy": True}) for b in ("chunked", "triton") for d in
             ("float32", "float16", "bfloat16")]  # fmt: skip
    runs += [("contrast", ["triton", 130, width], {"margin": True}) for width in (64, 60)]
    runs += [("contrast", ["triton", 130, 64], {"widths": True, "margin": margin}) for margin in (False, True)]
    runs += [("nucleus", [64, columns, dtype], {}) for columns in (151_936, 1001) for dtype in ("float32", "bfloat16")]
    runs += [("decode", [16, 8, 28, 4, 128, 300], {}), ("decode", [2, 64, 28, 4, 128, 300], {"normed": True})]
    assert all(found["launches"] for found in dry(tmp_path, *runs))
