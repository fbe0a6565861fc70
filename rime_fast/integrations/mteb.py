"""A trained model as an encoder of mteb, so that its benchmarks (MIEB, ViDoRe, MVEB and the text ones) run on it.

    import mteb
    from rime_fast.integrations.mteb import RimeMtebEncoder

    encoder = RimeMtebEncoder(RimeEmbedder.from_pretrained("runs/refine"), mode="gen", name="ours/refine")
    mteb.evaluate(encoder, mteb.get_tasks(["VidoreArxivQARetrieval"]))

mteb's subsets and prompts are not MMEB's: numbers of the two cannot be compared. Extra ``mteb``, from Python 3.11 on.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from rime_fast.data.records import ImageSource, Side
from rime_fast.data.templates import get_template
from rime_fast.engine.fingerprint import fingerprint
from rime_fast.model.token_names import MODES

CHUNK = 256  # items given to the embedder at a time; it makes its own batches of them


class RimeMtebEncoder(AbsEncoder):
    """A RimeEmbedder behind mteb's encoder protocol.

    mode: "disc", "gen" or "latent". name: as "owner/model", for mteb's result files; the mode is added to it.
    revision: mteb gives a task's old result back where name and revision are known to it; None takes a digest of all
    that embeddings depend on (weights, template, pixels, and so on).
    instructions: whether mteb's task prompt goes in front of queries and of items of tasks without documents; documents
    never get one. frames: of a video (videos need torchcodec; without it only text and image tasks are offered).
    """

    def __init__(
        self,
        embedder: Any,
        *,
        mode: str = "disc",
        name: str = "local/rime",
        revision: str | None = None,
        instructions: bool = True,
        frames: int = 8,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(map(repr, MODES))}")
        if name.count("/") != 1:
            raise ValueError(f"name is {name!r}; expected owner/model")
        self.embedder, self.mode, self.instructions, self.frames = copy.copy(embedder), mode, instructions, frames
        # what looks like a control token in a benchmark's text is escaped, not refused
        self.embedder.collator = copy.copy(embedder.collator)
        self.embedder.collator.template = get_template(embedder.collator.template, special_text="escape")
        common, gen = fingerprint(self.embedder)
        facts = [common, gen if mode == "gen" else {}, instructions, frames]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        modalities = ["text", "image"] + (["video"] if find_spec("torchcodec") else [])
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"{name}-{mode}",
                "revision": revision or digest,
                "modalities": modalities,
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": instructions,
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed mteb's loader ``inputs`` as [N, D] fp32 unit rows; its batch size does not matter."""
        if "video" in getattr(inputs.dataset, "features", {}):
            from mteb.models.modality_collators import FramesCollator

            inputs.collate_fn = FramesCollator(num_frames=self.frames)
        instruction = ""
        if self.instructions and prompt_type != PromptType.document:
            instruction = self.get_instruction(task_metadata, prompt_type) or ""
        rows, waiting = [], []
        for side in _sides(inputs, instruction):
            waiting.append(side)
            if len(waiting) == CHUNK:
                rows.append(self.embedder.encode(waiting, self.mode).numpy())
                waiting = []
        if waiting:
            rows.append(self.embedder.encode(waiting, self.mode).numpy())
        return np.concatenate(rows)


def _sides(batches: Any, instruction: str) -> Iterator[Side]:
    """The items of mteb's batches: dicts of lists, of which text, image and video count."""
    for batch in batches:
        texts, images, videos = (batch.get(key) for key in ("text", "image", "video"))
        for i in range(len(next(one for one in (texts, images, videos) if one is not None))):
            text = "" if texts is None else str(texts[i])
            line = f"{instruction} {text}".strip()
            frames: list[ImageSource] | None = None
            if videos is not None:  # [frames, channels, height, width]
                frames = [np.asarray(frame).transpose(1, 2, 0) for frame in videos[i]]
            yield Side(text=line, images=[] if images is None else [images[i]], video=frames)
