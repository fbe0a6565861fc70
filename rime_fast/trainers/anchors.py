"""The stable anchors of Refine-RL: discriminative embeddings of a whole set, computed once and kept with the run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rime_fast.data.collate import Collator
from rime_fast.trainers.rollout_batch import side_ids


@dataclass
class AnchorBank:
    """rows [A, D] fp32 unit: d of item j of one side. ids [A, 2] int64: ``side_ids`` of the items."""

    rows: Tensor
    ids: Tensor

    def to(self, device: torch.device) -> AnchorBank:
        return AnchorBank(self.rows.to(device), self.ids.to(device))

    def save(self, path: Path) -> None:
        """Write as safetensors; the data's fingerprint goes along."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"rows": self.rows.cpu().contiguous(), "ids": self.ids.cpu().contiguous()}
        save_file(tensors, path, metadata={"data": fingerprint(self.ids)})

    @classmethod
    def load(cls, path: Path, ids: Tensor) -> AnchorBank:
        """Read a bank made for the items ``ids``. Raises ValueError when it was made for others."""
        with safe_open(path, framework="pt") as file:
            if file.metadata()["data"] != fingerprint(ids):
                raise ValueError(f"{path} holds the anchors of other data than this run's; remove it to make new ones")
            return cls(file.get_tensor("rows"), file.get_tensor("ids"))


def fingerprint(ids: Tensor) -> str:
    """Equal for equal items in equal order."""
    return hashlib.blake2b(ids.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def item_ids(pairs: Any, side: str) -> Tensor:
    """``side_ids`` of one side of every pair, [A, 2] int64."""
    return side_ids([getattr(pairs[i], side) for i in range(len(pairs))])


@torch.no_grad()
def discriminative_rows(
    model: Any, pairs: Any, side: str, collator: Collator, batch_size: int, device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """d of one side of every pair, [A, D] fp32 on ``device``; the work is shared by the ranks of ``group``.

    Every rank makes the same number of forwards (FSDP and ZeRO-3 gather parameters in step).
    """
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    share = -(-len(pairs) // world)
    mine = [min(i, len(pairs) - 1) for i in range(rank * share, (rank + 1) * share)]
    training, parts = model.training, []
    model.eval()
    for start in range(0, share, batch_size):
        sides = [getattr(pairs[i], side) for i in mine[start : start + batch_size]]
        batch = to_device(collator.collate_prompts(sides, mode="disc"), device)
        parts.append(model(**batch).embeddings["disc"])
    model.train(training)
    rows = torch.cat(parts)
    if group is not None:
        everyone = rows.new_empty(world * share, rows.shape[1])
        dist.all_gather_into_tensor(everyone, rows.contiguous(), group=group)
        rows = everyone
    return rows[: len(pairs)].float()


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of a packed batch to the device; host lists stay."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
