"""Where a run's rollouts lie: buffers made once, written in place, part of a checkpoint between two updates on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.trainers.rollout_phase import Rollouts

if TYPE_CHECKING:
    from rime_fast.trainers.refine_trainer import RefineRLTrainer


class Slot:
    """One batch's place: its buffer, and its rollouts once they are drawn (``rollouts``). again: there will be further
    updates on them. filled: the first one is done, so ``buffer`` holds its log-probabilities, the reference's, and the
    advantages."""

    def __init__(self, buffer: RolloutBuffer, again: bool) -> None:
        self.buffer, self.again, self.filled = buffer, again, False
        self.rollouts: Rollouts | None = None

    def write(self, rows: slice, logp: Tensor, reference: Tensor | None) -> None:
        """What the first update found for these rollouts; logp, reference [n, R]."""
        self.buffer.old_logp[rows, : logp.shape[1]] = logp
        if reference is not None:
            self.buffer.ref_logp[rows, : logp.shape[1]] = reference

    def logp(self, rows: slice, longest: int) -> tuple[Tensor, Tensor]:
        """(of the first update, of the reference) [n, longest]; the second means nothing without a reference."""
        return self.buffer.old_logp[rows, :longest], self.buffer.ref_logp[rows, :longest]


class RolloutStore:
    """One slot for each batch of an optimizer step, used again for every rollout phase."""

    def __init__(self, trainer: RefineRLTrainer) -> None:
        self.trainer = trainer
        self.slots: list[Slot] = []
        self.turn = 0  # batches since the run began

    def clear(self) -> None:
        """Before a run."""
        self.slots, self.turn = [], 0

    def next(self, prompts: int) -> Slot:
        """The slot of the training batch that comes now, its rollouts in it if an earlier update drew them."""
        trainer, updates = self.trainer, self.trainer.args.num_iterations
        # with one update a step's batches need nothing of each other: they share a slot
        per_step = trainer.args.gradient_accumulation_steps if updates > 1 else 1
        place, at = self.turn % per_step, self.turn % (per_step * updates)
        self.turn += 1
        if place == len(self.slots):
            self.slots.append(Slot(self._buffer(prompts), updates > 1))
        slot = self.slots[place]
        if at < per_step:
            if slot.buffer.prompts != prompts:
                slot.buffer = self._buffer(prompts)
            slot.rollouts, slot.filled = None, False
        return slot

    def _buffer(self, prompts: int) -> RolloutBuffer:
        return self.trainer.phase.buffer(self.trainer.policy, prompts, self.trainer.args.device)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _file(self, folder: Path, place: int) -> Path:
        return folder / f"rollouts-{self.trainer.args.process_index}-{place}.safetensors"

    def save(self, folder: Path) -> None:
        """Into a checkpoint, where updates on these rollouts are still to come."""
        if self.trainer.state.global_step % self.trainer.args.num_iterations:
            for place, slot in enumerate(self.slots):
                slot.buffer.save(self._file(folder, place))

    def load(self, folder: Path) -> None:
        """Go on where the checkpoint was made. Raises ValueError where its rollouts are missing."""
        trainer = self.trainer
        steps, args = trainer.state.global_step, trainer.args
        self.slots, self.turn = [], steps * args.gradient_accumulation_steps
        if steps % args.num_iterations == 0:
            return
        for place in range(args.gradient_accumulation_steps):
            file = self._file(folder, place)
            if not file.is_file():
                raise ValueError(
                    f"{file} is missing: the checkpoint was made between two updates on its rollouts (num_iterations "
                    f"{args.num_iterations}); expected one file for each rank and batch of a step"
                )
            slot = Slot(RolloutBuffer.from_file(file, args.device), True)
            slot.rollouts = trainer.phase.judged(slot.buffer, slot.buffer.responses(), False)
            slot.filled = True
            self.slots.append(slot)
