"""A larger embedder's vectors of a training set, found by what an item is, for distillation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rime_fast.engine.anchor_bank import AnchorBank
from rime_fast.ops.checks import require


class TeacherRows:
    """Finds the rows of one side's bank (``rime-fast embed --anchors`` with the teacher) by the items' hashes.

    path: the bank's file. device: where its rows lie; on the CPU they stay in the file's memory map.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        bank = AnchorBank.open(path, model=None, data=None)
        self.path, self.side, self.anchors = Path(path), bank.side, bank.anchors.to(device)
        self.digest = bank.digest
        self.ids, self.order = (found.to(device) for found in bank.ids[:, 0].sort())

    def of(self, ids: Tensor) -> Tensor:
        """Look up the rows [n, D'] of the items with these hashes [n] (``stable_hash``).

        Raises ValueError (on the CPU; elsewhere an asynchronous assertion) for an item that the bank does not hold.
        """
        place = torch.searchsorted(self.ids, ids).clamp_max(len(self.ids) - 1)
        require(self.ids[place] == ids, f"{self.path} lacks a {self.side} of this batch; make it of this training set")
        return self.anchors[self.order[place]]
