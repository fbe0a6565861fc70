"""The rollouts of a step, one type from decoding to the loss: generated, scored, reinforced, saved for resuming.

    buffer = RolloutBuffer.make(prompts=16, group_size=8, max_tokens=128, hidden=1536, device=device, pad_id=pad)
    generate_rollouts(policy, prompts, gen_id=..., group_size=8, max_new_tokens=128, out=buffer)

Memory is allocated once and written in place; a part is the same memory under another name. Nothing here waits for the
device but ``responses``, ``save`` and ``from_file``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_PER_PROMPT = ("disc_states",)
_PER_TOKEN = ("tokens", "logp", "old_logp", "ref_logp")
_LATER: Any = None  # filled by a later station


@dataclass
class RolloutBuffer:
    """The rollouts of B prompts, G each, N = B * G rows; row b * G + g is the g-th of prompt b. R: the longest there
    can be. ``make`` allocates every field, ``clear`` gives the values in brackets; a rollout backend that makes its own
    tensors gives the first four.

    From decoding:
    tokens [N, R] int64, the stop token included, padded (pad id). lengths [N] int64 (0), the stop token included.
    logp [N, R] fp32 of each token under the sampling policy itself (temperature 1, no filter), 0 in the padding (0).
    finished [N] bool: ended with ``<gen_emb>``; the others hit the cap or another stop token (False).
    gen_states [N, H] fp32: last hidden state at ``<gen_emb>``, not normalised; at the last token where there is none
    (0). disc_states [B, H] fp32: the same at ``disc_index``, from the same prefill (0). None where nobody made them.
    From the update:
    rewards, advantages [N] fp32 (NaN: what was never scored is seen). old_logp, ref_logp [N, R] fp32 (0).
    rewrites: ``responses`` on the host, once they were looked at, with format_ok [N] bool on the device and the counts
    format_failed, unfinished, refilled. has_states: whether gen_states and disc_states are those of these rollouts.
    """

    tokens: Tensor
    lengths: Tensor
    logp: Tensor
    finished: Tensor
    gen_states: Tensor = _LATER
    disc_states: Tensor = _LATER
    rewards: Tensor = _LATER
    advantages: Tensor = _LATER
    old_logp: Tensor = _LATER
    ref_logp: Tensor = _LATER
    group_size: int = 1
    pad_id: int = 0
    format_ok: Tensor = _LATER
    rewrites: list[list[int]] = field(default_factory=list)
    has_states: bool = False
    format_failed: int = 0
    unfinished: int = 0
    refilled: int = 0

    @classmethod
    def make(
        cls, *, prompts: int, group_size: int, max_tokens: int, hidden: int, device: torch.device | str, pad_id: int = 0
    ) -> RolloutBuffer:
        """Make a cleared buffer. Raises ValueError for a count below 1."""
        for name, count in (("prompts", prompts), ("group_size", group_size), ("max_tokens", max_tokens)):
            if count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1")
        rows = prompts * group_size
        token_table, row, state = (rows, max_tokens), (rows,), (rows, hidden)
        buffer = cls(
            group_size=group_size,
            pad_id=pad_id,
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
        return len(self.lengths) // self.group_size

    @property
    def max_tokens(self) -> int:
        return self.tokens.shape[1]

    def _tensors(self) -> dict[str, Tensor]:
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "format_ok"}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def clear(self) -> RolloutBuffer:
        """Forget everything, in place; returns the buffer."""
        for name, tensor in self._tensors().items():
            tensor.fill_(self.pad_id if name == "tokens" else float("nan") if name in ("rewards", "advantages") else 0)
        self.format_ok, self.has_states = _LATER, False
        self.rewrites, self.format_failed, self.unfinished, self.refilled = [], 0, 0, 0
        return self

    def part(self, first: int, count: int) -> RolloutBuffer:
        """Give prompts ``first`` to ``first + count`` as a buffer over the same memory."""
        if first < 0 or count < 1 or first + count > self.prompts:
            raise ValueError(f"prompts {first} to {first + count} of a buffer of {self.prompts}; expected some of them")
        rows = slice(first * self.group_size, (first + count) * self.group_size)
        cut: dict[str, Any] = {
            name: tensor[first : first + count] if name in _PER_PROMPT else tensor[rows]
            for name, tensor in self._tensors().items()
        }
        return RolloutBuffer(group_size=self.group_size, pad_id=self.pad_id, **cut)

    def trimmed(self, longest: int, *, disc: bool) -> RolloutBuffer:
        """Give the same memory up to ``longest`` tokens a rollout; without ``disc`` it has no disc_states."""
        kept: dict[str, Any] = {
            name: x[:, :longest] if name in _PER_TOKEN else x for name, x in self._tensors().items()
        }
        if not disc:
            kept.pop("disc_states", None)
        return RolloutBuffer(group_size=self.group_size, pad_id=self.pad_id, **kept)

    def take(self, given: RolloutBuffer) -> RolloutBuffer:
        """Write what a backend gave in tensors of its own into this memory; returns this buffer."""
        if given.tokens.untyped_storage().data_ptr() == self.tokens.untyped_storage().data_ptr():
            return self
        self.clear()
        for name in ("tokens", "logp"):
            getattr(self, name)[:, : given.tokens.shape[1]] = getattr(given, name)
        for name in ("lengths", "finished", "gen_states", "disc_states"):
            if getattr(given, name, None) is not None:
                getattr(self, name).copy_(getattr(given, name))
        return self

    def keep_logp(self, rows: slice, logp: Tensor, reference: Tensor | None) -> None:
        """Keep for later updates what the first found for these rollouts; logp, reference [n, longest]."""
        self.old_logp[rows, : logp.shape[1]] = logp
        if reference is not None:
            self.ref_logp[rows, : logp.shape[1]] = reference

    def replace(self, prompts: list[int], new: RolloutBuffer) -> None:
        """Write ``new``'s rollouts, of as many prompts, in place of those of these prompts; ``rewrites`` too."""
        rows = [i * self.group_size + g for i in prompts for g in range(self.group_size)]
        for row, rewrite in zip(rows, new.rewrites, strict=True):
            self.rewrites[row] = rewrite
        index = torch.tensor(rows).to(self.tokens.device, non_blocking=True)
        for name in ("tokens", "lengths", "logp", "finished", "gen_states"):
            getattr(self, name).index_copy_(0, index, getattr(new, name))

    def responses(self) -> list[list[int]]:
        """The tokens of each rollout without padding, on the host; waits for the device once."""
        table = torch.cat([self.lengths[:, None], self.tokens], dim=1).tolist()
        return [tokens[:length] for length, *tokens in table]

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Make the embeddings of the rollouts, (g [N, D], d [B, D]): fp32 unit rows of the states that decoding left at
        ``<gen_emb>`` and ``<disc_emb>``."""
        return F.normalize(self.gen_states, dim=1), F.normalize(self.disc_states, dim=1)

    def save(self, path: str | Path) -> None:
        """Write all tensors but ``format_ok`` as safetensors; the folder is made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, path, {"group_size": str(self.group_size), "pad_id": str(self.pad_id)})

    def load(self, path: str | Path) -> RolloutBuffer:
        """Read a saved buffer of the same shape into this one, in place; returns it. Raises ValueError naming what does
        not fit."""
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
        """Read a saved buffer, of whatever shape it has."""
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
