"""Anchor banks: round trip, fingerprints, shards, memory mapping, and what they refuse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rime_fast.engine.anchor_bank import FORMAT, AnchorBank, data_fingerprint, model_fingerprint

ROWS = F.normalize(torch.randn(37, 12, generator=torch.Generator().manual_seed(0)), dim=1)
IDS = torch.arange(74).view(37, 2)


def make(path: Path, rows: Tensor = ROWS, **options: object) -> AnchorBank:
    settings: dict = {"model": "m", "data": "d", "side": "target", "batch_size": 10} | options
    return AnchorBank.make(path, range(len(rows)), lambda batch: rows[list(batch)], IDS[: len(rows)], **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    made = make(tmp_path / "runs" / "bank.safetensors", dtype=dtype)
    opened = AnchorBank.open(tmp_path / "runs" / "bank.safetensors", model="m", data="d")
    for bank in (made, opened):
        assert torch.equal(bank.anchors, ROWS.to(dtype))
        assert torch.equal(bank.ids, IDS)
        assert (bank.offset, bank.total, bank.side, bank.model, bank.data) == (0, 37, "target", "m", "d")
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["bank.safetensors"]
    # The file is plain safetensors: any reader gets the same tensors.
    assert torch.equal(load_file(tmp_path / "runs" / "bank.safetensors")["anchors"], ROWS.to(dtype))


@pytest.mark.parametrize("world", [1, 2, 3, 5, 37])
def test_shards_in_rank_order_are_the_bank(world: int, tmp_path: Path) -> None:
    make(tmp_path / "bank")
    parts = [AnchorBank.open(tmp_path / "bank", model="m", data=None, rank=r, world=world) for r in range(world)]
    assert torch.equal(torch.cat([part.anchors for part in parts]), ROWS)
    assert torch.equal(torch.cat([part.ids for part in parts]), IDS)
    sizes = [len(part.anchors) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert [part.offset for part in parts] == [sum(sizes[:r]) for r in range(world)]
    assert {part.total for part in parts} == {37}


@pytest.mark.parametrize(("model", "data", "name"), [("other", "d", "model"), ("m", "other", "data")])
def test_a_stale_bank_is_an_error(model: str, data: str, name: str, tmp_path: Path) -> None:
    make(tmp_path / "bank")
    with pytest.raises(ValueError, match=rf"stale anchor bank: its {name} fingerprint is .*, this run's is other"):
        AnchorBank.open(tmp_path / "bank", model=model, data=data)


def test_other_files_are_no_banks(tmp_path: Path) -> None:
    save_file({"anchors": ROWS}, tmp_path / "tensors")
    (tmp_path / "text").write_text("anchors")
    with pytest.raises(ValueError, match="tensors: not an anchor bank of format"):
        AnchorBank.open(tmp_path / "tensors", model=None, data=None)
    with pytest.raises(ValueError, match="text: not an anchor bank"):
        AnchorBank.open(tmp_path / "text", model=None, data=None)
    with pytest.raises(FileNotFoundError, match="nothing: no such anchor bank"):
        AnchorBank.open(tmp_path / "nothing", model=None, data=None)


def test_a_cut_off_file_is_no_bank(tmp_path: Path) -> None:
    make(tmp_path / "bank")
    whole = (tmp_path / "bank").read_bytes()
    (tmp_path / "bank").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="not an anchor bank"):
        AnchorBank.open(tmp_path / "bank", model="m", data="d")


@pytest.mark.parametrize("place", [-1, -37 * 12 * 4, -37 * 12 * 4 - 1], ids=["anchors", "first", "ids"])
def test_a_changed_bit_is_damage(place: int, tmp_path: Path) -> None:
    bank = make(tmp_path / "bank")
    assert AnchorBank.open(tmp_path / "bank", model="m", data="d").digest == bank.digest
    changed = bytearray((tmp_path / "bank").read_bytes())
    changed[place] ^= 0x40
    (tmp_path / "bank").write_bytes(changed)
    with pytest.raises(ValueError, match=rf"bank: damaged anchor bank: .*, {bank.digest} were written"):
        AnchorBank.open(tmp_path / "bank", model="m", data="d")


def test_a_bank_without_a_digest_opens(tmp_path: Path) -> None:
    """As older versions wrote them."""
    bank, metadata = make(tmp_path / "bank"), {"model": "m", "data": "d", "side": "target"}
    save_file({"ids": IDS, "anchors": ROWS}, tmp_path / "old", metadata | {"format": FORMAT})
    opened = AnchorBank.open(tmp_path / "old", model="m", data="d")
    assert torch.equal(opened.anchors, bank.anchors)
    assert opened.digest


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_a_broken_embedding_names_its_item_and_leaves_no_file(value: float, tmp_path: Path) -> None:
    rows = ROWS.clone()
    rows[23] = value
    with pytest.raises(ValueError, match="item 23: expected an embedding of unit norm"):
        make(tmp_path / "bank", rows)
    assert list(tmp_path.iterdir()) == []


def test_a_bank_is_written_beside_no_link_and_over_no_file(tmp_path: Path) -> None:
    """Whatever lies there under the name of a partial file is left alone; that of a process that died goes."""
    bank, victim = tmp_path / "bank", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f"bank.{os.getpid()}.partial").symlink_to(victim)
    orphan = tmp_path / ".bank.999999999.x.partial"
    orphan.write_text("half")
    os.utime(orphan, (0, 0))
    seen = []

    def encode(batch: range) -> Tensor:
        seen.append([path.name for path in tmp_path.glob(".bank.*.partial")])
        return ROWS[list(batch)]

    AnchorBank.make(bank, range(37), encode, IDS, model="m", data="d", side="target")
    assert len(seen[0]) == 1
    assert victim.read_text() == "precious"
    assert not bank.is_symlink()
    assert not list(tmp_path.glob(".bank.*"))


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ids: expected an int64 tensor of shape \[3 > 0, K\]"):
        AnchorBank.make(tmp_path / "b", range(3), lambda b: ROWS[:3], IDS, model="", data="", side="query")
    with pytest.raises(ValueError, match=r"encode: expected rows of shape \[10, D\]"):
        make(tmp_path / "b", ROWS[:, None])
    with pytest.raises(ValueError, match="dtype: expected float32"):
        make(tmp_path / "b", dtype=torch.float64)
    make(tmp_path / "bank")
    with pytest.raises(ValueError, match="37 anchors cannot be shared by 38 ranks"):
        AnchorBank.open(tmp_path / "bank", model=None, data=None, rank=0, world=38)
    with pytest.raises(ValueError, match="rank: expected 0 <= rank < world=2, got 2"):
        AnchorBank.open(tmp_path / "bank", model=None, data=None, rank=2, world=2)


def _resident() -> int:
    """Anonymous plus mapped pages of this process that are in memory, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_opening_maps_instead_of_reading(tmp_path: Path) -> None:
    n, width = 1 << 15, 512  # 64 MiB
    AnchorBank.make(
        tmp_path / "bank",
        range(n),
        lambda batch: torch.full((len(batch), width), width**-0.5),
        torch.zeros(n, 1, dtype=torch.int64),
        model="m",
        data="d",
        side="query",
        batch_size=4096,
    )
    before = _resident()
    bank = AnchorBank.open(tmp_path / "bank", model="m", data="d", rank=1, world=2)
    assert _resident() - before < 8 << 20
    float(bank.anchors.sum())  # reads 32 MiB of it
    assert _resident() - before > 24 << 20


def test_model_fingerprint_sees_every_parameter() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).to(torch.bfloat16))

    want = model_fingerprint(model())
    assert model_fingerprint(model()) == want
    for index in (0, 1):
        for name in ("weight", "bias"):
            other = model()
            with torch.no_grad():
                getattr(other[index], name).view(-1)[-1].mul_(1.01)
            assert model_fingerprint(other) != want
    swapped = model()
    with torch.no_grad():
        swapped[0].weight.copy_(swapped[0].weight.flip(0))
    assert model_fingerprint(swapped) != want
    assert model_fingerprint(nn.Sequential(nn.ReLU())) == model_fingerprint(nn.ReLU())
    swapped = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    swapped.load_state_dict(model().state_dict())  # the same values as fp32
    assert model_fingerprint(swapped) == want
    strided = model()
    strided[0].weight = nn.Parameter(strided[0].weight.detach().T.contiguous().T)
    assert model_fingerprint(strided) == want


def test_an_adapter_counts_when_it_changes_something() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    want = model_fingerprint(model)
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    adapted = peft.get_peft_model(model, config)
    assert model_fingerprint(adapted) == want
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_A" in name).mul_(2.0)
        assert model_fingerprint(adapted) == want
        next(p for name, p in adapted.named_parameters() if "lora_B" in name)[0, 0] = 1e-3
    assert model_fingerprint(adapted) != want
    below = model_fingerprint(adapted, frozen=True)
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name)[0, 0] = 2e-3
    assert model_fingerprint(adapted, frozen=True) == below
    for name in ("0.base_layer.weight", "1.original_module.weight"):
        with torch.no_grad():
            next(p for own, p in adapted.named_parameters() if own.endswith(name)).mul_(2.0)
        assert model_fingerprint(adapted, frozen=True) != below
        below = model_fingerprint(adapted, frozen=True)


def test_a_part_is_not_cut_again(tmp_path: Path) -> None:
    bank = make(tmp_path / "bank")
    part = bank.shard(1, 3)
    assert torch.equal(part.anchors, AnchorBank.open(tmp_path / "bank", model="m", data="d", rank=1, world=3).anchors)
    with pytest.raises(ValueError, match="the bank is a part of 12 of 37 anchors"):
        part.shard(0, 2)


def test_data_fingerprint_sees_content_and_order() -> None:
    ids = torch.arange(6).view(3, 2)
    assert data_fingerprint(ids) == data_fingerprint(ids.clone())
    assert data_fingerprint(ids) != data_fingerprint(ids.flip(0))
    assert data_fingerprint(ids) != data_fingerprint(ids.view(2, 3))
    assert data_fingerprint(["ab", "c"]) == data_fingerprint(iter(["ab", "c"]))
    assert data_fingerprint(["ab", "c"]) != data_fingerprint(["a", "bc"])
