"""Embeddings of text, images, video and mixtures of them, in any mode.

disc: one prefill of the prompt up to ``<disc_emb>``. gen: greedy decoding of the rewrite, then the state AT
``<gen_emb>``. latent: one prefill of the prompt and the latent tokens of a model that has some. Items are batched by
token budget, the longest first, and come back in their own order. auto: disc, and gen for the items that an index of
disc rows is unsure about.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.utils import logging

from rime_fast.data.collate import Collator, token_budget_batches
from rime_fast.data.images import MAX_PIXELS
from rime_fast.data.records import Side, side_from_json
from rime_fast.data.templates import Template
from rime_fast.engine.wrappers import dual_mode_of
from rime_fast.eval.head_embedding import generated
from rime_fast.eval.index import THRESHOLD, EmbeddingIndex, check_auto
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.token_names import MODES
from rime_fast.recipe.settings import in_range

logger = logging.get_logger(__name__)

Item = str | Image.Image | np.ndarray | dict[str, Any] | Side
Items = Item | Iterable[Item]
Progress = Callable[[int, int], None]  # (items done, items in all)


@dataclass
class Encoded:
    """What ``encode_items`` made of N items, in their order.

    embeddings: [N, D] fp32, unit norm, on the CPU. rewrites: the parsed rewrite of each (None without decoding).
    tokens: decoded tokens of each, tags and ``<gen_emb>`` included (0 without). reached: whether each got to
    ``<gen_emb>``; where not, its embedding is the last state before the cap or the end of the turn. well_formed:
    whether the response has the template's form. seconds: wall clock, image processing included. In mode "auto" an item
    that was not decoded has the rewrite "" and 0 tokens.
    disc: [N, D], mode "both" alone: the disc embeddings, from the same prefill. disc_seconds: the part of ``seconds``
    up to the end of the prefills (of prompts a little longer than mode disc's); all of it in mode disc.
    """

    embeddings: torch.Tensor
    rewrites: list[str] | None
    tokens: list[int]
    reached: list[bool]
    well_formed: list[bool]
    seconds: float
    disc: torch.Tensor | None = None
    disc_seconds: float = 0.0

    @property
    def missing_gen(self) -> int:
        """Items whose generation never reached ``<gen_emb>``."""
        return self.reached.count(False)

    @property
    def format_errors(self) -> int:
        """Items whose response does not have the template's form (those of ``missing_gen`` among them)."""
        return self.well_formed.count(False)

    @property
    def mean_tokens(self) -> float:
        """Decoded tokens per item."""
        return sum(self.tokens) / len(self.tokens)

    def without_decoding(self) -> Encoded:
        """The disc embeddings of mode "both" as mode disc would have returned them. Raises ValueError in mode gen."""
        if self.disc is None:
            raise ValueError("there are no disc embeddings; encode in mode 'both'")
        n = len(self.tokens)
        return Encoded(self.disc, None, [0] * n, [True] * n, [True] * n, self.disc_seconds, None, self.disc_seconds)


@dataclass
class EmbedderStats:
    """Running counts over every call of one embedder, by mode."""

    items: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODES, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODES, 0.0))
    decoded_tokens: int = 0
    missing_gen: int = 0
    format_errors: int = 0

    def add(self, mode: str, one: Encoded) -> None:
        """Count one call."""
        self.items[mode] += len(one.tokens)
        self.seconds[mode] += one.seconds
        self.decoded_tokens += sum(one.tokens)
        self.missing_gen += one.missing_gen
        self.format_errors += one.format_errors


class RimeEmbedder:
    """Embeds items with a dual-mode model.

    model: a DualModeModel (or a stock model of its families, re-classed in place), where it is: no device move.
    processor: anything with ``tokenizer`` and ``image_processor``. template: the one the model was trained with.
    token_budget: tokens of a batch, padding counted; prompt and ``max_new_tokens`` together in mode gen.
    max_new_tokens: cap of a rewrite; one that has no ``<gen_emb>`` by then is counted in ``stats.missing_gen``.
    max_image_pixels: a larger image is never decoded.
        embedder = RimeEmbedder.from_pretrained("runs/sft")
        d = embedder.encode(["a red shoe", Image.open("shoe.png")])
        g, rewrites = embedder.encode([{"text": "which shoe?", "image": "shoe.png"}], mode="gen", return_rewrites=True)
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        template: str | Template = "rewrite",
        *,
        token_budget: int = 16384,
        max_new_tokens: int = 512,
        max_length: int | None = None,
        max_image_pixels: int = MAX_PIXELS,
    ) -> None:
        limits = {"token_budget": token_budget, "max_new_tokens": max_new_tokens, "max_image_pixels": max_image_pixels}
        for name, value in limits.items():
            in_range(name, value, 1)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if isinstance(base, PreTrainedModel) and not isinstance(base, DualModeModel):
            DualModeModel.from_model(base)
        base = dual_mode_of(model)
        self.model, self.processor = model, processor
        self.collator = Collator(processor, template, base.config, max_length=max_length)
        self.collator.vision.max_decoded = max_image_pixels
        self.token_budget, self.max_new_tokens = token_budget, max_new_tokens
        self.stats = EmbedderStats()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **options: Any,
    ) -> RimeEmbedder:
        """Load a directory written by a trainer's ``save_model`` (a LoRA's too), or any checkpoint with the embedding
        tokens.

        device: None takes CUDA when there is one. dtype: "auto" takes the checkpoint's on CUDA, float32 on the CPU.
        options: see the class. Raises ValueError for a tokenizer without the embedding tokens.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype == "auto" and device.type == "cpu":
            dtype = torch.float32
        processor = RimeProcessor.from_pretrained(name_or_path, min_pixels=min_pixels, max_pixels=max_pixels)
        model: Any = DualModeModel.from_pretrained(name_or_path, attn_implementation=attn_implementation, dtype=dtype)
        return cls(model.to(device), processor, **options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return dual_mode_of(self.model).device

    @property
    def modes(self) -> tuple[str, ...]:
        """The embeddings this model gives: "latent" where it has latent tokens, "gen" alone without ``<disc_emb>``."""
        return (MODES if self.collator.latent_ids else MODES[:2]) if self.collator.template.with_disc else ("gen",)

    @property
    def width(self) -> int:
        """How many numbers an embedding has."""
        return dual_mode_of(self.model).config.get_text_config().hidden_size

    def check_widths(self, widths: Iterable[int]) -> None:
        """Raise ValueError for Matryoshka widths that no embedding of this model has."""
        if wrong := [width for width in widths if not 1 <= width <= self.width]:
            raise ValueError(f"dims is {wrong[0]}; expected 1 to {self.width}, the model's hidden size")

    @overload
    def encode(
        self,
        items: Items,
        mode: str = ...,
        *,
        index: EmbeddingIndex | None = ...,
        threshold: float = ...,
        return_rewrites: Literal[False] = ...,
        progress: Any = ...,
    ) -> torch.Tensor: ...

    @overload
    def encode(
        self,
        items: Items,
        mode: str = ...,
        *,
        index: EmbeddingIndex | None = ...,
        threshold: float = ...,
        return_rewrites: Literal[True],
        progress: Any = ...,
    ) -> tuple[torch.Tensor, list[str]]: ...

    def encode(
        self,
        items: Items,
        mode: str = "disc",
        *,
        index: EmbeddingIndex | None = None,
        threshold: float = THRESHOLD,
        return_rewrites: bool = False,
        progress: Progress | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[str]]:
        """Embed items as [N, D] fp32 unit rows on the CPU; with ``return_rewrites`` (modes "gen" and "auto") the N
        rewrites come too.

        items: one item, which makes one row, or a sequence of them. An item is str (text), PIL image or [H, W, 3]
        uint8 array, dict (text, image | images, video: list of frames) or ``Side``. mode: "disc", "gen", "latent", or
        "auto", which needs ``index``, an index of disc rows: items whose first two places in it lie closer than
        ``threshold`` (0 to 2) are embedded again in mode gen; the others have "" as their rewrite. progress: called
        with (items done, items in all) after each batch; an item that is embedded twice counts twice. Raises
        ValueError for an unknown mode, no items, an item that cannot be read, or an index or threshold that mode auto
        cannot use, TypeError for anything else.
        """
        if mode not in (*MODES, "auto"):
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(map(repr, (*MODES, 'auto')))}")
        if return_rewrites and mode not in ("gen", "auto"):
            raise ValueError(f"return_rewrites needs mode 'gen' or 'auto', got {mode!r}, which decodes nothing")
        encoded = self.encode_items(items, mode, index=index, threshold=threshold, progress=progress)
        return (encoded.embeddings, encoded.rewrites or []) if return_rewrites else encoded.embeddings

    def encode_both(
        self, items: Items, *, progress: Progress | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Embed items in both modes from one prefill, (disc [N, D], gen [N, D], rewrites): ``<disc_emb>`` stands in the
        prompt of the rewrite."""
        encoded = self.encode_items(items, "both", progress=progress)
        assert encoded.disc is not None
        return encoded.disc, encoded.embeddings, encoded.rewrites or []

    @torch.no_grad()
    def encode_items(
        self,
        items: Items,
        mode: str,
        *,
        index: EmbeddingIndex | None = None,
        threshold: float = THRESHOLD,
        progress: Progress | None = None,
    ) -> Encoded:
        """Embed as ``encode`` does, and return everything that was counted on the way.

        mode: also "both": as gen, with the disc embeddings of the same prefill in ``disc``.
        """
        if mode not in (*MODES, "both", "auto"):
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(map(repr, (*MODES, 'both', 'auto')))}")
        if mode != "gen" and not (template := self.collator.template).with_disc:
            raise ValueError(f"mode is {mode!r}; template {template.name!r} has no disc embedding, expected 'gen'")
        if mode == "auto":
            return self._auto(items, check_auto(index, self.width, threshold), threshold, progress)
        if index is not None:
            raise ValueError(f"index goes with mode 'auto', got mode {mode!r}")
        sides = [as_side(item, f"items[{i}]") for i, item in enumerate(as_items(items))]
        if not sides:
            raise ValueError("items is empty; expected at least one")
        begin = time.perf_counter()
        part: Any = "gen" if mode == "both" else mode
        extra = self.max_new_tokens if part == "gen" else 0
        lengths = [length + extra for length in self.collator.measure(sides, part)]
        rows: list[_Row | None] = [None] * len(sides)
        done, prefills = 0, time.perf_counter() - begin
        with _evaluating(self.model):
            for batch in token_budget_batches(lengths, self.token_budget):
                started = time.perf_counter()
                packed = self._to_device(self.collator.collate_prompts([sides[i] for i in batch], part))
                made, prefilled = self._gen(packed) if part == "gen" else self._prefill(packed, part)
                prefills += prefilled - started
                for i, row in zip(batch, made, strict=True):
                    rows[i] = row
                done += len(batch)
                if progress is not None:
                    progress(done, len(sides))
        full = [row for row in rows if row is not None]
        encoded = Encoded(
            embeddings=torch.stack([row.embedding for row in full]),
            rewrites=[row.rewrite for row in full] if part == "gen" else None,
            tokens=[row.tokens for row in full],
            reached=[row.reached for row in full],
            well_formed=[row.well_formed for row in full],
            seconds=time.perf_counter() - begin,
            disc=torch.stack([row.disc for row in full if row.disc is not None]) if mode == "both" else None,
            disc_seconds=prefills,
        )
        self._count(part, encoded)
        return encoded

    def _auto(self, items: Items, index: EmbeddingIndex, threshold: float, progress: Progress | None) -> Encoded:
        """Disc for all; gen in its place where the margin in ``index`` is below ``threshold``."""
        begin = time.perf_counter()
        sides = [as_side(item, f"items[{i}]") for i, item in enumerate(as_items(items))]
        made = self.encode_items(sides, "disc", progress=progress)
        made.rewrites = [""] * len(sides)
        unsure = (index.margins(made.embeddings) < threshold).nonzero().flatten().tolist()
        if unsure:
            report = progress and (lambda done, _: progress(len(sides) + done, len(sides) + len(unsure)))
            gen = self.encode_items([sides[i] for i in unsure], "gen", progress=report)
            made.embeddings[unsure] = gen.embeddings
            for k, i in enumerate(unsure):
                made.rewrites[i], made.tokens[i] = (gen.rewrites or [])[k], gen.tokens[k]
                made.reached[i], made.well_formed[i] = gen.reached[k], gen.well_formed[k]
        made.seconds = time.perf_counter() - begin
        return made

    @torch.no_grad()
    def encode_rewritten(self, items: Items, rewrites: Sequence[str]) -> torch.Tensor:
        """Embed items with these rewrites in place of the model's own: [N, D] fp32 unit rows of mode gen.

        rewrites: one an item, "" for none at all; what looks like a control token in one is escaped. Nothing is
        decoded. Raises ValueError for another number of rewrites.
        """
        sides = [as_side(item, f"items[{i}]") for i, item in enumerate(as_items(items))]
        if len(sides) != len(rewrites) or not sides:
            raise ValueError(f"rewrites has {len(rewrites)} entries for {len(sides)} items; expected one each")
        sides = [replace(side, rewrite=rewrite) for side, rewrite in zip(sides, rewrites, strict=True)]
        collator = copy.copy(self.collator)
        collator.template = replace(collator.template, filler=_own_rewrite, special_text="escape")
        rows: list[torch.Tensor | None] = [None] * len(sides)
        with _evaluating(self.model):
            for batch in token_budget_batches(collator.measure(sides, "train"), self.token_budget):
                packed = self._to_device(collator.collate_sides([sides[i] for i in batch]))
                del packed["targets"]  # embeddings alone: no product with the vocabulary
                for i, row in zip(batch, self.model(**packed).embeddings["gen"].float().cpu(), strict=True):
                    rows[i] = row
        return torch.stack([row for row in rows if row is not None])

    def _prefill(self, packed: dict[str, Any], mode: str) -> tuple[list[_Row], float]:
        """The rows, and when their prefill was done."""
        rows = [_Row(embedding) for embedding in self.model(**packed).embeddings[mode].float().cpu()]
        return rows, time.perf_counter()

    def _gen(self, packed: dict[str, Any]) -> tuple[list[_Row], float]:
        """As ``_prefill``: the head's first call is the end of the prefill."""
        tokenizer = self.processor.tokenizer
        ended: list[float] = []
        hook = dual_mode_of(self.model).lm_head.register_forward_pre_hook(lambda *_: self._clock(ended))
        try:
            rollout, embedded = generated(
                self.model,
                packed,
                gen_id=self.collator.gen_id,
                max_new_tokens=self.max_new_tokens,
                temperature=0.0,
                pad_id=tokenizer.pad_token_id or 0,
            )
        finally:
            hook.remove()
        states = embedded.cpu()
        discs: Any = [None] * len(states)
        if rollout.disc_states is not None:
            discs = torch.nn.functional.normalize(rollout.disc_states, dim=1).cpu()
        counts, reached = rollout.lengths.tolist(), rollout.finished.tolist()
        rows = []
        for state, disc, ids, count, ok in zip(states, discs, rollout.tokens.tolist(), counts, reached, strict=True):
            text = tokenizer.decode(ids[:count], skip_special_tokens=False)
            rewrite, well_formed = self.collator.template.parse_response(text)
            rows.append(_Row(state, rewrite, count, ok, well_formed and ok, disc))
        return rows, ended[0] if ended else time.perf_counter()

    def _clock(self, times: list[float]) -> None:
        """Note the time once, when the device has done what it was given."""
        if not times:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter())

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.device
        return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    def _count(self, mode: str, encoded: Encoded) -> None:
        self.stats.add(mode, encoded)
        if encoded.missing_gen:
            logger.warning(
                "%d of %d generations never reached %s within %d tokens; their last state stands in",
                *(encoded.missing_gen, len(encoded.tokens), self.collator.template.read_out, self.max_new_tokens),
            )


@dataclass
class _Row:
    embedding: torch.Tensor
    rewrite: str = ""
    tokens: int = 0
    reached: bool = True
    well_formed: bool = True
    disc: torch.Tensor | None = None


def _own_rewrite(side: Side) -> str:
    return side.rewrite or ""


def as_items(items: Items) -> Iterable[Item]:
    """Read an argument that is one item or several as a list of items. Raises TypeError for what is neither."""
    if isinstance(items, (str, Image.Image, dict, Side)) or (isinstance(items, np.ndarray) and items.ndim in (2, 3)):
        return [items]
    # sets have no order, and what has columns (a data frame) would give their names
    if isinstance(items, (bytes, np.ndarray, set, frozenset, Mapping)) or hasattr(items, "columns"):
        raise TypeError(f"items is {type(items).__name__}; expected one item or a sequence of items")
    if not isinstance(items, Iterable):
        raise TypeError(f"items is {type(items).__name__}; expected one item or a sequence of items")
    return items


def as_side(item: Item, where: str = "item") -> Side:
    """Read any accepted item as a Side. Raises ValueError or TypeError naming ``where``."""
    if isinstance(item, Side):
        return item
    if isinstance(item, str):
        return Side(text=item)
    if isinstance(item, (Image.Image, np.ndarray)):
        return Side(images=[item])
    if isinstance(item, dict):
        problems: list[tuple[str, str]] = []
        side = side_from_json(item, where, ".", problems)
        if problems:
            raise ValueError("; ".join(f"{name} {problem}" for name, problem in problems))
        return side
    raise TypeError(f"{where} is {type(item).__name__}; expected str, PIL image, uint8 array, dict or Side")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; afterwards as it was (an embedder may share a trainer's model)."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
