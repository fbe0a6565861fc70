"""Latent rewrites: a prompt with two branches, its rewrite and K latent tokens that a second copy of it must do with.

    prompt | rewrite .. <gen_emb>                    the prompt and itself, causally: as ever
           | <latent_0> .. <latent_K-1>              the prompt and themselves, causally
                     | rewrite .. <gen_emb>          the latent tokens and itself, NOT the prompt (condensation mask)

The cross-entropy of the second copy reaches the prompt through the latent tokens alone, so that these learn to hold
what the rewrite says; the embedding is the mean of their states. Decoding nothing, an embedding is one forward over
prompt and latent tokens, an ordinary causal sequence.

[known, BToks, arXiv 2604.11095: K learnable tokens and the condensation mask]; [ours]: the read-out, the branch with
the rewrite beside it, and the positions. The latent tokens go on where the prompt ends, as the rewrite beside them
does; the second copy goes on after the last of them. So at inference every position is the one trained.

Attention is that of shared prefixes, two flash passes without a mask: the branches of a prompt see it as their prefix,
the second copy's prefix is the rows of the latent tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rime_fast.model.shared_prefix import PrefixLayout

IGNORED = -100
Branches = tuple[int, int, int, int]  # rows of the prompt, the rewrite, the latent tokens, the second copy
_PER_TOKEN = ("input_ids", "mm_token_type_ids", "targets", "token_weight")
_ROW_INDEX = ("disc_index", "gen_index", "latent_index")


def with_latents(response: list[int], latent_ids: list[int]) -> list[int]:
    """Make what follows a prompt: its rewrite, the latent tokens, the second copy (its last token
    is only predicted)."""
    return [*response, *latent_ids, *response[:-1]]


def add_branches(batch: dict[str, Any], responses: Sequence[int], k: int) -> None:
    """Complete a packed batch (on the host) of sequences made by ``with_latents``.

    batch: with ``prompt_lengths``, positions that simply count up behind the prompts, and the responses' own targets.
    responses: rows of each, 0 for none. Adds ``latent_index`` [N, K], ``branches`` (N of ``Branches``) and
    ``condensed`` [T] bool, the rows that score a second copy; the copies' targets are those of the responses.
    """
    branches, first, start = [], [], 0
    condensed = torch.zeros(len(batch["input_ids"]), dtype=torch.bool)
    for prompt, own in zip(batch["prompt_lengths"], responses, strict=True):
        copy = max(own - 1, 0)
        begin = start + prompt + own
        stop = begin + k + copy
        batch["position_ids"][:, begin:stop] -= own
        if own:
            condensed[begin + k - 1 : stop] = True
            batch["targets"][begin + k - 1 : stop] = batch["targets"][start + prompt - 1 : begin - 1]
        branches.append((prompt, own, k, copy))
        first.append(begin)
        start = stop
    batch |= {"latent_index": torch.tensor(first)[:, None] + torch.arange(k), "branches": branches}
    if "scored" in batch:
        batch["scored"] = [2 * rows for rows in batch["scored"]]
    batch["condensed"] = condensed


def own_targets(batch: dict[str, Any]) -> Tensor:
    """The targets without those of the second copies: what a token mean counts."""
    targets: Tensor = batch["targets"]
    return targets.masked_fill(batch["condensed"], IGNORED) if "condensed" in batch else targets


def latent_batch(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Make a packed batch with ``branches`` as ``DualModeModel.forward`` takes it; and where its rows went [T].

    batch: as the collator makes it, sequences end to end, each prompt, rewrite, latent tokens, second copy; branches:
        N of ``Branches`` (host), rewrite and second copy may have no rows. Given back: the rows in the order of the
        layout, all prompts first, then every prompt's rewrite and latent tokens, then the second copies; ``lengths``
        and ``layout`` of these. Waits for no device.
    """
    layout, take = latent_layout(batch["branches"], batch["input_ids"].device)
    place = torch.empty_like(take).scatter_(0, take, torch.arange(len(take)))
    take, place = (x.to(layout.device, non_blocking=True) for x in (take, place))
    moved = batch | {"lengths": layout.lengths, "layout": layout}
    del moved["branches"]
    for key in _PER_TOKEN:
        if batch.get(key) is not None:
            moved[key] = batch[key].index_select(0, take)
    moved["position_ids"] = batch["position_ids"].index_select(1, take)
    for key in _ROW_INDEX:
        if batch.get(key) is not None:
            index = batch[key]
            moved[key] = torch.where(index >= 0, place[index.clamp(min=0)], -1)
    return moved, place


def latent_layout(branches: Sequence[Branches], device: torch.device) -> tuple[PrefixLayout, Tensor]:
    """The attention layout of such sequences, and from which row each of its rows comes [T] (host)."""
    starts = [0, *accumulate(sum(rows) for rows in branches)]
    fronts, middles, copies, groups, copied, borrowed = [], [], [], [], [], []
    at = 0
    for start, (prompt, rewrite, latents, copy) in zip(starts, branches, strict=False):
        middle = start + prompt + rewrite + latents
        fronts.append(torch.arange(start, start + prompt))
        middles.append(torch.arange(start + prompt, middle))
        groups.append([rewrite, latents] if rewrite else [latents])
        at += rewrite + latents
        if copy:
            copies.append(torch.arange(middle, middle + copy))
            copied.append([copy])
            borrowed.append((at - latents, at))
    layout = PrefixLayout([rows[0] for rows in branches], groups + copied, device, borrowed)
    return layout, torch.cat(fronts + middles + copies)
