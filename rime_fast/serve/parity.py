"""Whether another engine makes our discriminative embeddings: sentence-transformers or stock transformers on an
exported folder, or a server."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rime_fast.data.records import Side, load_image
from rime_fast.model.tokens import DISC_TOKEN
from rime_fast.serve.export import CHAT_TEMPLATE

IMAGE_TOKEN = "<|image_pad|>"


def folder_embeddings(folder: str, sides: Sequence[Side], batch_size: int = 8) -> torch.Tensor:
    """Embed by sentence-transformers from an exported folder, on the CPU: [N, D] fp32.

    Raises ValueError for a batch whose inputs do not all end with ``<disc_emb>`` (a template that was replaced, a
    prompt cut short): its embeddings would be read elsewhere.
    """
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    transformer = model[0]
    wanted = transformer.tokenizer.convert_tokens_to_ids(DISC_TOKEN)
    found = []
    for begin in range(0, len(sides), batch_size):
        part = [_messages(side, opened=True) for side in sides[begin : begin + batch_size]]
        features = transformer.preprocess(part)
        ids, mask = features["input_ids"], features["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
        if not bool((ids.gather(1, last[:, None]) == wanted).all()):
            raise ValueError(f"{folder}: an input does not end with {DISC_TOKEN}; expected the exported chat template")
        if hasattr(transformer.model, "rope_deltas"):
            transformer.model.rope_deltas = None  # positions of an earlier batch
        found.append(model.encode(part, batch_size=batch_size, convert_to_tensor=True).float())
    return torch.cat(found)


def stock_embeddings(folder: str, sides: Sequence[Side]) -> torch.Tensor:
    """Embed by stock transformers from an exported folder, [N, D] fp32: its template for the prompt, AutoTokenizer,
    AutoImageProcessor and AutoModel, the last state normalised. What sentence-transformers' modules do, without the
    processor class, which needs torchvision."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    template = Path(folder, CHAT_TEMPLATE).read_text(encoding="utf-8")
    rows = []
    for side in sides:
        chat = _messages(side, opened=True)
        text = str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False))
        inputs: dict[str, Any] = {}
        if side.images:
            inputs = processor([load_image(source) for source in side.images], return_tensors="pt")
            counts = inputs["image_grid_thw"].prod(dim=1) // processor.merge_size**2
            before, *after = text.split(IMAGE_TOKEN)
            repeated = (IMAGE_TOKEN * int(n) + part for n, part in zip(counts, after, strict=True))
            text = before + "".join(repeated)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        kinds = (ids["input_ids"] == model.config.image_token_id).int()
        with torch.no_grad():
            hidden = model(**ids, **inputs, mm_token_type_ids=kinds).last_hidden_state
        rows.append(torch.nn.functional.normalize(hidden[0, -1], dim=0))
    return torch.stack(rows)


def server_embeddings(url: str, sides: Sequence[Side], model: str = "") -> torch.Tensor:
    """Embed by an OpenAI-style server (ours, vLLM), [N, D] fp32: one request an item, in its ``messages`` form.

    url: up to ``/v1``. model: the name the server gives its model ("": the first that it lists).
    """
    base = url.rstrip("/")
    model = model or _get(f"{base}/models")["data"][0]["id"]
    rows = []
    for side in sides:
        body = {"model": model, "messages": _messages(side), "encoding_format": "float"}
        answer = _get(f"{base}/embeddings", body)
        rows.append(torch.tensor(answer["data"][0]["embedding"]))
    return torch.stack(rows)


def differences(reference: torch.Tensor, found: torch.Tensor, sides: Sequence[Side]) -> dict[str, float]:
    """The largest absolute difference by kind of item ("text", "image", "both"), and of "all"."""
    if reference.shape != found.shape:
        raise ValueError(f"found is {tuple(found.shape)}; expected {tuple(reference.shape)}")
    worst = (reference - found).abs().amax(dim=1)
    kinds = ["both" if side.text and side.images else "image" if side.images else "text" for side in sides]
    by_kind = {kind: float(worst[[k == kind for k in kinds]].max()) for kind in dict.fromkeys(kinds)}
    return by_kind | {"all": float(worst.max())}


def _messages(side: Side, *, opened: bool = False) -> list[dict[str, Any]]:
    """A side as a chat: images open (sentence-transformers) or as data URLs (servers)."""
    if side.video:
        raise ValueError(f"{side.name}: videos are not compared; engines sample frames in their own ways")
    content: list[dict[str, Any]] = []
    for source in side.images:
        image = load_image(source)
        if opened:
            content.append({"type": "image", "image": image})
            continue
        png = io.BytesIO()
        (image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")).save(png, "PNG")
        data = base64.b64encode(png.getvalue()).decode("ascii")
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    if side.text:
        content.append({"type": "text", "text": side.text})
    return [{"role": "user", "content": content}]


def _get(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answered {error.code}: {error.read(500).decode(errors='replace')}") from None
    except urllib.error.URLError as error:
        raise ValueError(f"{url} cannot be reached: {error.reason}") from None
