"""The random state of a forward, kept so that the same forward can be run again with the same dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class RngState:
    """What torch's generators (CPU and the current accelerator) held when this object was made.

    ``replayed()`` runs a block from that state and leaves the generators as they were before the block, so that a
    second run draws the same numbers and the draws after it are those of a program without the second run. Nothing
    here waits for a device: its generator's seed and offset live on the host.
    """

    def __init__(self) -> None:
        self._states = _states()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a block from the recorded state."""
        before = _states()
        _restore(self._states)
        try:
            yield
        finally:
            _restore(before)


def _states() -> tuple[torch.Tensor, Any]:
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), device


def _restore(states: tuple[torch.Tensor, Any]) -> None:
    host, device = states
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device)
