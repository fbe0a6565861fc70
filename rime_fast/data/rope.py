"""M-RoPE positions of a packed batch, on the host.

Every sequence starts at 0. Text counts up on all three axes; an image or a video spreads over (time, height, width)
and the text after it goes on from the larger of its merged height and width. This is transformers' ``get_rope_index``,
which walks tensors token by token; here the walk is over runs of equal type and the rest is NumPy. Before its first
use for a family the result is compared with the installed transformers' on a mixed sample, and where a version should
differ, transformers' own function is called instead.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch

_CLASSES = {
    "qwen2_vl": ("transformers.models.qwen2_vl.modeling_qwen2_vl", "Qwen2VLModel"),
    "qwen2_5_vl": ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLModel"),
    "qwen3_vl": ("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLModel"),
}
FAMILIES = tuple(_CLASSES)
_VERIFIED: dict[tuple[Any, ...], bool] = {}


class RopeIndexer:
    """Positions for one model configuration (``qwen2_vl``, ``qwen2_5_vl`` or ``qwen3_vl``)."""

    def __init__(self, config: Any) -> None:
        if config.model_type not in _CLASSES:
            raise ValueError(f"config.model_type is {config.model_type!r}; expected one of {', '.join(FAMILIES)}")
        self.config = config
        self.family: str = config.model_type
        self.merge_size: int = config.vision_config.spatial_merge_size
        # Qwen2.5-VL spaces the time axis of a video by real time; the others by one a temporal patch.
        self.tokens_per_second: float | None = (
            config.vision_config.tokens_per_second if self.family == "qwen2_5_vl" else None
        )

    def __call__(
        self,
        mm_token_type_ids: torch.Tensor,
        lengths: Sequence[int],
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """position_ids [3, T] int64.

        mm_token_type_ids [T] (0 text, 1 image, 2 video) of sequences end to end, ``lengths`` of each;
        image_grid_thw / video_grid_thw [n, 3] in order of appearance; second_per_grid: seconds that one temporal
        patch of each video lasts (Qwen2.5-VL only; 1 when not given). Raises ValueError when tokens and grids differ.
        """
        if image_grid_thw is None and video_grid_thw is None:
            starts = np.cumsum([0, *lengths[:-1]])
            flat = np.arange(int(sum(lengths))) - np.repeat(starts, lengths)
            return torch.from_numpy(np.broadcast_to(flat, (3, len(flat))).copy())
        arguments = (mm_token_type_ids, lengths, image_grid_thw, video_grid_thw, second_per_grid)
        return self.fast(*arguments) if self._agrees() else self.stock(*arguments)

    def fast(
        self,
        mm_token_type_ids: torch.Tensor,
        lengths: Sequence[int],
        image_grid_thw: torch.Tensor | None,
        video_grid_thw: torch.Tensor | None,
        second_per_grid: Sequence[float] | None,
    ) -> torch.Tensor:
        """Compute the positions by our own code, for all sequences at once."""
        kinds = mm_token_type_ids.numpy()
        total = len(kinds)
        if total != sum(lengths):
            raise ValueError(f"lengths add up to {sum(lengths)}; mm_token_type_ids has {total} entries")
        grids = {1: iter(self._grids(image_grid_thw, None)), 2: iter(self._grids(video_grid_thw, second_per_grid))}
        starts = np.cumsum([0, *lengths[:-1]])
        fresh = np.zeros(total, dtype=bool)  # where a run begins
        fresh[1:] = kinds[1:] != kinds[:-1]
        fresh[starts] = True
        run_starts = np.flatnonzero(fresh)
        run_stops = np.append(run_starts[1:], total)
        bases = np.empty(len(run_starts), dtype=np.int64)
        spread: list[tuple[int, int, int, np.ndarray]] = []
        sequence_starts = set(starts.tolist())
        position = 0
        runs = zip(run_starts.tolist(), run_stops.tolist(), kinds[run_starts].tolist(), strict=True)
        for i, (start, stop, kind) in enumerate(runs):
            if start in sequence_starts:
                position = 0
            bases[i] = position - start
            if kind == 0:
                position += stop - start
                continue
            grid = next(grids[kind], None)
            offsets, advance = (None, 0) if grid is None else _vision_offsets(*grid, self.merge_size)
            if offsets is None or offsets.shape[1] != stop - start:
                raise ValueError(
                    f"rows {start}..{stop - 1} are {stop - start} {'image' if kind == 1 else 'video'} tokens; "
                    f"expected {0 if offsets is None else offsets.shape[1]} for grid {grid and grid[0]}"
                )
            spread.append((start, stop, position, offsets))
            position += advance
        out = np.empty((3, total), dtype=np.int64)
        out[:] = np.arange(total) + np.repeat(bases, run_stops - run_starts)
        for start, stop, base, offsets in spread:
            np.add(offsets, base, out=out[:, start:stop])
        return torch.from_numpy(out)

    def stock(
        self,
        mm_token_type_ids: torch.Tensor,
        lengths: Sequence[int],
        image_grid_thw: torch.Tensor | None,
        video_grid_thw: torch.Tensor | None,
        second_per_grid: Sequence[float] | None,
    ) -> torch.Tensor:
        """Compute the same by transformers' own ``get_rope_index``, called without a model, one sequence at a time."""
        module, name = _CLASSES[self.family]
        model_class = getattr(import_module(module), name)
        model = types.SimpleNamespace(config=self.config)
        model.get_vision_position_ids = types.MethodType(model_class.get_vision_position_ids, model)
        grids = {1: image_grid_thw, 2: video_grid_thw}
        taken = {1: 0, 2: 0}
        parts = []
        for kinds in mm_token_type_ids.split(list(lengths)):
            mine: dict[int, torch.Tensor | None] = {}
            for kind, given in grids.items():
                tokens, first = int((kinds == kind).sum()), taken[kind]
                while tokens > 0 and given is not None:
                    tokens -= int(given[taken[kind]].prod()) // self.merge_size**2
                    taken[kind] += 1
                mine[kind] = given[first : taken[kind]] if given is not None and taken[kind] > first else None
            extra: dict[str, Any] = {}
            if self.tokens_per_second is not None and second_per_grid is not None and mine[2] is not None:
                extra["second_per_grid_ts"] = torch.tensor(second_per_grid[taken[2] - len(mine[2]) : taken[2]])
            positions, _ = model_class.get_rope_index(
                model, kinds[None], kinds[None], image_grid_thw=mine[1], video_grid_thw=mine[2], **extra
            )
            parts.append(positions[:, 0])
        return torch.cat(parts, dim=1)

    def _grids(
        self, grids: torch.Tensor | None, second_per_grid: Sequence[float] | None
    ) -> list[tuple[tuple[int, int, int], float]]:
        """(t, h, w) and time spacing for each run of vision tokens."""
        if grids is None:
            return []
        rows = grids.tolist()
        if self.family == "qwen3_vl":
            # Each temporal patch of a video is a run of its own: a time stamp in text stands before it.
            return [((1, h, w), 1.0) for t, h, w in rows for _ in range(t)]
        if self.tokens_per_second is None:
            return [((t, h, w), 1.0) for t, h, w in rows]
        seconds = [1.0] * len(rows) if second_per_grid is None else second_per_grid
        scale = np.float32(self.tokens_per_second)  # single precision, as transformers multiplies
        return [((t, h, w), float(scale * np.float32(s))) for (t, h, w), s in zip(rows, seconds, strict=True)]

    def _agrees(self) -> bool:
        key = (self.family, self.merge_size, self.tokens_per_second)
        if key not in _VERIFIED:
            sample = self._sample()
            _VERIFIED[key] = torch.equal(self.fast(*sample), self.stock(*sample))
            if not _VERIFIED[key]:
                warnings.warn(
                    f"this transformers version computes {self.family} positions in a way rime-fast does not know; "
                    "its own, slower get_rope_index is used",
                    stacklevel=3,
                )
        return _VERIFIED[key]

    def _sample(self) -> tuple[torch.Tensor, list[int], torch.Tensor, torch.Tensor, list[float]]:
        """Two sequences: text, image (2 x 3 merged cells), text, video (3 x 1 x 2), text; then an image alone."""
        m = self.merge_size
        video = [2, 2, 0, 2, 2, 0, 2, 2] if self.family == "qwen3_vl" else [2] * 6
        first = [0, 0, *[1] * 6, 0, *video, 0, 0]
        second = [0, *[1] * 2, 0]
        images = torch.tensor([[1, 2 * m, 3 * m], [1, m, 2 * m]])
        videos = torch.tensor([[3, m, 2 * m]])
        return torch.tensor(first + second), [len(first), len(second)], images, videos, [0.75]


@lru_cache(maxsize=4096)
def _vision_offsets(grid: tuple[int, int, int], interval: float, merge_size: int) -> tuple[np.ndarray, int]:
    """Positions [3, tokens] of a grid from 0, and how far the text after it moves on."""
    t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
    time = (torch.arange(t) * interval).long().numpy()  # torch's own rounding
    offsets = np.empty((3, t, h, w), dtype=np.int64)
    offsets[0] = time[:, None, None]
    offsets[1] = np.arange(h)[:, None]
    offsets[2] = np.arange(w)
    return offsets.reshape(3, -1), max(grid[1], grid[2]) // merge_size
