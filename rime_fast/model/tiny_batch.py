"""Random packed batches for the tiny models: text, images of any grid, videos, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rime_fast.model.dual_mode import dual_mode_class
from rime_fast.model.tiny import SPECIAL_TOKENS

# A sequence: numbers are runs of random text tokens, ("image", h, w) and ("video", t, h, w) are grids in patches.
Segment = int | tuple[Any, ...]


def tiny_batch(
    config: Any,
    sequences: Sequence[Sequence[Segment]],
    *,
    seed: int = 0,
    scored: float = 0.3,
    disc_id: int | None = None,
    gen_id: int | None = None,
) -> dict[str, Any]:
    """A packed batch as the model takes it: T rows, one sequence a description.

    ``scored``: about this share of the text rows has a target. disc_index lies in the middle of a sequence's last
    text run, gen_index on its last row; with ``disc_id`` / ``gen_id`` these tokens stand there too.
    """
    draw = torch.Generator().manual_seed(seed)
    first = len(SPECIAL_TOKENS)
    vocab = config.text_config.vocab_size
    vision = config.vision_config
    volume = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids: list[Tensor] = []
    kinds: list[Tensor] = []
    pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    positions, lengths = [], []
    for sequence in sequences:
        own: list[Tensor] = []
        own_grids: dict[str, list[list[int]]] = {"image": [], "video": []}
        for segment in sequence:
            if isinstance(segment, int):
                own.append(torch.randint(first, vocab, (segment,), generator=draw))
                continue
            kind, grid = segment[0], list(segment[1:])
            grid = [1, *grid] if kind == "image" else grid
            own_grids[kind].append(grid)
            pixels[kind].append(torch.randn(grid[0] * grid[1] * grid[2], volume, generator=draw))
            own.append(_vision_tokens(config, kind, grid))
        tokens = torch.cat(own)
        kind_of = (tokens == config.image_token_id) + 2 * (tokens == config.video_token_id)
        positions.append(rope_index(config, tokens, kind_of, own_grids))
        ids.append(tokens)
        kinds.append(kind_of)
        lengths.append(len(tokens))
        for kind, found in own_grids.items():
            grids[kind] += found
    ends = torch.tensor(lengths).cumsum(0)
    runs = torch.tensor([s[-1] if isinstance(s[-1], int) else 1 for s in sequences])
    input_ids = torch.cat(ids)
    disc_index, gen_index = ends - 1 - runs // 2, ends - 1
    if disc_id is not None:
        input_ids[disc_index] = disc_id
    if gen_id is not None:
        input_ids[gen_index] = gen_id
    targets = torch.roll(input_ids, -1)
    targets[torch.rand(len(targets), generator=draw) > scored] = -100
    targets[torch.cat(kinds) > 0] = -100
    targets[ends - 1] = -100
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "lengths": lengths,
        "position_ids": torch.cat(positions, dim=1),
        "mm_token_type_ids": torch.cat(kinds),
        "targets": targets,
        "disc_index": disc_index,
        "gen_index": gen_index,
    }
    for kind, values, grid_name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels[kind]:
            batch[values] = torch.cat(pixels[kind])
            batch[grid_name] = torch.tensor(grids[kind])
    return batch


def _vision_tokens(config: Any, kind: str, grid: list[int]) -> Tensor:
    """Placeholders between vision marks; Qwen3-VL marks each frame of a video on its own."""
    token = config.image_token_id if kind == "image" else config.video_token_id
    t, h, w = grid
    cells = h * w // config.vision_config.spatial_merge_size**2
    frames = (t, cells) if config.model_type == "qwen3_vl" else (1, t * cells)
    start, end = config.vision_start_token_id, config.vision_end_token_id
    return torch.tensor(([start] + [token] * frames[1] + [end]) * frames[0])


def rope_index(config: Any, tokens: Tensor, kinds: Tensor, grids: dict[str, list[list[int]]]) -> Tensor:
    """Compute M-RoPE positions [3, L] of one sequence by the family's own ``get_rope_index``."""
    stock: Any = dual_mode_class(config).__mro__[2]
    model_class = stock.__init__.__globals__[stock.__name__.replace("ForConditionalGeneration", "Model")]
    shell = SimpleNamespace(config=config)
    shell.get_vision_position_ids = lambda *a, **k: model_class.get_vision_position_ids(shell, *a, **k)
    found = {f"{kind}_grid_thw": torch.tensor(g) for kind, g in grids.items() if g}
    positions, _ = model_class.get_rope_index(shell, tokens[None], mm_token_type_ids=kinds[None], **found)
    return positions[:, 0]
