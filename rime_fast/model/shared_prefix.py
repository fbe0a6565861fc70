"""A prompt and its G rollouts as one batch in which the prompt's rows stand once.

    rows:  prompt 0 | prompt 1 | ... | rollout 0 of prompt 0 | rollout 1 of prompt 0 | ... | rollout 0 of prompt 1 | ...

A row of a prompt sees the rows of its prompt up to itself; a row of a rollout sees its whole prompt and its own
rollout up to itself. Positions are those the rollout would have in a sequence of its own, so log-probabilities,
embeddings and gradients are those of G separate sequences, for P + G R rows instead of G (P + R).

The last token of a prompt opens each of its rollouts (instead of closing the prompt): that is the row where a
rollout's first token is scored, and its target differs from rollout to rollout. This costs G - 1 rows a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rime_fast.model.packing import packed_layout
from rime_fast.model.prefix_attention import PrefixAttention, PrefixBounds, flash_serves

IGNORED = -100
_VISUAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "image_grids",
    "pixel_values_videos",
    "video_grid_thw",
    "video_grids",
    "vision_cache",
)


class PrefixLayout:
    """The layout of prompts, then branches that see a prefix and themselves; an ``AttentionLayout`` for
    ``DualModeModel.forward(layout=...)``.

    prompts [B]: rows of each prompt, causal by itself. groups: of each prompt the rows of its branches, which lie side
    by side; then of each of ``borrowed``, runs of the branches' own rows [start, stop) that serve further branches as
    their prefix in place of a prompt. All positive host integers; the packed order is prompts, then groups.

    ``lengths``: rows of every part in packed order, what the forward takes beside the layout.
    """

    def __init__(
        self,
        prompts: Sequence[int],
        groups: Sequence[Sequence[int]],
        device: torch.device,
        borrowed: Sequence[tuple[int, int]] = (),
    ) -> None:
        fronts = [*prompts, *(stop - start for start, stop in borrowed)]
        branches = [rows for group in groups for rows in group]
        self.lengths = [*prompts, *branches]
        self.device = device
        self.groups, self.fronts = groups, fronts
        self.prefix_rows, self.branch_rows = sum(prompts), sum(branches)
        self.longest = max(front + max(group) for front, group in zip(fronts, groups, strict=True))
        self.prefixes = packed_layout(prompts, device)
        self.bounds = PrefixBounds.make(fronts, [sum(group) for group in groups], branches, device)
        self.borrowed: Tensor | None = None
        if borrowed:
            self.borrowed = torch.cat([torch.arange(*run) for run in borrowed]).to(device, non_blocking=True)
        self._masks: list[Tensor] | None = None

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float
    ) -> Tensor:
        """Attend in one layer: query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, T, heads, D]."""
        total = self.prefix_rows + self.branch_rows
        if query.shape[2] != total or query.shape[0] != 1:
            raise ValueError(f"query has shape {list(query.shape)}; expected [1, heads, {total}, D]")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        # Rotary embedding may leave queries and keys wider than the values (autocast).
        rows = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        parts = [x.split([self.prefix_rows, self.branch_rows]) for x in rows]
        (prompt_query, prompt_key, prompt_value), (query, key, value) = zip(*parts, strict=True)
        front = self.prefixes.attend(prompt_query, prompt_key, prompt_value, scale=scale, dropout=dropout)
        if self.borrowed is not None:
            prompt_key = torch.cat([prompt_key, key.index_select(0, self.borrowed)])
            prompt_value = torch.cat([prompt_value, value.index_select(0, self.borrowed)])
        if dropout == 0.0 and flash_serves(query):
            back = PrefixAttention.apply(query, key, value, prompt_key, prompt_value, self.bounds, scale)
        else:
            back = self._masked(query, key, value, prompt_key, prompt_value, scale, dropout)
        return torch.cat([front, back])[None]

    def _masked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        scale: float,
        dropout: float,
    ) -> Tensor:
        """The same by one masked SDPA a group, where the flash passes have no kernel (fp32 on a GPU, dropout)."""
        sizes = [sum(group) for group in self.groups]
        if self._masks is None:
            self._masks = [self._mask(*both) for both in zip(self.groups, self.fronts, strict=True)]
        shared = query.shape[1] != key.shape[1]
        outs = []
        parts = (
            self._masks,
            query.split(sizes),
            key.split(sizes),
            value.split(sizes),
            prompt_key.split(self.fronts),
            prompt_value.split(self.fronts),
        )
        for mask, q, k, v, pk, pv in zip(*parts, strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, torch.cat([pk, k]), torch.cat([pv, v])))
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=shared
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def _mask(self, group: Sequence[int], front: int) -> Tensor:
        """True where a row of a group's branches sees [prefix | branches], [Q, front + Q]."""
        which = torch.arange(len(group)).repeat_interleave(torch.tensor(group))
        seen = (which[:, None] == which).tril()
        return F.pad(seen, (front, 0), value=True).to(self.device, non_blocking=True)


class SharedPrefixLayout(PrefixLayout):
    """Who sees whom in a shared-prefix batch.

    prefixes [B]: rows of each prompt (without its last token). rollouts [N]: rows of each rollout (with that token),
    N a multiple of B, those of a prompt side by side. All positive host integers.

    ``rows`` [T] int64 on ``device``: the rollout each row belongs to, 0 for the prompts' rows.
    """

    def __init__(self, prefixes: Sequence[int], rollouts: Sequence[int], device: torch.device) -> None:
        if not prefixes or min(prefixes) < 1:
            raise ValueError(f"prefixes is {list(prefixes)[:8]}; expected at least one prompt of two tokens or more")
        if not rollouts or len(rollouts) % len(prefixes) or min(rollouts) < 1:
            raise ValueError(f"rollouts has {len(rollouts)} entries; expected G positive ones for each prompt")
        self.group_size = len(rollouts) // len(prefixes)
        groups = [rollouts[i : i + self.group_size] for i in range(0, len(rollouts), self.group_size)]
        super().__init__(prefixes, groups, device)
        own = torch.repeat_interleave(torch.arange(len(rollouts)), torch.tensor(rollouts))
        self.rows = F.pad(own, (self.prefix_rows, 0)).to(device, non_blocking=True)


def shared_prefix_batch(prompts: dict[str, Any], responses: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Make the batch of B packed prompts with G responses each, ready for ``DualModeModel.forward(**batch)``.

    prompts: what the collator's ``collate_prompts`` gives (on any device; pixel values are passed on, not repeated).
    responses: B * G token lists, those of a prompt side by side, none empty.

    Keys, T rows: input_ids, mm_token_type_ids, targets [T], position_ids [3, T], lengths (host), layout
    (``SharedPrefixLayout``), disc_index [B] (where the prompts have one), gen_index [B * G]: the last row of each
    rollout, which is ``<gen_emb>`` where it finished. ``layout.rows`` tells which rollout a row belongs to.

    Every prompt must end in a text token. Raises ValueError naming the argument. Waits for no device.
    """
    lengths, device = prompts["lengths"], prompts["input_ids"].device
    if not lengths or not responses or len(responses) % len(lengths):
        raise ValueError(f"responses has {len(responses)} entries; expected a multiple of {len(lengths)} prompts")
    if min(lengths) < 2:
        raise ValueError(f"prompts: prompt {lengths.index(min(lengths))} has one token; expected at least two")
    if empty := [i for i, response in enumerate(responses) if len(response) == 0]:
        raise ValueError(f"responses[{empty[0]}] is empty")
    layout = SharedPrefixLayout([n - 1 for n in lengths], [len(r) + 1 for r in responses], device)
    take, moved, offset, prompt_of = (x.to(device, non_blocking=True) for x in _places(lengths, responses))
    tokens = torch.tensor([int(token) for response in responses for token in response]).to(device, non_blocking=True)

    old_positions = prompts["position_ids"]
    ends = (torch.tensor(lengths).cumsum(0) - 1).to(device, non_blocking=True)
    last = old_positions.amax(dim=0).index_select(0, ends)  # a text row: all three are equal
    positions = (last.index_select(0, prompt_of) + offset).expand(3, -1)
    input_ids = torch.cat([prompts["input_ids"], tokens]).index_select(0, take)
    kinds = F.pad(prompts["mm_token_type_ids"], (0, len(tokens))).index_select(0, take)
    stops = torch.tensor(layout.lengths).cumsum(0)[len(lengths) :] - 1
    gen_index = stops.to(device, non_blocking=True)
    targets = input_ids.roll(-1)
    targets[: layout.prefix_rows] = IGNORED
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "lengths": layout.lengths,
        "position_ids": torch.cat([old_positions, positions], dim=1).index_select(1, take),
        "mm_token_type_ids": kinds,
        "targets": targets.index_fill(0, gen_index, IGNORED),
        "gen_index": gen_index,
        "layout": layout,
    }
    if prompts.get("disc_index") is not None:
        batch["disc_index"] = moved.index_select(0, prompts["disc_index"])
    return batch | {key: prompts[key] for key in _VISUAL_KEYS if key in prompts}


def _places(lengths: Sequence[int], responses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On the host: where each row of the batch comes from, and where each prompt row went.

    take [T]: row in [all prompt rows | all response tokens]. moved [prompt rows]: row in the batch (of a prompt's last
    token: in its first rollout). offset, prompt_of [response tokens]: 1-based place in its response, its prompt.
    """
    group = len(responses) // len(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    total, ends = int(starts[-1]), starts[1:] - 1
    is_last = torch.zeros(total, dtype=torch.bool)
    is_last[ends] = True
    rows = torch.tensor([len(r) + 1 for r in responses])
    first = rows.cumsum(0) - rows
    within = torch.arange(int(rows.sum())) - first.repeat_interleave(rows)
    owner = torch.arange(len(responses)).repeat_interleave(rows)
    token = torch.arange(len(owner)) - owner - 1 + total  # each rollout's first row is no response token
    back = torch.where(within == 0, ends[owner // group], token)
    take = torch.cat([torch.arange(total)[~is_last], back])
    moved = torch.empty(total, dtype=torch.int64)
    moved[~is_last] = torch.arange(total - len(lengths))
    moved[ends] = total - len(lengths) + first[::group]
    inner = within > 0
    return take, moved, within[inner], (owner // group)[inner]
