"""Checkpoints as shards that are written while training goes on (FSDP2): resumed bitwise, whole at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file

from rime_fast.model.dual_mode import DualModeModel
from rime_fast.trainers.config import RefineConfig, RimeConfig
from tests.ranks import run_ranks
from tests.trainers import async_save_worker as worker
from tests.trainers.test_cached_ranks import start_from


def model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() ^ other.keys() <= {"lm_head.weight"}  # a tied head may be there too
    return all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys())


@pytest.mark.dist
def test_nothing_is_lost_and_a_resumed_run_is_bitwise_the_same(tmp_path):
    start_from(tmp_path)
    run_ranks(worker.main, 2, str(tmp_path))
    assert same(model(tmp_path / "whole"), model(tmp_path / "broken"))
    assert not (tmp_path / "broken" / ".partial").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_both_forms_adapters_the_best_and_another_number_of_ranks(tmp_path):
    start_from(tmp_path)
    run_ranks(worker.more, 2, str(tmp_path))
    whole = model(tmp_path / "whole")
    assert same(whole, model(tmp_path / "to-shards"))
    assert same(whole, model(tmp_path / "from-shards"))
    adapters = [
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("lora", "lora-resumed")
    ]
    assert same(*adapters)
    last = tmp_path / "whole" / "checkpoint-4"
    merge_fsdp_weights(str(last / "pytorch_model_fsdp_0"), str(last))
    merged = DualModeModel.from_pretrained(last).state_dict()
    assert same(merged, DualModeModel.from_pretrained(tmp_path / "whole").state_dict())
    (tmp_path / "whole" / "model.safetensors").unlink()
    run_ranks(worker.alone, 1, str(tmp_path))
    assert same(whole, model(tmp_path / "whole"))


@pytest.mark.parametrize("config", [RimeConfig, RefineConfig])
@pytest.mark.parametrize("settings", [{}, {"fsdp": True, "fsdp_config": {"version": 1}}], ids=str)
def test_without_fsdp2_it_is_refused(tmp_path, config, settings):
    with pytest.raises(ValueError, match=r"async_save is True, but FSDP2 does not shard .* Expected fsdp=True"):
        config(output_dir=str(tmp_path), async_save=True, **settings)
    with pytest.raises(ValueError, match=r"hub_strategy is .*every_save.*; expected 'end'"):
        config(output_dir=str(tmp_path), async_save=True, fsdp=True, push_to_hub=True)
