"""Learnable scalars of the loss with optimizers of their own: the contrast's temperature, the step of int8 embeddings.

They belong to the loss, not to the model: kept apart, the model directory stays what stock transformers loads,
and DDP, FSDP, DeepSpeed (every ZeRO stage) and peft see the model they know. They follow the trainer's LR schedule.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rime_fast.recipe.int8 import first_step


class LearnableScalar:
    """A positive number of the loss, exp(log), trained by AdamW without decay and kept within ``bounds``.

    Call ``value()`` for the loss, ``step(factor)`` once per optimizer step, ``save`` / ``load`` with a checkpoint.
    """

    file: str  # in a checkpoint's folder
    off: str  # the setting of a run that has none
    bounds: tuple[float, float]

    def __init__(self, initial: float, learning_rate: float, device: torch.device) -> None:
        self.log = nn.Parameter(torch.tensor(math.log(initial), dtype=torch.float32, device=device))
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.AdamW([self.log], lr=learning_rate, weight_decay=0.0)

    def value(self) -> Tensor:
        """The number, 0-d fp32, with gradient."""
        return self.log.exp()

    def step(self, factor: float, group: dist.ProcessGroup | None = None) -> None:
        """Make one update at ``factor`` times the peak learning rate; the gradient is averaged over ``group`` first.
        Where that is not finite the value stays."""
        gradient = self.log.grad
        if gradient is not None and group is not None:
            dist.all_reduce(gradient, group=group)
            gradient /= dist.get_world_size(group)
        kept = self.log.detach().clone()
        finite = torch.ones((), dtype=torch.bool, device=kept.device)
        if gradient is not None:
            finite = gradient.isfinite()
            gradient.masked_fill_(~finite, 0.0)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.log.clamp_(*map(math.log, self.bounds))
            self.log.copy_(torch.where(finite, self.log, kept))

    def save(self, folder: str | Path) -> None:
        """Write value and optimizer state into a checkpoint folder."""
        state = self.optimizer.state.get(self.log, {})
        peak = torch.tensor(self.learning_rate, dtype=torch.float64)
        tensors = {
            "log": self.log.detach(),
            "learning_rate": peak,
            **{name: torch.as_tensor(value) for name, value in state.items()},
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, Path(folder) / self.file)

    def load(self, folder: str | Path) -> None:
        """Read what ``save`` wrote. Raises FileNotFoundError: the checkpoint was made without this number."""
        path = Path(folder) / self.file
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: this checkpoint was trained with {self.off}")
        tensors = load_file(path)
        with torch.no_grad():
            self.log.copy_(tensors.pop("log"))
        self.learning_rate = float(tensors.pop("learning_rate", self.learning_rate))
        # AdamW keeps its step counter on the host
        self.optimizer.state[self.log] = {
            name: tensor if name == "step" else tensor.to(self.log.device) for name, tensor in tensors.items()
        }


class LearnableTemperature(LearnableScalar):
    """The contrast's temperature, within [0.005, 1] (CLIP clamps likewise)."""

    file, off, bounds = "contrast_temperature.safetensors", "learnable_temperature=False", (0.005, 1.0)


class Int8Step(LearnableScalar):
    """The step of int8 embeddings of ``width`` numbers (rime_fast/recipe/int8.py). By its logarithm it moves in shares
    of its own size and stays above 0; up to 2 / sqrt(width) no unit row rounds to 0 whole."""

    file, off = "int8_step.safetensors", "int8_weight=0"
    learning_rate = 1e-2  # peak, of the logarithm [ours]: a few hundred steps settle it

    def __init__(self, width: int, device: torch.device, initial: float | None = None) -> None:
        first = first_step(width)
        self.bounds = first / 100, first * 10
        super().__init__(initial or first, self.learning_rate, device)
