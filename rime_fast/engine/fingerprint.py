"""What embeddings depend on, as plain data: caches of embeddings and of scores are named by it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from rime_fast.engine.wrappers import dual_mode_of


def fingerprint(embedder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an embedder's embeddings depend on, and what its generated ones depend on besides."""
    collator = getattr(embedder, "collator", None)
    if collator is None:
        return {"embedder": type(embedder).__name__}, {}
    base, vision = dual_mode_of(embedder.model), collator.vision
    template = {key: str(value) for key, value in vars(collator.template).items()}
    return {
        "model": model_hash(embedder.model),
        "template": template,
        "pixels": [vision.min_pixels, vision.max_pixels, vision.video_min_pixels, vision.video_max_pixels],
        "max_length": collator.max_length,
        "token_budget": embedder.token_budget,
        "dtype": str(base.dtype),
        "attention": str(base.model.language_model.config._attn_implementation),
    }, {"max_new_tokens": embedder.max_new_tokens}


def model_hash(model: torch.nn.Module) -> str:
    """A digest of up to 256 numbers of each parameter and buffer, evenly spaced, with names and shapes: two trained
    models differ in it, and it does not depend on where the files are."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // 256)
        sample = flat[::step][:256].float().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
