"""Sides to packed batches: all sequences end to end, nothing padded, everything the model needs worked out on the host.

A batch is a plain dict. N sequences, T rows in all:

    input_ids [T], mm_token_type_ids [T] int64 (0 text, 1 image, 2 video), position_ids [3, T] int64
    lengths, prompt_lengths: list[int] of N (host); a sequence is its prompt, then its response
    targets [T] int64: the token scored AT row t, which stands at t + 1; -100 where none is; scored: list[int] of N
    disc_index, gen_index [N] int64: row of the embedding token; gen_index is -1 for a sequence without a response,
        and the key is absent when none has one (as `targets` is), disc_index where the template has no ``<disc_emb>``
    pixel_values, image_grid_thw, image_grids (host); pixel_values_videos, video_grid_thw, video_grids: when there are;
        with them image_counts / video_counts: list[int] of N, how many each sequence has
    Of latent rewrites: latent_index [N, K]; in training branches and condensed (rime_fast/model/latent.py)
    Of pairs only: side [N] int64 (0 query, 1 target, 2 hard negative); negative_of [h]: each hard negative's pair.
    For the masks of false negatives (recipe/false_negatives.py), int64: query_ids, key_ids [n], negative_ids [h];
        query_contents [n], key_contents [n + h]; other_ids [m, 2], other_of [m]: further right answers and their pairs
    scores [n + h]: a teacher's logits of the targets, then of the hard negatives; NaN where a pair has none
    sets [n], blocks (list[int] of n, host): of pairs that a mixture drew
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from rime_fast.data.encode import TextEncoder
from rime_fast.data.images import MAX_PIXELS, image_size
from rime_fast.data.records import Pair, Side, content_hash, stable_hash
from rime_fast.data.rope import RopeIndexer
from rime_fast.data.templates import VIDEO, Template, get_template
from rime_fast.data.video import Frames, FrameSampling, load_frames, plan_frames
from rime_fast.data.vision_inputs import VisionInputs
from rime_fast.model.latent import add_branches, with_latents
from rime_fast.model.token_names import MODES
from rime_fast.model.tokens import embedding_token_ids, latent_token_ids

Batch = dict[str, Any]
IGNORED = -100
# [ours] Frames per second of a list of frames that does not say: the rate Qwen's own tools sample videos at.
VIDEO_FPS = 2.0


class _Head(NamedTuple):
    """Of one side: tokens of each image; (temporal patches, tokens of each, frames) of each video."""

    images: list[int]
    videos: list[tuple[int, int, Frames]]


class Collator:
    """Makes packed batches; ``collator(pairs)`` is ``collate_pairs``, so it serves as a DataLoader's collate_fn.

    processor: anything with ``tokenizer`` (holding both embedding tokens) and ``image_processor``. template: a name or
    a Template. config: the model's configuration (positions and image tokens depend on its family). max_length:
    tokens a sequence may have; a longer one is never cut: "error" raises ValueError with its name, "drop" leaves out
    its pair and names it under batch["dropped"] (pairs only). ids: whether pairs carry query_ids and key_ids.
    video_fps, video_frames, max_video_frames: frames taken of video files (FrameSampling); the first is also the rate
    of a list of frames that does not say. max_image_pixels: a larger image or frame is never decoded.
    """

    def __init__(
        self,
        processor: Any,
        template: str | Template,
        config: Any,
        *,
        max_length: int | None = None,
        on_too_long: Literal["error", "drop"] = "error",
        video_fps: float = VIDEO_FPS,
        video_frames: int | None = None,
        max_video_frames: int = 64,
        max_image_pixels: int = MAX_PIXELS,
        ids: bool = True,
    ) -> None:
        if on_too_long not in ("error", "drop"):
            raise ValueError(f"on_too_long is {on_too_long!r}; expected 'error' or 'drop'")
        tokenizer = processor.tokenizer
        self.template = get_template(template)
        self.max_length = max_length
        self.on_too_long = on_too_long
        self.sampling = FrameSampling(video_frames, video_fps, max_video_frames)
        self.ids = ids
        self.encoder = TextEncoder(tokenizer)
        self.vision = VisionInputs(processor.image_processor, max_decoded=max_image_pixels)
        self.rope = RopeIndexer(config)
        self.disc_id, self.gen_id = embedding_token_ids(tokenizer)
        self.gen_id = int(tokenizer.convert_tokens_to_ids(self.template.read_out))
        self.latent_ids = latent_token_ids(tokenizer)
        self.image_id: int = config.image_token_id
        self.video_id: int = config.video_token_id
        for name, text, given in (("image", "<|image_pad|>", self.image_id), ("video", "<|video_pad|>", self.video_id)):
            if (at := tokenizer.convert_tokens_to_ids(text)) != given:
                raise ValueError(
                    f"config.{name}_token_id is {given}, but the tokenizer, of another model, has {text} at {at}"
                )
        if self.vision.merge_size != self.rope.merge_size:
            raise ValueError(
                f"image_processor.merge_size is {self.vision.merge_size}; expected the model's {self.rope.merge_size}"
            )

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        return self.collate_pairs(pairs)

    def collate_pairs(self, pairs: Sequence[Pair], *, answers: bool = True, latents: bool = False) -> Batch:
        """Make the training batch of n pairs: queries 0..n-1, targets n..2n-1, then all hard negatives.

        A hard negative without a rewrite is a prompt only; none is scored (its targets are -100). answers: False makes
        all of them prompts up to ``<disc_emb>``, for contrast of the discriminative embeddings alone. latents: every
        sequence with its latent branch.
        """
        pairs, dropped = list(pairs), list[str]()
        if self.max_length is not None and self.on_too_long == "drop":
            pairs, dropped = self._drop_long(pairs)
        if not pairs:
            raise ValueError("no pairs to collate" + (f"; too long: {', '.join(dropped)}" if dropped else ""))
        n = len(pairs)
        negatives = [side for pair in pairs for side in pair.negatives]
        sides = [pair.query for pair in pairs] + [pair.target for pair in pairs] + negatives
        answered = [answers] * (2 * n) + [answers and side.rewrite is not None for side in negatives]
        encoded = self._encode(sides, answered, disc_only=not answers)
        batch = self._pack(sides, *encoded, scored=2 * n, latents=latents)
        batch["side"] = torch.tensor([0] * n + [1] * n + [2] * len(negatives))
        if negatives:
            owners = [i for i, pair in enumerate(pairs) for _ in pair.negatives]
            batch["negative_of"] = torch.tensor(owners)
        if self.ids:
            batch |= self._item_hashes(pairs, negatives)
        if any(pair.scores is not None for pair in pairs):
            missing = [[float("nan")] * (1 + len(pair.negatives)) for pair in pairs]
            rows = [pair.scores or none for pair, none in zip(pairs, missing, strict=True)]
            batch["scores"] = torch.tensor([row[0] for row in rows] + [x for row in rows for x in row[1:]])
        if all(pair.drawn is not None for pair in pairs):
            drawn = [pair.drawn or (0, 0) for pair in pairs]
            batch |= {"sets": torch.tensor([at for at, _ in drawn]), "blocks": [block for _, block in drawn]}
        if dropped:
            batch["dropped"] = dropped
        return batch

    @staticmethod
    def _item_hashes(pairs: Sequence[Pair], negatives: Sequence[Side]) -> Batch:
        def hashes(sides: Sequence[Side], look: Any) -> torch.Tensor:
            return torch.tensor([look(side) for side in sides], dtype=torch.int64)

        queries, targets = [pair.query for pair in pairs], [pair.target for pair in pairs]
        found = {"query_ids": hashes(queries, stable_hash), "key_ids": hashes(targets, stable_hash)}
        found["query_contents"] = hashes(queries, content_hash)
        found["key_contents"] = hashes([*targets, *negatives], content_hash)
        if negatives:
            found["negative_ids"] = hashes(negatives, stable_hash)
        others = [(i, side) for i, pair in enumerate(pairs) for side in pair.positives]
        if others:
            sides = [side for _, side in others]
            found["other_ids"] = torch.stack([hashes(sides, stable_hash), hashes(sides, content_hash)], dim=1)
            found["other_of"] = torch.tensor([i for i, _ in others])
        return found

    def collate_sides(self, sides: Sequence[Side]) -> Batch:
        """Make a batch of sides with their own rewrites as responses (or the template's filler), all scored."""
        sides = list(sides)
        return self._pack(sides, *self._encode(sides, [True] * len(sides)))

    def collate_prompts(self, sides: Sequence[Side], mode: Literal["gen", "disc", "latent"] = "gen") -> Batch:
        """Make a batch of prompts alone: "gen" up to where the assistant begins (for rollouts), "disc" only to
        ``<disc_emb>``, "latent" as gen with the latent tokens behind them."""
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        sides = list(sides)
        prompts = self._encode(sides, [False] * len(sides), disc_only=mode == "disc")
        return self._pack(sides, *prompts, latents=mode == "latent")

    def collate_responses(self, sides: Sequence[Side], responses: Sequence[Sequence[int]]) -> Batch:
        """Make a batch of prompts with given response tokens (without padding), all scored.

        ``responses``: G for each side, side by side (response i belongs to side i // G). gen_index is the last
        ``<gen_emb>`` of the response, or the last row where it has none: the caller's rollout counts those. Each
        image is processed once and its patches repeated G times.
        """
        sides, n = list(sides), len(sides)
        if not n or not responses or len(responses) % n:
            raise ValueError(f"responses has {len(responses)} entries; expected a multiple of {n} sides")
        group = len(responses) // n
        prompts, visual, _ = self._encode(sides, [False] * n)
        given = [[int(token) for token in response] for response in responses]
        if empty := [i for i, response in enumerate(given) if not response]:
            raise ValueError(f"responses[{empty[0]}] is empty")
        repeated = [side for side in sides for _ in range(group)]
        return self._pack(repeated, [ids for ids in prompts for _ in range(group)], visual, given, group=group)

    def measure(self, sides: Sequence[Side], part: Literal["train", "gen", "disc", "latent"] = "train") -> list[int]:
        """Count each side's tokens: prompt and response, prompt, prompt to ``<disc_emb>``, or prompt and latents.

        Only the heads of image files are read. Raises ValueError for images that cannot be opened.
        """
        sides = list(sides)
        heads = [self._planned(side) for side in sides]
        prompts, responses = self._texts(sides, [part == "train"] * len(sides), part == "disc", heads)
        encoded = self.encoder(prompts + responses)
        n = len(sides)
        lengths = []
        for head, prompt, response in zip(heads, encoded[:n], encoded[n:], strict=True):
            tokens = sum(head.images) - len(head.images)
            for steps, each, _ in head.videos:
                tokens += steps * (each - 1) if self.rope.family == "qwen3_vl" else steps * each - 1
            lengths.append(len(prompt) + tokens + len(response))
        return [length + len(self.latent_ids) for length in lengths] if part == "latent" else lengths

    def fingerprint(self) -> str:
        """A text equal for collators that measure alike: for what is kept about lengths (row_check.py)."""
        tokenizer = self.encoder.tokenizer
        words = getattr(tokenizer, "backend_tokenizer", None)
        state = words.to_str() if words is not None else repr(sorted(tokenizer.get_vocab().items()))
        limits = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "temporal_patch_size")
        sizes = [getattr(self.vision, name) for name in ("patch_size", "merge_size", *limits)]
        whole = f"{state}{self.template}{sizes}{self.rope.family}{self.sampling}"
        return hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    # --- the parts -------------------------------------------------------------------------------------------------

    def _encode(
        self, sides: list[Side], answered: list[bool], disc_only: bool = False
    ) -> tuple[list[list[int]], Batch, list[list[int]]]:
        """Prompt ids with image tokens expanded, the visual entries of the batch, response ids ([] without)."""
        visual, loaded = self._visual(sides)
        merged = self.vision.merge_size**2
        image_tokens = iter([t * h * w // merged for t, h, w in visual.get("image_grids", ())])
        video_grids = iter(visual.get("video_grids", ()))
        heads = [
            _Head(
                [next(image_tokens) for _ in side.images],
                [(grid[0], grid[1] * grid[2] // merged, frames) for frames in videos if (grid := next(video_grids))],
            )
            for side, videos in zip(sides, loaded, strict=True)
        ]
        visual["video_fps"] = [frames.fps for videos in loaded for frames in videos]
        prompts, responses = self._texts(sides, answered, disc_only, heads)
        encoded = self.encoder(prompts + responses)
        ids = encoded[: len(sides)]
        stamped = self.rope.family == "qwen3_vl"
        for i, head in enumerate(heads):
            if head.images:
                ids[i] = _expand(ids[i], self.image_id, head.images)
            if head.videos:
                runs = [[each] * steps if stamped else [each * steps] for steps, each, _ in head.videos]
                ids[i] = _expand(ids[i], self.video_id, list(chain.from_iterable(runs)))
        return ids, visual, encoded[len(sides) :]

    def _texts(
        self, sides: list[Side], answered: list[bool], disc_only: bool, heads: list[_Head]
    ) -> tuple[list[str], list[str]]:
        render = self.template.render_disc if disc_only else self.template.render_prompt
        prompts = [render(side) for side in sides]
        if self.rope.family == "qwen3_vl":
            for i, head in enumerate(heads):
                if head.videos:
                    before, *after = prompts[i].split(VIDEO)
                    stamps = [self._stamped(steps, frames) for steps, _, frames in head.videos]
                    prompts[i] = before + "".join(chain.from_iterable(zip(stamps, after, strict=True)))
        responses = [
            self.template.render_response(side) if wanted else "" for side, wanted in zip(sides, answered, strict=True)
        ]
        return prompts, responses

    def _stamped(self, steps: int, frames: Frames) -> str:
        """Qwen3-VL's form of a video: before each temporal patch the mean time of its first and last frame."""
        size = self.vision.temporal_patch_size
        at = [min(i, frames.length - 1) / frames.fps for i in range(steps * size)]
        times = [(at[i] + at[i + size - 1]) / 2 for i in range(0, len(at), size)]
        return "".join(f"<{time:.1f} seconds>{VIDEO}" for time in times)

    def _visual(self, sides: list[Side]) -> tuple[Batch, list[list[Frames]]]:
        """The visual entries, and the frames of each side's videos."""
        images = [source for side in sides for source in side.images]
        visual: Batch = {}
        try:
            loaded = [[self._frames(load_frames, video) for video in side.videos] for side in sides]
            if images:
                visual["pixel_values"], grids = self.vision.images(images)
                visual |= {"image_grid_thw": grids, "image_grids": grids.tolist()}
            if videos := [frames.images for found in loaded for frames in found]:
                visual["pixel_values_videos"], grids = self.vision.videos(videos)  # type: ignore[arg-type]
                visual |= {"video_grid_thw": grids, "video_grids": grids.tolist()}
        except ValueError as error:
            raise ValueError(f"{self._culprit(sides).name}: {error}") from error
        return visual, [[frames._replace(images=None) for frames in found] for found in loaded]

    def _frames(self, look: Any, video: Any) -> Frames:
        return look(video, self.sampling, max_pixels=self.vision.max_decoded)

    def _culprit(self, sides: list[Side]) -> Side:
        """The side whose images do not open, for the message."""
        for side in sides:
            try:
                self.vision.images(side.images)
                for video in side.videos:
                    self.vision.images(self._frames(load_frames, video).images or ())
            except ValueError:
                return side
        return sides[0]

    def _planned(self, side: Side) -> _Head:
        """Tokens of the side's images and videos from the heads of their files."""
        sizes = [image_size(source, max_pixels=self.vision.max_decoded) for source in side.images]
        videos = []
        for video in side.videos:
            frames = self._frames(plan_frames, video)
            steps = -(-frames.length // self.vision.temporal_patch_size)
            videos.append((steps, self.vision.frame_tokens(frames.size), frames))
        return _Head([self.vision.image_tokens(size) for size in sizes], videos)

    def _drop_long(self, pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
        kept, dropped = [], []
        for i, pair in enumerate(pairs):
            longest = max(self.measure([pair.query, pair.target]))
            for side in pair.negatives:
                longest = max(longest, *self.measure([side], "gen" if side.rewrite is None else "train"))
            if self.max_length is not None and longest > self.max_length:
                dropped.append(f"{pair.id or pair.query.id or f'pair {i} of the batch'} ({longest} tokens)")
            else:
                kept.append(pair)
        return kept, dropped

    def _pack(
        self,
        sides: list[Side],
        prompts: list[list[int]],
        visual: Batch,
        responses: list[list[int]],
        *,
        scored: int | None = None,
        group: int = 1,
        latents: bool = False,
    ) -> Batch:
        """``visual`` belongs to every ``group``-th side. The first ``scored`` responses get targets (None: all)."""
        if latents and not self.latent_ids:
            raise ValueError("this model has no latent tokens; train it with latent_tokens")
        prompt_lengths = [len(ids) for ids in prompts]
        lengths = [p + len(ids) for p, ids in zip(prompt_lengths, responses, strict=True)]
        if self.max_length is not None and lengths and max(lengths) > self.max_length:
            i = lengths.index(max(lengths))
            raise ValueError(f"{sides[i].name}: {lengths[i]} tokens; max_length is {self.max_length}")
        given, responses = responses, [with_latents(ids, self.latent_ids) if latents else ids for ids in responses]
        lengths = [p + len(ids) for p, ids in zip(prompt_lengths, responses, strict=True)]
        ids = np.array(list(chain.from_iterable(chain.from_iterable(zip(prompts, responses, strict=True)))), np.int64)
        kinds = torch.from_numpy((ids == self.image_id) + 2 * (ids == self.video_id).astype(np.int64))
        if group > 1:
            visual = _repeat_visual(visual, sides[::group], group)
        batch: Batch = {
            "input_ids": torch.from_numpy(ids),
            "lengths": lengths,
            "prompt_lengths": prompt_lengths,
            "mm_token_type_ids": kinds,
            "position_ids": self._positions(kinds, lengths, visual),
            **{key: value for key, value in visual.items() if key != "video_fps"},
        }
        for kind in ("image", "video"):
            if f"{kind}_grids" in visual:
                batch[f"{kind}_counts"] = [len(getattr(side, f"{kind}s")) for side in sides]
        starts = np.cumsum([0, *lengths])
        if self.template.with_disc:
            disc = [s + _last(p, self.disc_id) for s, p in zip(starts.tolist(), prompts, strict=False)]
            batch["disc_index"] = torch.tensor(disc)
        if any(given):
            limit = len(sides) if scored is None else scored
            batch |= self._response_rows(ids, starts, prompt_lengths, given, limit)
        if latents:
            add_branches(batch, [len(ids) for ids in given], len(self.latent_ids))
        return batch

    def _response_rows(
        self, ids: np.ndarray, starts: np.ndarray, prompt_lengths: list[int], responses: list[list[int]], scored: int
    ) -> Batch:
        targets = np.full(len(ids), IGNORED, dtype=np.int64)
        gen = []
        for i, (prompt, response) in enumerate(zip(prompt_lengths, responses, strict=True)):
            if not response:
                gen.append(-1)
                continue
            first, stop = int(starts[i]) + prompt, int(starts[i]) + prompt + len(response)
            if i < scored:
                targets[first - 1 : stop - 1] = ids[first:stop]
            at = _last(response, self.gen_id)
            gen.append(first + at if at >= 0 else stop - 1)
        rows = [len(ids) * (i < scored) for i, ids in enumerate(responses)]
        return {"targets": torch.from_numpy(targets), "gen_index": torch.tensor(gen), "scored": rows}

    def _positions(self, kinds: torch.Tensor, lengths: list[int], visual: Batch) -> torch.Tensor:
        size = self.vision.temporal_patch_size
        seconds = [size / fps for fps in visual.get("video_fps", ())]
        return self.rope(kinds, lengths, visual.get("image_grid_thw"), visual.get("video_grid_thw"), seconds or None)


def token_budget_batches(lengths: Sequence[int], budget: int, max_items: int | None = None) -> list[list[int]]:
    """Group indices so that (items of a batch) x (its longest) <= budget; similar lengths come together.

    Longest first, so that running out of memory shows at once. An item longer than the budget gets a batch of its own.
    """
    if budget <= 0:
        raise ValueError(f"budget is {budget}; expected a positive number of tokens")
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room <= 0:
            batches.append([])
            room = max(1, budget // max(lengths[i], 1))
            room = room if max_items is None else min(room, max_items)
        batches[-1].append(i)
        room -= 1
    return batches


def _expand(ids: list[int], placeholder: int, counts: Sequence[int]) -> list[int]:
    """Each placeholder repeated to its number of tokens, in order."""
    out: list[int] = []
    at = 0
    for count in counts:
        found = ids.index(placeholder, at)
        out += ids[at:found]
        out += [placeholder] * count
        at = found + 1
    return out + ids[at:]


def _last(ids: list[int], wanted: int) -> int:
    """Index of the last occurrence, -1 where there is none."""
    return len(ids) - 1 - ids[::-1].index(wanted) if wanted in ids else -1


def _repeat_visual(visual: Batch, sides: list[Side], group: int) -> Batch:
    """The visual entries with those of each side ``group`` times in a row."""
    out: Batch = {}
    for kind, pixels, counts in (
        ("image", "pixel_values", [len(side.images) for side in sides]),
        ("video", "pixel_values_videos", [len(side.videos) for side in sides]),
    ):
        if pixels not in visual:
            continue
        grids = visual[f"{kind}_grid_thw"]
        patches = visual[pixels].split(grids.prod(dim=1).tolist())
        stops = np.cumsum([0, *counts]).tolist()
        order = [j for a, b in pairwise(stops) for _ in range(group) for j in range(a, b)]
        out[pixels] = torch.cat([patches[j] for j in order])
        out[f"{kind}_grid_thw"] = grids[order]
        out[f"{kind}_grids"] = [visual[f"{kind}_grids"][j] for j in order]
        if kind == "video":
            out["video_fps"] = [visual["video_fps"][j] for j in order]
    return out
