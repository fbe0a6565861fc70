"""Evaluation protocols: how one and the same row of a benchmark is written for a model, and at what resolution.

Published numbers of one checkpoint differ by several points between protocols, so every result names its own.

    ume-r1    UME-R1's: vision first, the text without the vision token and without white space at its ends; an input
              without vision gets one white 28 x 28 picture; no instructions where ViDoRe's parser reads pages.
    vlm2vec   VLM2Vec-V2's strings to the letter, its vision token included; the picture goes where the token stands.
    plain     the data set's instructions with the model's own template and limits; no white picture.

In all three the text stands in the model's own chat template and the embeddings are read where the model was trained
to have them (``<disc_emb>``, ``<gen_emb>``). Sources: TIGER-AI-Lab/VLM2Vec, XMUDeepLIT/UME-R1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from rime_fast.data.records import ImageSource, Part, Side
from rime_fast.data.templates import Template, get_template
from rime_fast.data.vision_inputs import Size, VisionInputs
from rime_fast.model.tokens import GEN_TOKEN

if TYPE_CHECKING:
    from rime_fast.data.collate import Collator

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
_PATCH = 28 * 28
_THINNEST = 200  # Qwen's image processors refuse pictures thinner than 1 : 200
_SMALL = (56, 56)


@dataclass(frozen=True)
class Protocol:
    """How a benchmark's rows are written for a model. Pixels are areas; None leaves the processor's own limit.

    keep_token: the text keeps its vision token. blank_image: inputs without vision get a white picture.
    page_instructions: whether the ``vidore`` parser writes instructions. small_side: a picture with a side below this
    becomes 56 x 56; one thinner than 1 : 200 does so in any case. frames: of a video, evenly spaced.
    """

    name: str
    keep_token: bool = False
    blank_image: bool = False
    page_instructions: bool = True
    small_side: int = 0
    min_pixels: int | None = None
    max_pixels: int | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    frames: int = 8

    def side(
        self, text: str, *, images: Sequence[ImageSource] = (), video: Sequence[ImageSource] | None = None, id: str
    ) -> Side:
        """A row's text, which may hold a vision token, and its pictures, as this protocol writes them."""
        images, frames = list(images), list(video) if video else None
        if self.keep_token:
            return Side(text=text, images=images, video=frames, id=id)
        if images or video is not None:
            text = text.replace(IMAGE_TOKEN, "").replace(VIDEO_TOKEN, "")
        if self.blank_image and not images and video is None:
            images = [_white()]
        return Side(text=text.strip(), images=images, video=frames, id=id)

    def page_text(self, instruction: str) -> str:
        """The instruction of ViDoRe's parser under this protocol."""
        return instruction if self.page_instructions else ""

    def collator(self, collator: Collator) -> Collator:
        """Give ``collator`` this protocol's limits; text that looks like a control token is escaped, not refused."""
        adapted = copy.copy(collator)
        cls = InlineTemplate if self.keep_token else type(collator.template)
        adapted.template = cls(**vars(collator.template) | {"special_text": "escape"})
        adapted.vision = SuiteVision(collator.vision, self)
        return adapted

    def settings(self) -> dict[str, Any]:
        """Every field, for the files that results are written to."""
        return asdict(self)


PROTOCOLS = {
    one.name: one
    for one in (
        Protocol(
            "ume-r1",
            blank_image=True,
            page_instructions=False,
            min_pixels=_PATCH,
            max_pixels=2_359_296,
            video_min_pixels=128 * _PATCH,
            video_max_pixels=768 * _PATCH,
        ),
        Protocol("vlm2vec", keep_token=True, small_side=28, min_pixels=4 * _PATCH, max_pixels=1280 * _PATCH),
        Protocol("plain"),
    )
}


def get_protocol(name: str | Protocol = "ume-r1", **changes: Any) -> Protocol:
    """The protocol of that name (a Protocol is taken as it is), with ``changes`` to its fields.

    Raises ValueError for an unknown name or fewer than one frame.
    """
    if isinstance(name, str):
        if name not in PROTOCOLS:
            raise ValueError(f"protocol is {name!r}; expected one of {', '.join(PROTOCOLS)}")
        name = PROTOCOLS[name]
    found = replace(name, **changes) if changes else name
    if found.frames < 1:
        raise ValueError(f"frames is {found.frames}; expected at least 1")
    return found


def suite_template(name: str | Template) -> Template:
    """A template by name; beside those of training, ``ume-r1``: that of UME-R1's own evaluation.

    Its instruction is the one line which the checkpoint's evaluation code uses, where training has line breaks.
    """
    if name != "ume-r1":
        return get_template(name)
    one_line = (
        "Represent the above input text, images, videos, or any combination of the three as embeddings. First output "
        "the thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. "
        f"Finally, use the {GEN_TOKEN} tag to represent the entire input."
    )
    return replace(get_template("cot"), name="ume-r1", instruction=one_line)


class InlineTemplate(Template):
    """A template for texts that hold their vision token: the picture goes there, not in front."""

    def render_user(self, side: Side) -> str:
        before, token, after = side.text.partition(VIDEO_TOKEN if side.video else IMAGE_TOKEN)
        vision = [part for part in side.parts if part[0] != "text"]
        if not vision or not token:
            return super().render_user(side)
        parts: list[Part] = [("text", before), *vision, ("text", after)]
        return super().render_user(Side(content=[part for part in parts if part[1]]))


class SuiteVision(VisionInputs):
    """The embedder's own image pipeline under a protocol's limits: nothing a benchmark holds is refused."""

    def __init__(self, base: VisionInputs, protocol: Protocol) -> None:
        self.__dict__.update(base.__dict__)
        self.min_pixels = protocol.min_pixels or base.min_pixels
        self.max_pixels = max(self.min_pixels, protocol.max_pixels or base.max_pixels)
        self.video_min_pixels = protocol.video_min_pixels or protocol.min_pixels or base.video_min_pixels
        limit = protocol.video_max_pixels or protocol.max_pixels or base.video_max_pixels
        self.video_max_pixels = max(self.video_min_pixels, limit)
        self._small_side = protocol.small_side

    def target_size(self, size: Size) -> Size:
        return super().target_size(self._usable(size))

    def video_size(self, size: Size) -> Size:
        return super().video_size(self._usable(size))

    def _usable(self, size: Size) -> Size:
        short, long = min(size), max(size)
        return _SMALL if short < self._small_side or long > _THINNEST * short else size


def _white() -> Image.Image:
    return Image.new("RGB", (28, 28), "white")
