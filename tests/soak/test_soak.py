"""A small part of `make soak`: a trainer and a bank are killed at random moments, resumed, and bitwise the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.soak.__main__ import table

ROOT = Path(__file__).parents[2]


def test_kills_lose_nothing(tmp_path):
    words = ["--kills", "4", "--kinds", "joint", "bank", "--folder", str(tmp_path)]
    command = [sys.executable, "-m", "tests.soak", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    chains = json.loads((tmp_path / "state.json").read_text())["chains"]
    assert sum(one["kills"] for one in chains) >= 4
    assert all(one["end"] == "same" for one in chains)


def test_the_table_counts_what_went_wrong():
    chains = [
        {"kind": "joint", "kills": 4, "saving": 1, "end": "same"},
        {"kind": "joint", "kills": 2, "saving": 0, "end": "failed"},
        {"kind": "ddp", "kills": 1, "saving": 1, "end": "another model"},
    ]
    assert table(chains).splitlines()[2:] == ["| joint | 6 | 1 | 2 | 1 | 1 |", "| ddp | 1 | 1 | 1 | 0 | 0 |"]
