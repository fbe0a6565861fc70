"""Heads that make an embedding of a frozen backbone's states (Think-Then-Embed's unified form, TTE_u).

The backbone writes its trace and is not trained; a head of its own reads the states of the same tokens:

    self:n        copies of the last n decoder layers and of the final norm, fed with what enters the first of them; the
                  read-out's row. At the start it gives what the backbone gives.
    qformer:QxB   Q queries through B blocks; block i meets the states of another layer (B of them, evenly spaced), then
                  the other queries, then an MLP; the mean of the queries.
    attention:Q   Q queries meet the last states once (CoCa's pooler); normalised; their mean.
    latent:K      every last state meets K latents and an MLP (NV-Embed's); the mean of the rows.

[known: the four structures, arXiv 2510.05014; ours: the final norm inside ``self``, and widths that the paper leaves
open.] A sequence's rows are those of its prompt and trace; where the mask of sequences matters they are padded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

HEADS = "self:n, qformer:QxB, attention:Q, latent:K"


@dataclass(frozen=True)
class HeadSpec:
    """A head by its name: kind, its number (layers, queries or latents) and, of a qformer, its blocks."""

    kind: str
    count: int
    blocks: int = 1

    @classmethod
    def parse(cls, text: str, layers: int) -> HeadSpec:
        """Read "self:8" and its like for a backbone of ``layers`` layers. Raises ValueError naming what is expected."""
        found = re.fullmatch(r"(self|attention|latent):(\d+)|(qformer):(\d+)x(\d+)", text)
        if found is None or "0" in found.groups():
            raise ValueError(f"head is {text!r}; expected {HEADS}")
        kind, count, _, queries, blocks = found.groups()
        spec = cls(kind, int(count)) if kind else cls("qformer", int(queries), int(blocks))
        deep = spec.count if spec.kind == "self" else spec.blocks
        if deep > layers:
            raise ValueError(f"head is {text!r}; the model has {layers} layers")
        return spec

    def taps(self, layers: int) -> list[int]:
        """Which states it reads: number i enters layer i; number ``layers`` is the last, after the final norm."""
        if self.kind == "self":
            return [layers - self.count]
        if self.kind == "qformer":
            return [round(layers * (i + 1) / self.blocks) for i in range(self.blocks)]
        return [layers]


@dataclass(frozen=True)
class Read:
    """What a head reads: states of each tap [T, H], packed sequences of these lengths; the read-outs' rows [N]; and
    what a decoder layer is called with (self alone)."""

    states: list[Tensor]
    lengths: Sequence[int]
    index: Tensor
    layer_arguments: dict[str, Any]


class EmbeddingHead(nn.Module):
    """The head of ``spec`` over a text model's states; ``forward`` gives embeddings [N, H], not normalised."""

    def __init__(self, spec: HeadSpec, text_model: Any) -> None:
        super().__init__()
        self.spec, width = spec, text_model.config.hidden_size
        if spec.kind == "self":
            self.layers = copy.deepcopy(text_model.layers[-spec.count :])
            self.norm = copy.deepcopy(text_model.norm)
            return
        heads = next(h for h in range(8, 0, -1) if width % h == 0)
        self.queries = nn.Parameter(torch.zeros(spec.count, width))
        if spec.kind != "qformer":  # there each block's first cross-attention tells the queries apart
            nn.init.normal_(self.queries, std=1.0 if spec.kind == "attention" else 0.02)
        else:
            nn.init.normal_(self.queries, std=0.02)
        inner = spec.kind != "attention"
        self.blocks = nn.ModuleList(_Block(width, heads, spec.kind == "qformer", inner) for _ in range(spec.blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, read: Read) -> Tensor:
        if self.spec.kind == "self":
            hidden = read.states[0][None]
            for layer in self.layers:
                hidden = layer(hidden, **read.layer_arguments)
            return self.norm(hidden)[0].index_select(0, read.index)
        lengths = torch.tensor(list(read.lengths))
        inside = (torch.arange(int(lengths.max())) < lengths[:, None]).to(read.index.device, non_blocking=True)
        sides = [pad_sequence(list(s.split(list(read.lengths))), batch_first=True) for s in read.states]
        queries = self.queries.to(sides[0].dtype).expand(len(lengths), -1, -1)
        if self.spec.kind == "latent":  # the rows ask, the latents answer
            rows = self.blocks[0](sides[0], queries, None)
            return self.norm((rows * inside[..., None]).sum(1) / inside.sum(1, keepdim=True))
        for block, states in zip(self.blocks, sides, strict=True):
            queries = block(queries, states, inside[:, None, None])
        return self.norm(queries).mean(1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, rows: Tensor, others: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, x in ((self.query, rows), (self.key, others), (self.value, others))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Cross-attention, with residuals also self-attention and an MLP behind it."""

    def __init__(self, width: int, heads: int, among: bool, inner: bool) -> None:
        super().__init__()
        self.before, self.others = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross = _Attention(width, heads)
        self.among = _Attention(width, heads) if among else None
        self.before_among = nn.LayerNorm(width) if among else None
        self.before_mlp = nn.LayerNorm(width) if inner else None
        self.wide = nn.Linear(width, 8 * width) if inner else None  # GEGLU: a gate and a value of 4 widths each
        self.narrow = nn.Linear(4 * width, width) if inner else None

    def forward(self, rows: Tensor, others: Tensor, mask: Tensor | None) -> Tensor:
        met = self.cross(self.before(rows), self.others(others), mask)
        if self.before_mlp is None or self.wide is None or self.narrow is None:
            return met
        rows = rows + met
        if self.among is not None and self.before_among is not None:
            own = self.before_among(rows)
            rows = rows + self.among(own, own, None)
        gate, value = self.wide(self.before_mlp(rows)).chunk(2, -1)
        return rows + self.narrow(F.gelu(gate) * value)


def make_head(text: str, model: Any) -> EmbeddingHead:
    """Make the head called ``text`` for a dual-mode model, in its dtype and on its device.

    Raises ValueError for another name, and for copies of layers that Qwen3-VL's vision tower adds to (deepstack).
    """
    text_model = model.model.language_model
    layers, added = len(text_model.layers), len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    spec = HeadSpec.parse(text, layers)
    if spec.kind == "self" and spec.count > layers - added:
        raise ValueError(f"head is {text!r}; the vision tower adds to the first {added} layers of {layers}")
    head = EmbeddingHead(spec, text_model)
    like = text_model.norm.weight
    return head.to(like.device, like.dtype)


def tapped(model: Any, spec: HeadSpec, inputs: dict[str, Any]) -> list[Tensor]:
    """Run the backbone, without gradient, on a packed batch (``encode_hidden``): the states of the head's taps."""
    layers, taps = model.model.language_model.layers, spec.taps(len(model.model.language_model.layers))
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[number] = (args[0] if args else kwargs["hidden_states"])[0].detach()

        return hook

    handles = [
        layers[tap].register_forward_pre_hook(keep(tap), with_kwargs=True) for tap in set(taps) if tap < len(layers)
    ]
    try:
        with torch.no_grad():
            found[len(layers)] = model.encode_hidden(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [found[tap] for tap in taps]


def read_by_head(model: Any, inputs: dict[str, Any], index: Tensor) -> Tensor:
    """Embed a packed batch by the model's head, [N, H] fp32 unit rows (zero where ``index`` is -1): the backbone is run
    without gradient, unless its states are kept (``state_cache``)."""

    def make() -> list[Tensor]:
        return tapped(model, model.embedding_head.spec, inputs)

    states = make() if model.state_cache is None else model.state_cache.states(inputs, make)
    rows = of_states(model, states, inputs, index.clamp(min=0))
    return torch.where((index >= 0)[:, None], rows, 0.0)


def of_states(model: Any, states: list[Tensor], inputs: dict[str, Any], index: Tensor) -> Tensor:
    """Embed by the model's head from states at hand: inputs have ``lengths`` and ``position_ids`` (and a layout)."""
    head, arguments = model.embedding_head, {}
    if head.spec.kind == "self":
        arguments = model._attention_kwargs(inputs["lengths"], index.device, inputs.get("layout"))
        rotary = model.model.language_model.rotary_emb
        arguments["position_embeddings"] = rotary(states[0][None], inputs["position_ids"][:, None])
        arguments["attention_mask"] = None
    return F.normalize(head(Read(states, inputs["lengths"], index, arguments)).float(), dim=1)
