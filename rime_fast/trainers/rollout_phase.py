"""The rollout phase of a step: G rewrites of every prompt, drawn by whoever decodes, and what they are known by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.data.collate import Collator
from rime_fast.engine.rollout import dual_mode_of
from rime_fast.engine.rollout_backend import LocalBackend, RolloutBackend, Samples, Sampling
from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.trainers.policy_batch import take_prompts

# The prompts [N] bool whose groups say nothing (all rewards equal).
Degenerate = Callable[["Rollouts"], Tensor]


@dataclass
class Rollouts:
    """N prompts with G rollouts each, in ``buffer``.

    responses: N G token lists (host). format_ok [N G] bool, on the device. has_states: whether the buffer holds the
    states of decoding. format_failed, unfinished, refilled: counts (host).
    """

    buffer: RolloutBuffer
    responses: list[list[int]]
    format_ok: Tensor
    has_states: bool
    format_failed: int = 0
    unfinished: int = 0
    refilled: int = 0

    @property
    def lengths(self) -> Tensor:
        """[N G] int64, on the device."""
        return self.buffer.lengths

    def embeddings(self) -> tuple[Tensor, Tensor] | None:
        """(g [N G, D], d [N, D]) fp32 unit rows of the states at ``<gen_emb>`` and ``<disc_emb>`` while decoding; None
        where the backend gave none."""
        if not self.has_states:
            return None
        return F.normalize(self.buffer.gen_states, dim=1), F.normalize(self.buffer.disc_states, dim=1)


class RolloutPhase:
    """Draws a step's rollouts.

    tokenizer: decodes responses for the template's check of their form. sampling: what is drawn, G included. refill:
    how often degenerate groups are drawn anew.
    """

    def __init__(
        self, backend: RolloutBackend, collator: Collator, tokenizer: Any, sampling: Sampling, refill: int = 0
    ) -> None:
        self.backend, self.collator, self.tokenizer = backend, collator, tokenizer
        self.sampling, self.refill = sampling, refill

    def buffer(self, policy: Any, prompts: int, device: torch.device) -> RolloutBuffer:
        """Room for the rollouts of so many prompts."""
        return RolloutBuffer.make(
            prompts=prompts,
            group_size=self.sampling.group_size,
            max_tokens=self.sampling.max_new_tokens,
            hidden=dual_mode_of(policy).config.get_text_config().hidden_size,
            device=device,
            pad_id=self.sampling.pad_id,
        )

    def draw(
        self,
        policy: Any,
        sides: Sequence[Any],
        prompts: dict[str, Any],
        into: RolloutBuffer | None = None,
        degenerate: Degenerate | None = None,
    ) -> Rollouts:
        """G rollouts of every prompt, in ``into`` (default: a new buffer); with ``degenerate``, those of the groups it
        names are drawn again.

        The policy's parameters must be whole. Ranks may call it with different results: nothing in here is collective,
        except what ``degenerate`` does in its first call.
        """
        self.backend.refresh(policy)
        found = self._drawn(policy, sides, prompts, into)
        if degenerate is None:
            return found
        refilled = 0
        for _ in range(self.refill):
            stale = [i for i, yes in enumerate(degenerate(found).tolist()) if yes]
            if not stale:
                break
            refilled += len(stale)
            part = take_prompts(prompts, stale, self.collator.vision.merge_size)
            found = self._replaced(found, stale, self._drawn(policy, [sides[i] for i in stale], part, None))
        found.refilled = refilled
        return found

    def _drawn(
        self, policy: Any, sides: Sequence[Any], prompts: dict[str, Any], into: RolloutBuffer | None
    ) -> Rollouts:
        out = self.buffer(policy, len(sides), prompts["input_ids"].device) if into is None else into
        samples = self.backend.generate(policy, sides, prompts, self.sampling, out)
        if samples.tokens.shape[1] > out.max_tokens:
            raise ValueError(
                f"{type(self.backend).__name__} gave {samples.tokens.shape[1]} tokens a rollout; "
                f"max_completion_length is {out.max_tokens}"
            )
        _take_in(samples, out)
        states = isinstance(self.backend, LocalBackend) or getattr(samples, "gen_states", None) is not None
        return self.judged(out, out.responses(), states and prompts.get("disc_index") is not None)

    def judged(self, buffer: RolloutBuffer, responses: list[list[int]], has_states: bool) -> Rollouts:
        """The rollouts in a buffer, their form looked at on the host."""
        gen_id = self.sampling.gen_id
        if empty := [i for i, response in enumerate(responses) if not response]:
            raise ValueError(f"{type(self.backend).__name__}: rollout {empty[0]} is empty; expected at least one token")
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=False)
        ok = [self.collator.template.parse_response(text).format_ok for text in texts]
        return Rollouts(
            buffer,
            responses,
            torch.tensor(ok).to(buffer.tokens.device, non_blocking=True),
            has_states,
            format_failed=len(ok) - sum(ok),
            unfinished=sum(response[-1] != gen_id for response in responses),
        )

    def _replaced(self, old: Rollouts, prompts: list[int], new: Rollouts) -> Rollouts:
        """``old`` with the groups of these prompts from ``new``."""
        size, buffer = self.sampling.group_size, old.buffer
        rows = [i * size + g for i in prompts for g in range(size)]
        responses = list(old.responses)
        for row, response in zip(rows, new.responses, strict=True):
            responses[row] = response
        index = torch.tensor(rows).to(buffer.tokens.device, non_blocking=True)
        for name in ("tokens", "lengths", "logp", "finished", "gen_states"):
            getattr(buffer, name).index_copy_(0, index, getattr(new.buffer, name))
        return self.judged(buffer, responses, old.has_states)


def _take_in(samples: Samples, out: RolloutBuffer) -> None:
    """What a backend gave in tensors of its own."""
    if samples.tokens.untyped_storage().data_ptr() == out.tokens.untyped_storage().data_ptr():
        return
    out.clear()
    longest = samples.tokens.shape[1]
    for name in ("tokens", "logp"):
        getattr(out, name)[:, :longest] = getattr(samples, name)
    for name in ("lengths", "finished", "gen_states", "disc_states"):
        if getattr(samples, name, None) is not None:
            getattr(out, name).copy_(getattr(samples, name))
