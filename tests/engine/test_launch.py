"""DeepSpeed's configuration by name, a process without a launcher, and what a failed rank leaves word of."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist

from rime_fast.engine import launch
from rime_fast.trainers.config import RimeConfig


def test_a_configuration_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    for name in ("zero2", "zero2.json", "examples/zero2.json"):
        assert os.path.samefile(launch.deepspeed_config(name), launch.example("zero2.json"))
    (tmp_path / "own.json").write_text("{}")
    assert launch.deepspeed_config("own.json") == "own.json"
    assert launch.deepspeed_config({"bf16": {}}) == {"bf16": {}}
    with pytest.raises(ValueError, match="deepspeed is 'zero9': no such file; expected one's path, or zero1"):
        RimeConfig(output_dir=str(tmp_path), deepspeed="zero9")
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'rime-fast\[deepspeed\]'"):
        launch.deepspeed_config("zero2")


def test_without_a_launcher_a_process_is_a_world_of_one(monkeypatch):
    monkeypatch.setattr(launch.os, "environ", {})
    assert "torchrun --nproc_per_node=N" in launch.start_alone()
    assert {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items() <= launch.os.environ.items()
    assert int(launch.os.environ["MASTER_PORT"]) > 0
    assert launch.start_alone() == ""


def test_the_first_failed_rank_is_named(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(launch, "_store", lambda: store)
    broken = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    assert launch.told_by_ranks(broken) == ""
    launch.tell_ranks(1, "DataError in step 3 (rows 17): a.jsonl, row 18: broken")
    launch.tell_ranks(0, "this came later")
    assert launch.told_by_ranks(ValueError("its own")) == ""
    told = "rank 1 failed first: DataError in step 3 (rows 17): a.jsonl, row 18: broken"
    assert launch.told_by_ranks(broken) == told
