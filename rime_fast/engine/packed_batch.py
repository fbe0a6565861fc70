"""Cutting a packed batch (rime_fast/data/collate.py) into micro-batches: which sequences go together, what belongs to
each; and a dual-mode model over such parts for the gradient cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.engine.grad_cache import Encoded
from rime_fast.model.latent import latent_batch
from rime_fast.model.token_names import MODES
from rime_fast.model.vision_cache import VisionCache

Batch = dict[str, Any]
Runs = list[tuple[int, int]]

# Entries with a row per token, per sequence, and those that index rows.
_PER_TOKEN = ("input_ids", "mm_token_type_ids", "targets", "token_weight", "condensed")
_PER_SEQUENCE = ("side", "prompt_lengths", "scored", "branches")
_ROW_INDEX = ("disc_index", "gen_index", "latent_index")
_VISUAL = (("image", "pixel_values", 1), ("video", "pixel_values_videos", 2))


def plan_micro_batches(lengths: Sequence[int], max_tokens: int | None, *, neighbours: bool = False) -> list[list[int]]:
    """Group sequences so that a group's tokens add up to at most ``max_tokens`` (None: one group).

    Longest first, so that similar lengths come together and running out of memory shows at once; with ``neighbours``
    in the batch's own order, so that a group is a run of it. The groups are as few as the order allows, their indices
    ascend, and a sequence longer than ``max_tokens`` gets a group of its own.
    """
    if max_tokens is None:
        return [list(range(len(lengths)))]
    if not (isinstance(max_tokens, int) and max_tokens >= 1):
        raise ValueError(f"max_tokens is {max_tokens!r}; expected a whole number >= 1")
    groups: list[list[int]] = []
    room = 0
    order = range(len(lengths)) if neighbours else sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for i in order:
        if not groups or lengths[i] > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(i)
        room -= lengths[i]
    return [sorted(group) for group in groups]


class PackedBatch:
    """A packed batch that hands out parts of itself.

    Which images and videos a sequence has is taken from ``image_counts`` / ``video_counts`` (lists the collator makes),
    else read from ``mm_token_type_ids``, which waits for the device if it lies there.
    """

    def __init__(self, batch: Batch, merge_size: int = 2) -> None:
        self.batch, self.lengths = batch, [int(n) for n in batch["lengths"]]
        self.starts = [0, *accumulate(self.lengths)]
        rows = batch["input_ids"].shape[0]
        if self.starts[-1] != rows:
            raise ValueError(f"lengths sum to {self.starts[-1]}; expected the {rows} rows of input_ids")
        self.visual = {}
        for kind, pixels, code in _VISUAL:
            if batch.get(pixels) is not None:
                self.visual[kind] = _Visual.of(batch, kind, pixels, code, self.starts, merge_size)

    def take(self, sequences: Sequence[int]) -> Batch:
        """Take these sequences, in this order, as a packed batch: views of this one where they lie side by side.

        Entries it does not know about are left out; those that index rows are shifted, -1 stays -1.
        """
        runs = _runs(sequences)
        lengths = [self.lengths[i] for i in sequences]
        rows = [(self.starts[a], self.starts[b]) for a, b in runs]
        batch = self.batch
        out: dict[str, Any] = {"lengths": lengths}
        for key in _PER_TOKEN:
            if batch.get(key) is not None:
                out[key] = _cut(batch[key], rows)
        out["position_ids"] = _cut(batch["position_ids"], rows, dim=1)
        for key in _PER_SEQUENCE:
            if batch.get(key) is not None:
                value = batch[key]
                out[key] = _cut(value, runs) if isinstance(value, Tensor) else [value[i] for i in sequences]
        for key in _ROW_INDEX:
            if batch.get(key) is not None:
                out[key] = self._shifted(batch[key], runs)
        for kind, visual in self.visual.items():
            out |= visual.take(sequences, kind)
        return out | self._vision_cache(sequences)

    def has_pixels(self, sequences: Sequence[int]) -> bool:
        """Whether any of these sequences has an image or a video."""
        return any(visual.first[i + 1] > visual.first[i] for visual in self.visual.values() for i in sequences)

    def _vision_cache(self, sequences: Sequence[int]) -> Batch:
        """The batch's cache itself where all of it is taken, its part where it is filled, else none."""
        cache: VisionCache | None = self.batch.get("vision_cache")
        if cache is None:
            return {}
        if _runs(sequences) == [(0, len(self.lengths))]:
            return {"vision_cache": cache}
        offset, rows = 0, []
        for visual in self.visual.values():
            rows += [(offset + a, offset + b) for a, b in visual.patches(sequences) if b > a]
            offset += visual.patch[-1]
        return {"vision_cache": cache.part(rows)} if cache.filled and rows else {}

    def _shifted(self, index: Tensor, runs: Runs) -> Tensor:
        """Rows of the part in place of rows of the batch; a run's shift is one number, known on the host."""
        parts, first = [], 0
        for a, b in runs:
            own = index[a:b]
            parts.append(torch.where(own >= 0, own + (first - self.starts[a]), -1))
            first += self.starts[b] - self.starts[a]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Visual:
    """The images (or the videos) of a packed batch: grids on the host, and how many each sequence has."""

    def __init__(self, name: str, pixels: Tensor, grids: list[list[int]], counts: list[int]) -> None:
        self.name, self.pixels, self.grids = name, pixels, grids
        self.first = [0, *accumulate(counts)]
        patches = [t * h * w for t, h, w in grids]
        self.patch = [0, *accumulate(patches)]
        if self.first[-1] != len(grids) or self.patch[-1] != pixels.shape[0]:
            raise ValueError(
                f"the sequences have {self.first[-1]} images or videos, {name} {pixels.shape[0]} patches; "
                f"the grids are {len(grids)} with {self.patch[-1]} patches"
            )

    @classmethod
    def of(cls, batch: Batch, kind: str, pixels: str, code: int, starts: list[int], merge_size: int) -> _Visual:
        grids = batch.get(f"{kind}_grids")
        if grids is None:
            grids = batch[f"{kind}_grid_thw"].tolist()
        counts = batch.get(f"{kind}_counts")
        if counts is None:
            tokens = batch["mm_token_type_ids"].cpu() == code
            per_sequence = [int(tokens[a:b].sum()) for a, b in pairwise(starts)]
            counts = _counts(per_sequence, [t * h * w // merge_size**2 for t, h, w in grids], kind)
        return cls(pixels, batch[pixels], grids, counts)

    def take(self, sequences: Sequence[int], kind: str) -> Batch:
        """Take pixels, grids (host lists and tensor) and counts of these sequences; nothing where they have none."""
        grids = [grid for i in sequences for grid in self.grids[self.first[i] : self.first[i + 1]]]
        if not grids:
            return {}
        pixels = _cut(self.pixels, self.patches(sequences))
        counts = [self.first[i + 1] - self.first[i] for i in sequences]
        return {
            self.name: pixels,
            f"{kind}_grids": grids,
            f"{kind}_grid_thw": torch.tensor(grids),
            f"{kind}_counts": counts,
        }

    def patches(self, sequences: Sequence[int]) -> Runs:
        """The rows of the pixels that belong to these sequences."""
        return [(self.patch[self.first[a]], self.patch[self.first[b]]) for a, b in _runs(sequences)]


def _counts(tokens: list[int], sizes: list[int], kind: str) -> list[int]:
    """Images of each sequence: its placeholder tokens, filled with images in order."""
    counts, at = [], 0
    for i, wanted in enumerate(tokens):
        first = at
        while wanted > 0 and at < len(sizes):
            wanted -= sizes[at]
            at += 1
        if wanted:
            raise ValueError(f"sequence {i} has {tokens[i]} {kind} tokens; the grids make {sizes[first:at]}")
        counts.append(at - first)
    return counts


def _runs(sequences: Sequence[int]) -> Runs:
    """Neighbours joined: [3, 4, 5, 9] to [(3, 6), (9, 10)]."""
    runs: Runs = []
    for i in sequences:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def _cut(tensor: Tensor, runs: Runs, dim: int = 0) -> Tensor:
    parts = [tensor.narrow(dim, a, b - a) for a, b in runs if b > a]
    if not parts:
        return tensor.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a packed batch to the device; host lists stay."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


# --- a model over the parts ------------------------------------------------------------------------------------------

# metrics(output of the model, sequences of the part, its batch) -> name -> 0-d
PartMetrics = Callable[[Any, "Part", Batch], dict[str, Tensor]]


@dataclass
class Part:
    """One micro-batch: which sequences of the batch, their tokens together, the tower's features between the passes."""

    sequences: list[int]
    tokens: int
    vision: VisionCache

    def __copy__(self) -> Part:
        """The same sequences with features of its own."""
        return replace(self, vision=VisionCache(host=self.vision.host))


class PackedEncoder:
    """Encodes the micro-batches of one packed batch for ``GradCache``.

        encoder = PackedEncoder(model, batch, max_tokens=16384)
        cache.step(encoder.parts, encode=encoder, loss=lambda rows: my_loss(encoder.in_order(rows)))

    model: a DualModeModel, wrapped or not. batch: with disc_index / gen_index / latent_index; with targets AND
        token_weight the cross-entropy sum(w_t * -logp_t) is the micro-batches' own loss, scored in the graph pass only.
    max_tokens: of a micro-batch; None: the whole batch is one. modes: the embeddings to read out. metrics: see
        ``PartMetrics``; where it is scored.
    host_features: keep a frozen vision tower's features in host memory between the passes.
    """

    def __init__(
        self,
        model: Any,
        batch: Batch,
        max_tokens: int | None,
        *,
        modes: Sequence[str] = ("disc", "gen"),
        metrics: PartMetrics | None = None,
        merge_size: int = 2,
        host_features: bool = False,
        logprob_backend: str = "auto",
    ) -> None:
        self.model, self.modes, self.metrics = model, tuple(modes), metrics
        self.packed = PackedBatch(batch, merge_size)
        self.scored = batch.get("targets") is not None and batch.get("token_weight") is not None
        self.logprob_backend = logprob_backend
        lengths = self.packed.lengths
        groups = plan_micro_batches(lengths, max_tokens)
        self.parts = [Part(g, sum(lengths[i] for i in g), VisionCache(host=host_features)) for g in groups]
        places = torch.empty(len(lengths), dtype=torch.int64)
        places[torch.tensor([i for group in groups for i in group])] = torch.arange(len(lengths))
        self._places = places.to(batch["input_ids"].device, non_blocking=True)

    def __call__(self, part: Part, scored: bool) -> Encoded:
        """The part's embeddings, and with ``scored`` its cross-entropy."""
        taken = self.packed.take(part.sequences)
        batch, place = latent_batch(taken) if "branches" in taken else (dict(taken), None)
        pools = {mode: batch.pop(f"{mode}_index") for mode in MODES if f"{mode}_index" in batch}
        scoring: dict[str, Any] = {key: batch.pop(key) for key in ("targets", "token_weight") if key in batch}
        rows = batch.pop("scored", None)
        if scored and self.scored:
            batch |= scoring | {"max_scored": None if rows is None else sum(rows)}
        # A kept graph needs no features later: only a pass without graph fills the cache, only its repetition uses it.
        keep = not torch.is_grad_enabled() or part.vision.filled
        out = self.model(
            **batch,
            pools={mode: pools[mode] for mode in self.modes},
            vision_cache=part.vision if keep else None,
            normalize=False,
            logprob_backend=self.logprob_backend,
        )
        if place is not None and out.logp is not None:
            out.logp = out.logp.index_select(0, place)
        found = self.metrics(out, part, taken) if self.metrics is not None and out.loss is not None else {}
        # Here, not in the model: with scored tokens its operator normalises, without torch does, an ulp apart. So the
        # embeddings of both passes are the same bits.
        embeddings = {mode: F.normalize(rows, dim=-1) for mode, rows in out.embeddings.items()}
        return Encoded(embeddings, out.loss, found)

    def in_order(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put embeddings, as ``GradCache`` concatenates them, back in the order of the batch's sequences."""
        return {name: x.index_select(0, self._places) for name, x in rows.items()}


def part_tokens(part: Part) -> float:
    """The cost of a part to ``GradCache``: its tokens."""
    return float(part.tokens)
