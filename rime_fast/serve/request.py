"""What a client may send to ``/v1/embeddings``, read strictly: anything else is an ``ApiError`` with a name.

    {"model": NAME, "input": "text" | {"text", "image" | "images"} | a list of these,      OpenAI's form, and pictures
     "messages": [{"role": "user", "content": "text" | [{"type": "text" | "image_url", ...}]}],    in place of input
     "mode": "disc" | "gen" | "auto" | "latent", "dimensions": int, "encoding_format": "float" | "base64", "user": str}

Pictures are data URLs (``data:image/png;base64,...``): the server fetches nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from rime_fast.data.images import lift_bound
from rime_fast.data.records import Side, kind_of, load_image
from rime_fast.data.templates import Template
from rime_fast.model.token_names import MODES

KEYS = ("model", "input", "messages", "mode", "dimensions", "encoding_format", "user")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


class ApiError(Exception):
    """An answer with a 4xx or 5xx status in OpenAI's form. code: its name, for programs. param: the field at fault."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(_shown(message))
        self.status, self.code, self.param = status, code, param and _shown(param)

    def body(self) -> dict[str, Any]:
        """The JSON to answer with."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """How much a client may ask for. items: of a request. images: of an item. pixels: of an image, read from its head
    before it is decoded."""

    items: int = 256
    images: int = 8
    pixels: int = 1 << 24


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request that can be answered."""

    sides: list[Side]
    mode: str = "disc"
    dimensions: int | None = None
    base64: bool = False


def parse_request(
    body: bytes, *, name: str, width: int, limits: Limits, template: Template, modes: Sequence[str]
) -> EmbeddingRequest:
    """Read a body. name: the served model's; width: its embeddings'; modes: what it serves. Raises ApiError."""
    raw = _object(body)
    for key in raw:
        if key not in KEYS:
            raise _bad("unknown_field", f"{key!r} is not known; known: {', '.join(KEYS)}", key)
    model = raw.get("model", name)
    if not isinstance(model, str):
        raise _bad("invalid_model", f"model is {kind_of(model)}; expected text", "model")
    if model != name:
        raise ApiError(404, "model_not_found", f"model {model!r} is not served here; this is {name!r}", "model")
    if not isinstance(raw.get("user", ""), str):
        raise _bad("invalid_user", f"user is {kind_of(raw['user'])}; expected text", "user")
    mode = raw.get("mode", "disc")
    if mode not in (*MODES, "auto"):
        raise _bad("invalid_mode", f"mode is {mode!r}; expected {', '.join((*MODES, 'auto'))}", "mode")
    if mode == "latent" and mode not in modes:
        raise _bad("latent_unavailable", "mode 'latent' needs a model with latent tokens; this one has none", "mode")
    if mode == "auto" and mode not in modes:
        raise _bad("index_required", "mode 'auto' needs margins: start the server with --index", "mode")
    encoding = raw.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        message = f"encoding_format is {encoding!r}; expected 'float' or 'base64'"
        raise _bad("invalid_encoding_format", message, "encoding_format")
    dimensions = raw.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or not 1 <= dimensions <= width):
        message = f"dimensions is {dimensions!r}; expected a whole number from 1 to {width}"
        raise _bad("invalid_dimensions", message, "dimensions")
    if ("input" in raw) == ("messages" in raw):
        found = "both" if "input" in raw else "neither"
        raise _bad("input_or_messages", f"exactly one of input and messages is needed; found {found}", "input")
    reader = _Reader(limits, template)
    sides = [reader.messages(raw["messages"])] if "messages" in raw else reader.inputs(raw["input"])
    return EmbeddingRequest(sides, mode, dimensions, encoding == "base64")


class _Reader:
    """Items of one body."""

    def __init__(self, limits: Limits, template: Template) -> None:
        self.limits, self.template = limits, template

    def inputs(self, raw: Any) -> list[Side]:
        items = raw if isinstance(raw, list) else [raw]
        if not items:
            raise _bad("empty_input", "input is an empty list; expected at least one item", "input")
        if len(items) > self.limits.items:
            message = f"input has {len(items)} items; this server takes {self.limits.items} at once"
            raise _bad("too_many_items", message, "input")
        return [self._item(item, f"input[{i}]" if isinstance(raw, list) else "input") for i, item in enumerate(items)]

    def _item(self, raw: Any, where: str) -> Side:
        if isinstance(raw, str):
            return self._side(raw, [], where)
        if isinstance(raw, (int, list)):
            raise _bad(
                "token_input", f"{where} is {kind_of(raw)}; this server takes texts and pictures, not ids", where
            )
        if not isinstance(raw, dict):
            raise _bad("invalid_item", f"{where} is {kind_of(raw)}; expected text or an object", where)
        for key in raw:
            if key not in ("text", "image", "images"):
                raise _bad("unknown_field", f"{where}.{key} is not known; known: text, image, images", f"{where}.{key}")
        if "image" in raw and "images" in raw:
            raise _bad("image_and_images", f"{where} has image and images; expected one of the two", where)
        text, images = raw.get("text", ""), raw.get("images", [raw["image"]] if "image" in raw else [])
        if not isinstance(text, str):
            raise _bad("invalid_text", f"{where}.text is {kind_of(text)}; expected text", f"{where}.text")
        if not isinstance(images, list):
            raise _bad("invalid_images", f"{where}.images is {kind_of(images)}; expected a list", f"{where}.images")
        return self._side(text, images, where)

    def messages(self, raw: Any) -> Side:
        if not isinstance(raw, list) or not raw:
            raise _bad("invalid_messages", "messages is empty or no list; expected a list of user messages", "messages")
        texts: list[str] = []
        images: list[Any] = []
        for i, message in enumerate(raw):
            where = f"messages[{i}]"
            if not isinstance(message, dict):
                raise _bad("invalid_message", f"{where} is {kind_of(message)}; expected an object", where)
            for key in message:
                if key not in ("role", "content"):
                    raise _bad("unknown_field", f"{where}.{key} is not known; known: role, content", f"{where}.{key}")
            if message.get("role") != "user":
                text = f"{where}.role is {message.get('role')!r}; expected 'user': the model's own system text is used"
                raise _bad("invalid_role", text, f"{where}.role")
            content = message.get("content")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if not isinstance(content, list):
                text = f"{where}.content is {kind_of(content)}; expected text or a list of parts"
                raise _bad("invalid_content", text, f"{where}.content")
            for j, part in enumerate(content):
                self._part(part, f"{where}.content[{j}]", texts, images)
        return self._side("".join(texts), images, "messages")

    def _part(self, part: Any, where: str, texts: list[str], images: list[Any]) -> None:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            images.append(url.get("url") if isinstance(url, dict) else url)
        elif kind == "text":
            raise _bad("invalid_text", f"{where}.text is {kind_of(part.get('text'))}; expected text", f"{where}.text")
        else:
            message = f"{where} has type {kind!r}; expected an object of type 'text' or 'image_url'"
            raise _bad("invalid_part", message, where)

    def _side(self, text: str, images: list[Any], where: str) -> Side:
        if len(images) > self.limits.images:
            message = f"{where} has {len(images)} images; this server takes {self.limits.images} an item"
            raise _bad("too_many_images", message, where)
        if not text.strip() and not images:
            raise _bad("empty_item", f"{where} has no text and no image", where)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _bad("invalid_text", f"{where}: the text holds half of a surrogate pair", where) from None
        side = Side(text=text, images=[self._image(image, where) for image in images], id=where)
        try:
            self.template.render_disc(side)
        except ValueError as error:
            raise _bad("control_token", str(error), where) from None
        return side

    def _image(self, raw: Any, where: str) -> Image.Image:
        if not isinstance(raw, str):
            raise _bad("invalid_image", f"{where}: an image is {kind_of(raw)}; expected a data URL", where)
        if raw.startswith(("http:", "https:", "file:", "ftp:")):
            raise _bad("remote_image", f"{where}: this server fetches nothing; send the image as a data URL", where)
        found = _DATA_URL.match(raw[:100])
        if not found:
            message = f"{where}: an image is no data URL; expected data:image/png;base64,..."
            raise _bad("invalid_data_url", message, where)
        try:
            data = base64.b64decode(raw[found.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise _bad("invalid_base64", f"{where}: an image's data is not base64", where) from None
        try:
            lift_bound(self.limits.pixels)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is the one that counts
                image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ApiError(413, "image_too_large", f"{where}: {error}", where) from None
        except (OSError, SyntaxError, ValueError):
            raise _bad("invalid_image", f"{where}: an image is none of {', '.join(FORMATS)}", where) from None
        if image.width * image.height > self.limits.pixels:
            message = f"{where}: an image has {image.width * image.height} pixels; the limit is {self.limits.pixels}"
            raise ApiError(413, "image_too_large", message, where)
        if max(image.size) > 200 * min(image.size):
            raise _bad("image_too_thin", f"{where}: an image is {image.width} x {image.height}, beyond 1 : 200", where)
        try:
            # decoded here, turned upright, so that a cut one is named now
            return load_image({"bytes": data}, max_pixels=self.limits.pixels)
        except ValueError:
            raise _bad("invalid_image", f"{where}: an image is broken or cut short", where) from None


def _object(body: bytes) -> dict[str, Any]:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(found)
        if len(keys) < len(found):
            double = next(key for i, (key, _) in enumerate(found) if key in dict(found[:i]))
            raise _bad("duplicate_field", f"{double!r} is given twice", double)
        return keys

    def constant(word: str) -> Any:
        raise _bad("invalid_json", f"{word} is no JSON")

    if not body.strip():
        raise _bad("empty_body", "the body is empty; expected a JSON object")
    try:
        raw = json.loads(body.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError:
        raise _bad("invalid_json", "the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _bad("invalid_json", f"the body is no JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(raw, dict):
        raise _bad("invalid_body", f"the body is {kind_of(raw)}; expected an object")
    return raw


def _shown(text: str) -> str:
    """A text that an answer can hold: half a surrogate of the client's, which is no UTF-8, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _bad(code: str, message: str, param: str | None = None) -> ApiError:
    return ApiError(400, code, message, param)
