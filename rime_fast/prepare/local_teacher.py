"""A teacher in this process, of the families that the package knows: one packed prefill a batch, one decoding of it.

A stock checkpoint is asked by the prompts, in ChatML, its own chat form. One trained here (its tokenizer holds
``<gen_emb>``) is asked in the template it was trained with: its own rewrites, for data that have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rime_fast.data.collate import Collator
from rime_fast.data.records import Part, Side
from rime_fast.data.templates import IM_END, IM_START, Template, get_template
from rime_fast.engine.fingerprint import model_hash
from rime_fast.engine.rollout import generate_rollouts
from rime_fast.engine.wrappers import dual_mode_of
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.token_names import GEN_TOKEN
from rime_fast.model.tokens import add_embedding_tokens, embedding_token_ids
from rime_fast.prepare.prompts import Request
from rime_fast.prepare.teachers import Completion, Decoding, flat_parts

_LOOP = 16  # [ours] the same words so many times in a row end a text


class ChatTemplate(Template):
    """A user turn without the embedding tokens, and the assistant's beginning. What looks like a control token is
    escaped."""

    def render_prompt(self, side: Side) -> str:
        """Write the chat up to the assistant's first token."""
        system = f"{IM_START}system\n{self.system}{IM_END}\n" if self.system else ""
        return f"{system}{IM_START}user\n{self.render_user(side)}{IM_END}\n{IM_START}assistant\n"


class ChatModel:
    """A stock checkpoint of one of the families, for chats of text and pictures."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.hash = model_hash(model)
        add_embedding_tokens(model, processor.tokenizer)  # the collator looks for them; no prompt holds one
        self.device = dual_mode_of(model).device
        self._collators: dict[str, Collator] = {}

    @classmethod
    def load(cls, name: str, *, device: str | None, dtype: Any, max_pixels: int) -> ChatModel:
        """Load it from a folder or the hub. Raises ValueError for another family."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype == "auto" and place.type == "cpu":
            dtype = torch.float32
        processor = RimeProcessor.from_pretrained(name)
        size = processor.image_processor.size
        size["longest_edge"] = max(min(size["longest_edge"], max_pixels), size["shortest_edge"])
        model: Any = DualModeModel.from_pretrained(name, dtype=dtype)
        return cls(model.to(place).eval(), processor)

    def batch(self, system: str, contents: Sequence[Sequence[Part]], frames: int) -> dict[str, Any]:
        """Pack the prompts, on the model's device."""
        if system not in self._collators:
            plain = vars(get_template("rewrite", special_text="escape", system=system or None))
            template = ChatTemplate(**plain)
            self._collators[system] = Collator(self.processor, template, dual_mode_of(self.model).config)
        sides = [Side(content=list(flat_parts(content, frames))) for content in contents]  # type: ignore[arg-type]
        batch = self._collators[system].collate_prompts(sides)
        del batch["disc_index"]
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    @torch.no_grad()
    def last_states(self, batch: dict[str, Any]) -> Tensor:
        """Compute [N, H], the last layer's state at the end of each prompt."""
        policy: Any = dual_mode_of(self.model)
        left_out = ("prompt_lengths", "image_counts", "video_counts")
        hidden = policy.encode_hidden(**{key: value for key, value in batch.items() if key not in left_out})
        return hidden[torch.tensor(batch["lengths"]).cumsum(0).to(hidden.device) - 1]


class LocalTeacher:
    """Makes a ``ChatModel`` a ``Teacher``."""

    prompted = retries = True

    def __init__(self, chat: ChatModel) -> None:
        self.chat = chat

    def identity(self) -> dict[str, Any]:
        """Name the weights, wherever they lie."""
        return {"backend": "transformers", "model": self.chat.hash}

    def write(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Do what ``Teacher`` says."""
        chat, found = self.chat, [Completion("", "", 0)] * len(requests)
        for system in dict.fromkeys(request.system for request in requests):
            places = [i for i, request in enumerate(requests) if request.system == system]
            batch = chat.batch(system, [requests[i].content for i in places], decoding.frames)
            for i, completion in zip(places, self._write(batch, decoding), strict=True):
                found[i] = completion
        return found

    def _write(self, batch: dict[str, Any], decoding: Decoding) -> list[Completion]:
        chat, tokenizer = self.chat, self.chat.processor.tokenizer
        policy: Any = dual_mode_of(chat.model)
        ends = policy.generation_config.eos_token_id
        end, pad = tokenizer.convert_tokens_to_ids(IM_END), tokenizer.pad_token_id
        stops = {end, *([ends] if isinstance(ends, int) else ends or [])}
        never = {policy.config.image_token_id, policy.config.video_token_id, *embedding_token_ids(tokenizer)}
        rollout = generate_rollouts(
            chat.model,
            batch,
            gen_id=end,
            stop_ids=sorted(stops),
            max_new_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            generator=torch.Generator(device=chat.device).manual_seed(decoding.seed),
            pad_id=pad if pad not in (None, end) else min({0, 1} - {end}),
            suppress_ids=sorted(never - stops),
            repetition_limit=_LOOP,
        )
        found = []
        for ids, count in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True):
            ended = ids[count - 1] in stops
            text = tokenizer.decode(ids[: count - 1] if ended else ids[:count], skip_special_tokens=False)
            found.append(Completion(text, "stop" if ended else "length", count))
        return found


class RimeTeacher:
    """Makes a model trained here a ``Teacher``: its own rewrites by its own template, greedily."""

    prompted = retries = False

    def __init__(self, embedder: RimeEmbedder) -> None:
        self.embedder = embedder

    def identity(self) -> dict[str, Any]:
        """Name the weights and the template."""
        collator = self.embedder.collator
        return {
            "backend": "transformers",
            "model": model_hash(self.embedder.model),
            "template": {key: str(value) for key, value in vars(collator.template).items()},
            "pixels": [collator.vision.min_pixels, collator.vision.max_pixels],
        }

    def write(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Do what ``Teacher`` says; ``decoding`` gives only the cap."""
        self.embedder.max_new_tokens = decoding.max_tokens
        made = self.embedder.encode_items([replace(request.side, rewrite=None) for request in requests], "gen")
        rewrites, found = made.rewrites or [], []
        for rewrite, tokens, reached, formed in zip(rewrites, made.tokens, made.reached, made.well_formed, strict=True):
            finish = "stop" if formed else "form" if reached else "length"
            found.append(Completion(rewrite, finish, tokens))
        return found


def load_local(
    name: str, *, template: str, device: str | None = None, dtype: Any = "auto", max_pixels: int
) -> LocalTeacher | RimeTeacher:
    """Load the teacher of a checkpoint: ``RimeTeacher`` for one that was trained here."""
    processor = RimeProcessor.from_pretrained(name)
    tokenizer = processor.tokenizer
    if tokenizer.convert_tokens_to_ids(GEN_TOKEN) in (None, tokenizer.unk_token_id):
        return LocalTeacher(ChatModel.load(name, device=device, dtype=dtype, max_pixels=max_pixels))
    embedder = RimeEmbedder.from_pretrained(
        name, device=device, dtype=dtype, template=get_template(template, special_text="escape")
    )
    return RimeTeacher(embedder)
