"""Where the rollouts of a step live: allocated once, written in place by decoding and scoring, saved for resuming.

    buffer = RolloutBuffer.make(prompts=16, group_size=8, max_tokens=128, hidden=1536, device=device, pad_id=pad)
    for micro, part in zip(micro_batches, buffer.parts([4, 4, 4, 4]), strict=True):
        generate_rollouts(policy, micro, gen_id=..., group_size=8, max_new_tokens=128, out=part)

A part is the same memory under another name. Nothing here waits for the device but ``responses``, ``save`` and
``from_file``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_PER_PROMPT = ("disc_states",)


@dataclass
class RolloutBuffer:
    """B prompts with G rollouts each, N = B * G rows; row b * G + g is the g-th of prompt b. R: the longest there can
    be. Made by ``make``; ``clear`` gives the values in brackets.

    From decoding, as in ``Rollout``:
    tokens [N, R] int64 (pad id), lengths [N] int64 (0), logp [N, R] fp32 (0), gen_states [N, H] fp32 (0),
    finished [N] bool (False), disc_states [B, H] fp32 (0).
    From the update:
    rewards, advantages [N] fp32 (NaN: what was never scored is seen), old_logp, ref_logp [N, R] fp32 (0).
    """

    group_size: int
    pad_id: int
    tokens: Tensor
    lengths: Tensor
    logp: Tensor
    gen_states: Tensor
    finished: Tensor
    disc_states: Tensor
    rewards: Tensor
    advantages: Tensor
    old_logp: Tensor
    ref_logp: Tensor

    @classmethod
    def make(
        cls, *, prompts: int, group_size: int, max_tokens: int, hidden: int, device: torch.device | str, pad_id: int = 0
    ) -> RolloutBuffer:
        """A cleared buffer. Raises ValueError for a count below 1."""
        for name, count in (("prompts", prompts), ("group_size", group_size), ("max_tokens", max_tokens)):
            if count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1")
        rows = prompts * group_size
        token_table, row, state = (rows, max_tokens), (rows,), (rows, hidden)
        buffer = cls(
            group_size,
            pad_id,
            tokens=torch.empty(token_table, dtype=torch.int64, device=device),
            lengths=torch.empty(row, dtype=torch.int64, device=device),
            logp=torch.empty(token_table, device=device),
            gen_states=torch.empty(state, device=device),
            finished=torch.empty(row, dtype=torch.bool, device=device),
            disc_states=torch.empty(prompts, hidden, device=device),
            rewards=torch.empty(row, device=device),
            advantages=torch.empty(row, device=device),
            old_logp=torch.empty(token_table, device=device),
            ref_logp=torch.empty(token_table, device=device),
        )
        return buffer.clear()

    @property
    def prompts(self) -> int:
        return self.disc_states.shape[0]

    @property
    def max_tokens(self) -> int:
        return self.tokens.shape[1]

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def clear(self) -> RolloutBuffer:
        """Forget everything, in place; returns the buffer."""
        for name, tensor in self._tensors().items():
            tensor.fill_(self.pad_id if name == "tokens" else float("nan") if name in ("rewards", "advantages") else 0)
        return self

    def part(self, first: int, count: int) -> RolloutBuffer:
        """Prompts ``first`` to ``first + count`` as a buffer over the same memory."""
        if first < 0 or count < 1 or first + count > self.prompts:
            raise ValueError(f"prompts {first} to {first + count} of a buffer of {self.prompts}; expected some of them")
        rows = slice(first * self.group_size, (first + count) * self.group_size)
        cut: dict[str, Any] = {
            name: tensor[first : first + count] if name in _PER_PROMPT else tensor[rows]
            for name, tensor in self._tensors().items()
        }
        return RolloutBuffer(self.group_size, self.pad_id, **cut)

    def parts(self, sizes: Sequence[int]) -> list[RolloutBuffer]:
        """The first ``sum(sizes)`` prompts, so many a part: a micro-batch each."""
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.part(start, size) for start, size in zip(starts, sizes, strict=True)]

    def responses(self) -> list[list[int]]:
        """The tokens of each rollout without padding, on the host; waits for the device once."""
        table = torch.cat([self.lengths[:, None], self.tokens], dim=1).tolist()
        return [tokens[:length] for length, *tokens in table]

    def slots(self, lengths: Sequence[int]) -> Tensor:
        """Where the tokens of responses of ``lengths`` [N] (host) lie in a flattened [N, R] field, on the device:
        [sum lengths] int64, response after response."""
        if len(lengths) != len(self.lengths) or max(lengths) > self.max_tokens:
            raise ValueError(
                f"lengths has {len(lengths)} entries up to {max(lengths)}; expected {len(self.lengths)} up to "
                f"{self.max_tokens}"
            )
        count = torch.tensor(lengths)
        first = torch.arange(len(lengths)) * self.max_tokens - (count.cumsum(0) - count)
        return (torch.arange(sum(lengths)) + first.repeat_interleave(count)).to(self.tokens.device, non_blocking=True)

    def put(self, name: str, values: Tensor, slots: Tensor) -> None:
        """Write ``values`` [n] at ``slots`` (see there) of the field ``name`` [N, R]."""
        getattr(self, name).view(-1).index_copy_(0, slots, values.detach().to(getattr(self, name).dtype))

    def get(self, name: str, slots: Tensor) -> Tensor:
        """[n], the values of the field ``name`` at ``slots``."""
        return getattr(self, name).view(-1).index_select(0, slots)

    def save(self, path: str | Path) -> None:
        """All fields as safetensors; the folder is made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, path, {"group_size": str(self.group_size), "pad_id": str(self.pad_id)})

    def load(self, path: str | Path) -> RolloutBuffer:
        """Read a saved buffer of the same shape into this one, in place; returns it. Raises ValueError naming what
        does not fit."""
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            for name in ("group_size", "pad_id"):
                if known.get(name) != str(getattr(self, name)):
                    raise ValueError(f"{path}: {name} is {known.get(name)}; expected {getattr(self, name)}")
            for name, tensor in self._tensors().items():
                shape = file.get_slice(name).get_shape() if name in file.keys() else None  # noqa: SIM118
                if shape != list(tensor.shape):
                    raise ValueError(f"{path}: {name} has shape {shape}; expected {list(tensor.shape)}")
            for name, tensor in self._tensors().items():
                tensor.copy_(file.get_tensor(name))
        return self

    @classmethod
    def from_file(cls, path: str | Path, device: torch.device | str) -> RolloutBuffer:
        """A saved buffer, of whatever shape it has."""
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        if missing := [name for name in ("tokens", "disc_states") if name not in shapes]:
            raise ValueError(f"{path} holds no {missing[0]}; expected a file that RolloutBuffer.save wrote")
        prompts, hidden = shapes["disc_states"]
        sizes = {"group_size": int(known["group_size"]), "pad_id": int(known["pad_id"])}
        return cls.make(prompts=prompts, max_tokens=shapes["tokens"][1], hidden=hidden, device=device, **sizes).load(
            path
        )


def response_rows(sequences: Sequence[int], responses: Sequence[int]) -> Tensor:
    """The rows of a packed batch that score the tokens of its responses, [sum responses] int64 on the host.

    sequences: rows of every packed sequence, the last N of which end in the N responses (of ``responses`` tokens, on
    the host too). A token is scored one row before its own; so this serves shared prefixes and separate sequences.
    Response after response, as ``RolloutBuffer.slots``.
    """
    ends = torch.tensor(sequences).cumsum(0)[len(sequences) - len(responses) :]
    count = torch.tensor(responses)
    first = ends - 1 - count - (count.cumsum(0) - count)
    return torch.arange(sum(responses)) + first.repeat_interleave(count)
