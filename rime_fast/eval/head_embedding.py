"""Embedding by a head on the states of generation: every token goes through the backbone once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.engine.rollout import generate_rollouts
from rime_fast.engine.rollout_buffer import RolloutBuffer
from rime_fast.engine.wrappers import dual_mode_of
from rime_fast.model.embedding_head import of_states


def generated(model: Any, packed: dict[str, Any], **options: Any) -> tuple[RolloutBuffer, Tensor]:
    """Generate (``generate_rollouts``) and embed: by the model's head, if it has one, else by the last token's state.

    Gives the rollout and unit rows [N, D] fp32.
    """
    base: Any = dual_mode_of(model)
    if not hasattr(base, "embedding_head"):
        rollout = generate_rollouts(model, packed, **options)
        return rollout, F.normalize(rollout.gen_states, dim=1)
    with HeadStates(base).watching() as seen:
        rollout = generate_rollouts(model, packed, decode="eager", **options)
    return rollout, seen.embed(packed, rollout)


class HeadStates:
    """What the head's taps saw of a rollout, one response a prompt: the prompts' rows, then a row a token."""

    def __init__(self, model: Any) -> None:
        self.model, self.text = model, model.model.language_model
        self.taps = model.embedding_head.spec.taps(len(self.text.layers))
        self.prompt: dict[int, Tensor] = {}
        self.steps: list[tuple[Tensor, dict[int, Tensor]]] = []  # (which rollouts, tap -> [rows, H])

    @contextmanager
    def watching(self) -> Iterator[HeadStates]:
        """Keep the states of every forward of the text model inside the block; they must run module by module."""
        handles = []
        for tap in set(self.taps):
            if tap < len(self.text.layers):
                handles.append(self.text.layers[tap].register_forward_pre_hook(self._before(tap), with_kwargs=True))
            else:
                handles.append(self.text.register_forward_hook(self._after(tap), with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, tap: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(tap, args[0] if args else kwargs["hidden_states"], kwargs["rime_layout"])

        return hook

    def _after(self, tap: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self._keep(tap, out.last_hidden_state, kwargs["rime_layout"])

        return hook

    def _keep(self, tap: int, states: Tensor, layout: Any) -> None:
        if not self.prompt or (tap not in self.prompt and not self.steps):  # [1, T, H], all prompts packed
            self.prompt[tap] = states[0].detach()
            return
        if not self.steps or tap in self.steps[-1][1]:
            self.steps.append((layout.rows, {}))
        self.steps[-1][1][tap] = states[:, 0].detach()  # [rows, 1, H], those still decoding

    def embed(self, packed: dict[str, Any], rollout: RolloutBuffer) -> Tensor:
        """Embed the rollouts [N, D] fp32 unit rows: prompt and response of each, read at its last token."""
        counts = rollout.lengths.tolist()
        bounds = list(pairwise(accumulate(packed["lengths"], initial=0)))
        own: list[list[dict[int, Tensor]]] = [[] for _ in counts]
        for rows, found in self.steps:
            for place, i in enumerate(rows.tolist()):
                if len(own[i]) < counts[i]:
                    own[i].append({tap: states[place] for tap, states in found.items()})
        states = []
        for tap in self.taps:
            parts = [
                torch.cat([self.prompt[tap][start:stop], torch.stack([one[tap] for one in mine])])
                for (start, stop), mine in zip(bounds, own, strict=True)
            ]
            states.append(torch.cat(parts))
        positions = []
        for (start, stop), count in zip(bounds, counts, strict=True):
            known = packed["position_ids"][:, start:stop]
            after = known.max() + 1 + torch.arange(count, device=known.device)
            positions += [known, after.expand(3, -1)]
        lengths = [stop - start + count for (start, stop), count in zip(bounds, counts, strict=True)]
        inputs = {"lengths": lengths, "position_ids": torch.cat(positions, dim=1)}
        ends = torch.tensor(lengths).cumsum(0).to(states[0].device) - 1
        return of_states(self.model, states, inputs, ends)
