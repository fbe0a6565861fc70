"""The rollouts of a Refine-RL step: who generates them, and where they wait for further updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.data.collate import Collator
from rime_fast.engine.packed_batch import PackedBatch
from rime_fast.engine.rollout import RolloutBackend, Sampling, buffer_for
from rime_fast.engine.rollout_buffer import RolloutBuffer

MALFORMED = 0.9  # share of rollouts from which on it is said
# The prompts [N] bool whose groups say nothing (all rewards equal).
Degenerate = Callable[[RolloutBuffer], Tensor]


class RolloutGenerator:
    """Generates a step's rollouts and looks at their form.

    tokenizer: decodes responses for the template's check. sampling: what is drawn, G included. refill: how often
    degenerate groups are drawn anew.
    """

    def __init__(
        self, backend: RolloutBackend, collator: Collator, tokenizer: Any, sampling: Sampling, refill: int = 0
    ) -> None:
        self.backend, self.collator, self.tokenizer = backend, collator, tokenizer
        self.sampling, self.refill = sampling, refill

    def generate(
        self,
        policy: Any,
        sides: Sequence[Any],
        prompts: dict[str, Any],
        out: RolloutBuffer | None = None,
        degenerate: Degenerate | None = None,
    ) -> RolloutBuffer:
        """Generate G rollouts of every prompt, in ``out`` (default: a new buffer); with ``degenerate``, those of the
        groups it names are drawn again.

        The policy's parameters must be whole. Ranks may call it with different results: nothing in here is collective,
        except what ``degenerate`` does in its first call.
        """
        self.backend.refresh(policy)
        found = self._generated(policy, sides, prompts, out)
        if degenerate is None:
            return found
        refilled = 0
        packed = PackedBatch(prompts, self.collator.vision.merge_size)
        for _ in range(self.refill):
            stale = [i for i, yes in enumerate(degenerate(found).tolist()) if yes]
            if not stale:
                break
            refilled += len(stale)
            found.replace(stale, self._generated(policy, [sides[i] for i in stale], packed.take(stale), None))
            self.look_at(found)
        found.refilled = refilled
        return found

    def _generated(
        self, policy: Any, sides: Sequence[Any], prompts: dict[str, Any], out: RolloutBuffer | None
    ) -> RolloutBuffer:
        sampling = self.sampling
        if out is None:
            out = buffer_for(policy, prompts, sampling.group_size, sampling.max_new_tokens, sampling.pad_id)
        given = self.backend.generate(policy, sides, prompts, sampling, out.clear())
        if given.tokens.shape[1] > out.max_tokens:
            raise ValueError(
                f"{type(self.backend).__name__} gave {given.tokens.shape[1]} tokens a rollout; "
                f"max_completion_length is {out.max_tokens}"
            )
        out.take(given)
        out.has_states = all(getattr(given, name, None) is not None for name in ("gen_states", "disc_states"))
        out.rewrites = out.responses()
        return self.look_at(out)

    def look_at(self, rollouts: RolloutBuffer) -> RolloutBuffer:
        """Fill in what the host knows of ``rollouts.rewrites``: their form, and counts; returns the rollouts."""
        rewrites = rollouts.rewrites
        if empty := [i for i, rewrite in enumerate(rewrites) if not rewrite]:
            raise ValueError(f"{type(self.backend).__name__}: rollout {empty[0]} is empty; expected at least one token")
        texts = self.tokenizer.batch_decode(rewrites, skip_special_tokens=False)
        ok = [self.collator.template.parse_response(text).format_ok for text in texts]
        rollouts.format_ok = torch.tensor(ok).to(rollouts.tokens.device, non_blocking=True)
        rollouts.format_failed = len(ok) - sum(ok)
        rollouts.unfinished = sum(rewrite[-1] != self.sampling.gen_id for rewrite in rewrites)
        return rollouts


class RolloutStore:
    """Keeps rollouts between the updates on them: one buffer for each batch of an optimizer step, written in place by
    every generation, part of a checkpoint that is made between two updates.

    updates: on one set of rollouts. batches: of an optimizer step (accumulation). rank: of this process. ahead: all are
    drawn before the first is trained on.
    """

    def __init__(self, updates: int, batches: int, device: torch.device, rank: int, ahead: bool = False) -> None:
        # with one update a step's batches, drawn one by one, need nothing of each other: they share a buffer
        self.updates, self.batches, self.accumulation = updates, batches if updates > 1 or ahead else 1, batches
        self.device, self.rank = device, rank
        self.clear()

    def clear(self) -> None:
        """Forget all rollouts before a run."""
        self.buffers: dict[int, RolloutBuffer] = {}
        self.turn = self.place = 0

    def next(self, prompts: int) -> tuple[RolloutBuffer | None, bool]:
        """Give the buffer of the training batch that comes now, and whether its update is the first on its rollouts:
        then the buffer is there to be written (None: make one, and ``keep`` it)."""
        self.place = self.turn % self.batches
        first = self.turn % (self.batches * self.updates) < self.batches
        self.turn += 1
        buffer = self.buffers.get(self.place)
        return (None if first and buffer is not None and buffer.prompts != prompts else buffer), first

    def keep(self, rollouts: RolloutBuffer) -> None:
        """Keep a buffer for the batch that ``next`` spoke of."""
        self.buffers[self.place] = rollouts

    def _file(self, folder: Path, place: int) -> Path:
        return folder / f"rollouts-{self.rank}-{place}.safetensors"

    def save(self, folder: Path, step: int) -> None:
        """Save into the checkpoint of this optimizer step, where updates on these rollouts are still to come."""
        if step % self.updates:
            for place, buffer in self.buffers.items():
                buffer.save(self._file(folder, place))

    def load(self, folder: Path, step: int) -> list[RolloutBuffer]:
        """Go on where the checkpoint was made, with the rollouts read. Raises ValueError where they are missing."""
        self.clear()
        self.turn = step * self.accumulation
        if step % self.updates == 0:
            return []
        for place in range(self.batches):
            file = self._file(folder, place)
            if not file.is_file():
                raise ValueError(
                    f"{file} is missing: the checkpoint was made between two updates on its rollouts (num_iterations "
                    f"{self.updates}); expected one file for each rank and batch of a step"
                )
            self.buffers[place] = RolloutBuffer.from_file(file, self.device)
            self.buffers[place].rewrites = self.buffers[place].responses()
        return list(self.buffers.values())


@dataclass
class Drawn:
    """A batch with its rollouts. first_update: on them. opposite: the policy's anchors of a side that is not trained.
    prompts, tokens (of the rollouts): what losses divide by, a mean over the batches that make a step together."""

    inputs: dict[str, Any]
    rollouts: RolloutBuffer
    first_update: bool
    opposite: Tensor | None

    def __post_init__(self) -> None:
        self.prompts: float = len(self.inputs["sides"])
        self.tokens: float = sum(map(len, self.rollouts.rewrites))


class Draws:
    """Gives the batches of a step with their rollouts, and what the loss divides by so that they add up to that of one
    large batch (their gradients are averaged)."""

    def __init__(self) -> None:
        self.expect(())

    def expect(self, batches: Sequence[Any], ahead: bool = False) -> None:
        """Say which batches come next. ahead: draw all before the first is trained on, to know the tokens of all."""
        self.prompts = [len(batch["sides"]) for batch in batches]
        self.left, self.drawn = len(batches), list[Drawn]()
        self.expected = batches if ahead and len(batches) > 1 else ()

    def next(self, inputs: dict[str, Any], draw: Callable[[Any], Drawn]) -> Drawn:
        """Give ``inputs``, or the expected batch whose turn it is."""
        if self.expected:
            self.drawn, self.expected = [draw(batch) for batch in self.expected], ()
            tokens = fmean(drawn.tokens for drawn in self.drawn)
            for drawn in self.drawn:
                drawn.tokens = tokens
        found = self.drawn.pop(0) if self.drawn else draw(inputs)
        if self.left > 0:
            found.prompts, self.left = fmean(self.prompts), self.left - 1
        return found


def mean_over_ranks(number: float, group: dist.ProcessGroup | None, device: torch.device) -> Tensor | float:
    """Average a number of each rank over the ranks of ``group`` (None: one process alone)."""
    if group is None:
        return number
    total = torch.tensor(float(number)).to(device, non_blocking=True)
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def malformed(logs: dict[str, float], limit: int) -> str:
    """Say that (nearly) all rollouts of a log are malformed, with the likeliest cause; "" where they are not.

    limit: ``max_completion_length``.
    """
    drawn = logs.get("rollouts", 0.0)
    if drawn == 0 or logs["format_failed"] < MALFORMED * drawn:
        return ""
    cut = logs["unfinished"] / drawn
    if cut > 0.5:
        cause = f"{cut:.0%} do not reach <gen_emb>: max_completion_length ({limit}) may be too short"
    else:
        cause = "the model does not write the template's form: start from a jointly trained one, with its template"
    return f"{logs['format_failed'] / drawn:.0%} of the rollouts are malformed; {cause}"
