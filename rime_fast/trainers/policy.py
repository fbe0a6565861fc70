"""The policy's side of a Refine-RL step: the batch in which rollouts are scored (every prompt once with its rollouts,
or each rollout on its own), and the KL's reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from rime_fast.data.collate import Collator
from rime_fast.engine.packed_batch import to_device
from rime_fast.engine.wrappers import dual_mode_of, vision_tower
from rime_fast.model.packing import PACKED_SDPA
from rime_fast.model.shared_prefix import shared_prefix_batch


@dataclass
class PolicyBatch:
    """The batch of a policy forward: n prompts with G rollouts each, T rows, R: the longest of these rollouts.

    inputs: what the model's forward takes, targets included. pools: where d and g are read, by name.
    scored [n G, R] int64: the row at which each token of a rollout is scored; mask [n G, R] bool: where there is one.
    repeats: rows of the "disc" pool a prompt has.
    """

    inputs: dict[str, Any]
    pools: dict[str, Tensor]
    scored: Tensor
    mask: Tensor
    repeats: int

    def by_rollout(self, logp: Tensor) -> Tensor:
        """Arrange packed scores [T] as [n G, R]; any value outside the mask."""
        return logp.index_select(0, self.scored.flatten()).view_as(self.scored)

    def token_mean(self, values: Tensor) -> Tensor:
        """Average packed values [T] over the rollouts' tokens, 0-d."""
        return torch.where(self.mask, self.by_rollout(values), 0.0).sum() / self.mask.sum()

    def prompts(self, disc: Tensor) -> Tensor:
        """Arrange the "disc" pool's rows as one row a prompt, [n, D]."""
        return disc[:: self.repeats]


def policy_rows(lengths: Sequence[int], responses: Sequence[Sequence[int]], shared: bool) -> list[int]:
    """Count the rows of each prompt's policy forward: P - 1 + G (R + 1) where it stands once, G (P + R) where it does
    not."""
    group = len(responses) // len(lengths)
    tokens = [sum(map(len, responses[i * group : (i + 1) * group])) for i in range(len(lengths))]
    return [p - 1 + group + r if shared else group * p + r for p, r in zip(lengths, tokens, strict=True)]


def shared_policy_batch(prompts: dict[str, Any], responses: Sequence[Sequence[int]]) -> PolicyBatch:
    """Make the batch in which each prompt stands once, P + G R rows. prompts: the packed prompt batch, on the device
    already."""
    batch = shared_prefix_batch(prompts, responses)
    pools = {name: batch.pop(f"{name}_index") for name in ("disc", "gen") if f"{name}_index" in batch}
    layout = batch["layout"]
    sizes = [len(response) for response in responses]
    # A rollout's first row is the prompt's last token, which scores its first token.
    first = [layout.prefix_rows + n for n in accumulate((size + 1 for size in sizes[:-1]), initial=0)]
    batch["max_scored"] = sum(sizes)
    return PolicyBatch(batch, pools, *_scored(first, sizes, batch["input_ids"].device), 1)


def separate_policy_batch(
    collator: Collator, sides: Sequence[Any], responses: Sequence[Sequence[int]], device: torch.device
) -> PolicyBatch:
    """Make the batch in which every rollout is a sequence of its own, G (P + R) rows (for comparison, and for
    flash-attention)."""
    batch = to_device(collator.collate_responses(sides, responses), device)
    pools = {name: batch.pop(f"{name}_index") for name in ("disc", "gen")}
    starts = accumulate(batch["lengths"][:-1], initial=0)
    first = [start + prompt - 1 for start, prompt in zip(starts, batch["prompt_lengths"], strict=True)]
    sizes = [len(response) for response in responses]
    batch["max_scored"] = sum(sizes)
    return PolicyBatch(batch, pools, *_scored(first, sizes, device), len(responses) // len(sides))


def _scored(first: Sequence[int], sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, mask) [rollouts, longest], worked out on the host."""
    starts, lengths = torch.tensor(first)[:, None], torch.tensor(sizes)[:, None]
    steps = torch.arange(max(sizes))
    rows = starts + torch.minimum(steps, lengths - 1)
    return rows.to(device, non_blocking=True), (steps < lengths).to(device, non_blocking=True)


def use_packed_attention(model: nn.Module) -> None:
    """Let the text model take an attention layout: packed SDPA, whose CUDA kernel is flash-attention too."""
    dual_mode_of(model).model.language_model.config._attn_implementation = PACKED_SDPA


def no_dropout(model: nn.Module) -> None:
    """Switch dropout off: one forward serves the reward and the update, and the ratio to itself is exactly 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


_BESIDE = ("gaussian", "eva", "orthogonal", "mica")  # of peft's init_lora_weights; others change the weights below


def _starts(model: Any) -> set[str]:
    """The names by which a model's adapters were begun, without peft's default."""
    configs = getattr(model, "peft_config", {}).values()
    found = (getattr(config, "init_lora_weights", None) for config in configs)
    return {start.lower() for start in found if isinstance(start, str)}


class Reference:
    """Gives the log-probabilities of the model as it was before Refine-RL.

    kind: "auto", "adapter", "copy" or "none" (see RefineConfig.reference). Raises ValueError for "adapter" without
    one, or with one that is not the start when switched off, and for a copy of a model whose parameters are sharded at
    load (ZeRO-3): use an adapter or beta=0 there. Under FSDP2 the copy is made before the sharding: every rank holds it
    whole.
    """

    def __init__(self, model: nn.Module, kind: str, beta: float) -> None:
        adapted = hasattr(model, "disable_adapter")
        taken = sorted(start for start in _starts(model) if start not in _BESIDE)
        if kind == "auto":
            kind = "none" if beta == 0 else "adapter" if adapted and not taken else "copy"
        if kind == "adapter" and not adapted:
            raise ValueError("reference='adapter' needs a peft model (peft_config); this model has no adapter")
        if kind == "adapter" and taken:
            raise ValueError(
                f"reference='adapter', but init_lora_weights={taken[0]!r} takes the adapter out of the base's weights: "
                "without it they are another model; expected reference='copy' or 'auto'"
            )
        self.kind = kind
        self.copy: Any = None
        if kind == "copy":
            if any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters()):
                raise ValueError("reference='copy' cannot copy sharded parameters; use an adapter, or beta=0")
            self.copy = copy.deepcopy(model).eval().requires_grad_(False)

    @contextmanager
    def model(self, policy: Any) -> Iterator[Any]:
        """Give the reference to call in this block; ``policy`` is the unwrapped policy."""
        if self.kind == "adapter":
            training = policy.training
            policy.eval()
            with policy.disable_adapter():
                yield policy
            policy.train(training)
        else:
            device = next(policy.parameters()).device
            yield self.copy.to(device)

    @torch.no_grad()
    def logp(self, policy: Any, batch: dict[str, Any], temperature: float) -> Tensor | None:
        """Compute [T] fp32 of ``batch["targets"]``; None without a reference."""
        if self.kind == "none":
            return None
        with self.model(policy) as model:
            if self._dtype(model) != self._dtype(policy):  # DeepSpeed casts the policy, not the copy made before
                batch = {name: value for name, value in batch.items() if name != "vision_cache"}
            return model(**batch, pools={}, temperature=temperature).logp

    @staticmethod
    def _dtype(model: nn.Module) -> torch.dtype:
        return next(vision_tower(model).parameters()).dtype
