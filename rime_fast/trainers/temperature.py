"""A learnable contrast temperature with an optimizer of its own.

The scalar belongs to the loss, not to the model: kept apart, the model directory stays what stock transformers loads,
and DDP, FSDP, DeepSpeed (every ZeRO stage) and peft see the model they know. It follows the trainer's LR schedule.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "contrast_temperature.safetensors"
LOWEST, HIGHEST = 0.005, 1.0


class LearnableTemperature:
    """The learnable temperature tau = exp(log_tau), trained by AdamW without decay, kept within [0.005, 1] (CLIP clamps
    likewise).

    Call ``value()`` for the loss, ``step(factor)`` once per optimizer step, ``save`` / ``load`` with a checkpoint.
    """

    def __init__(self, initial: float, learning_rate: float, device: torch.device) -> None:
        self.log_tau = nn.Parameter(torch.tensor(math.log(initial), dtype=torch.float32, device=device))
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.AdamW([self.log_tau], lr=learning_rate, weight_decay=0.0)

    def value(self) -> Tensor:
        """The temperature tau, 0-d fp32, with gradient."""
        return self.log_tau.exp()

    def step(self, factor: float, group: dist.ProcessGroup | None = None) -> None:
        """Make one update at ``factor`` times the peak learning rate; the gradient is averaged over ``group`` first.
        Where that is not finite the value stays."""
        gradient = self.log_tau.grad
        if gradient is not None and group is not None:
            dist.all_reduce(gradient, group=group)
            gradient /= dist.get_world_size(group)
        kept = self.log_tau.detach().clone()
        finite = torch.ones((), dtype=torch.bool, device=kept.device)
        if gradient is not None:
            finite = gradient.isfinite()
            gradient.masked_fill_(~finite, 0.0)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.log_tau.clamp_(math.log(LOWEST), math.log(HIGHEST))
            self.log_tau.copy_(torch.where(finite, self.log_tau, kept))

    def save(self, folder: str | Path) -> None:
        """Write value and optimizer state into a checkpoint folder."""
        state = self.optimizer.state.get(self.log_tau, {})
        peak = torch.tensor(self.learning_rate, dtype=torch.float64)
        tensors = {
            "log_tau": self.log_tau.detach(),
            "learning_rate": peak,
            **{name: torch.as_tensor(value) for name, value in state.items()},
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Read what ``save`` wrote. Raises FileNotFoundError: the checkpoint was made with a fixed temperature."""
        path = Path(folder) / FILE
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: this checkpoint was trained with learnable_temperature=False")
        tensors = load_file(path)
        with torch.no_grad():
            self.log_tau.copy_(tensors.pop("log_tau"))
        self.learning_rate = float(tensors.pop("learning_rate", self.learning_rate))
        # AdamW keeps its step counter on the host
        self.optimizer.state[self.log_tau] = {
            name: tensor if name == "step" else tensor.to(self.log_tau.device) for name, tensor in tensors.items()
        }
