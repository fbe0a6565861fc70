"""RimeTrainer over ranks, by the gradient cache and plain: DDP, FSDP2 and ZeRO equal one process's plain step.

Same logs, same weights on disk; and what is on disk is what stock transformers, or peft, loads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from rime_fast.model.dual_mode import DualModeModel
from rime_fast.recipe.int8 import first_step
from tests.ranks import run_ranks
from tests.trainers.cached_ranks_worker import ONE, PAIRS, PLANS, run_plans, trained
from tests.trainers.conftest import make_model, make_processor

pytestmark = pytest.mark.dist
QUICK = ("ddp-twice", "fsdp-twice")


def start_from(folder: Path) -> Path:
    processor = make_processor()
    model = make_model(processor)
    # most numbers out of range: at a coarse step one that another order of sums rounds the other way would be seen
    model.config.int8_step = first_step(32) / 50
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    return folder / "start"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The saved model's, or those of the adapter that was trained."""
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def check(folder: Path, names: tuple[str, ...]) -> None:
    """Logs and weights of every plan against one process."""
    start = start_from(folder)
    run_ranks(run_plans, 2, str(folder), *names)
    before = weights(start)
    for kind in {name.rsplit("-", 1)[1] for name in names}:
        one = trained(start, folder / kind, per_device_train_batch_size=PAIRS, **ONE[kind])
        want = weights(folder / kind)
        for name in (name for name in names if name.endswith(kind)):
            logs = torch.load(folder / f"{name}.logs")
            for a, b in zip(logs, one.state.log_history[:-1], strict=True):
                assert a.keys() == b.keys(), name
                for key in (key for key in b if "per_second" not in key and key != "data_wait"):
                    assert a[key] == pytest.approx(b[key], rel=2e-4), (name, key)
            got = weights(folder / name)
            assert want.keys() <= got.keys() <= want.keys() | {"lm_head.weight"}, name  # a tied head may be there too
            moved = 0
            for key, value in want.items():
                known = key in before and before[key].shape == value.shape
                update = value - before[key] if known else value
                assert (got[key] - value).norm() <= 2e-3 * update.norm().clamp(min=1e-6), (name, key)
                moved += bool(update.norm() > 1e-4)
            assert moved >= 8, name


def check_stock(folder: Path) -> None:
    """A saved directory is a stock checkpoint with the tokens."""
    stock, info = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert stock.config.architectures == ["Qwen2VLForConditionalGeneration"]
    assert stock.config.int8_step != first_step(32) / 50
    saved = DualModeModel.from_pretrained(folder).state_dict()
    for name, tensor in stock.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(tensor, saved[name]), name
    assert torch.equal(stock.lm_head.weight, stock.get_input_embeddings().weight)


def test_two_ranks_equal_one_process(tmp_path):
    check(tmp_path, QUICK)
    for name in QUICK:
        check_stock(tmp_path / name)


@pytest.mark.slow
def test_plain_steps_kept_graphs_adapters_and_zero_stages(tmp_path):
    pytest.importorskip("deepspeed")
    names = tuple(name for name in PLANS if name not in QUICK)
    check(tmp_path, names)
    one = DualModeModel.from_pretrained(tmp_path / "lora").state_dict()
    for name in names:
        check_stock(tmp_path / name)
        if name.endswith("lora"):
            # the adapter's folder is the whole model too: the base with the tokens' rows, the adapter merged
            for path in (tmp_path / name, tmp_path / name / "adapter"):
                for key, value in DualModeModel.from_pretrained(path).state_dict().items():
                    torch.testing.assert_close(value, one[key], rtol=1e-3, atol=1e-4)
