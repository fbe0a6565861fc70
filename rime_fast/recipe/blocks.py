"""``contrast_scope: block``: each block of a mixture's batch as a contrast of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rime_fast.recipe.joint import JointLoss


def by_block(
    blocks: list[int], owners: list[int], loss: Callable[[Tensor, Tensor], JointLoss], device: torch.device
) -> JointLoss:
    """Average ``loss(queries, keys)`` over blocks, each of its places alone (``contrast_scope: block``).

    blocks: of each of n pairs, equally many on every rank. owners: the pair of each hard negative, whose key stands at
    n + its number.
    """
    found = [loss(*places) for places in _places(blocks, owners, device)]
    mean = 1 / len(found)

    def averaged(name: str) -> dict[Any, Tensor]:
        first = getattr(found[0], name)
        return {key: torch.stack([getattr(part, name)[key] for part in found]).mean(0) for key in first}

    total = torch.stack([part.total for part in found]).sum() * mean
    return JointLoss(total, averaged("terms"), averaged("accuracy"), averaged("per_dim"))


def _places(blocks: list[int], owners: list[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    n = len(blocks)
    for block in sorted(set(blocks)):
        own = [i for i, other in enumerate(blocks) if other == block]
        hard = [n + j for j, owner in enumerate(owners) if blocks[owner] == block]
        yield torch.tensor(own, device=device), torch.tensor(own + hard, device=device)
