"""A LoRA's folder (``adapter_config.json``) read as the whole model it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rime_fast.model.card import read_facts
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.tokens import add_embedding_tokens, latent_token_ids


def is_adapter(path: str | Path) -> bool:
    """Whether ``path`` is a folder that holds an adapter and no model of its own."""
    return Path(path, "adapter_config.json").is_file() and not Path(path, "config.json").is_file()


def merged_adapter(path: str | Path, load: Callable[[str], Any]) -> Any:
    """The adapter's base model, as ``load`` gives it, with the adapter merged in.

    The embedding tokens' rows are made from the base's tokenizer, as before the training, and as many latent tokens'
    as the adapter's own tokenizer has; an adapter holds rows of the table only where it trained them. Raises
    ValueError for an adapter that names no base model. The model is of the name ``path``: what is trained on it, stands
    on base and adapter.
    """
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not base:
        raise ValueError(f"{Path(path, 'adapter_config.json')} names no base model; load it yourself and merge")
    model = load(base)
    latents = 0
    if Path(path, "tokenizer_config.json").is_file():
        latents = len(latent_token_ids(AutoTokenizer.from_pretrained(path)))
    add_embedding_tokens(model, RimeProcessor.from_pretrained(base).tokenizer, latents)
    merged = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    for parameter in merged.parameters():  # peft froze the base; now it is a model like any other
        parameter.requires_grad_(parameter.is_floating_point())
    merged.name_or_path = merged.config._name_or_path = str(path)
    facts = read_facts(path)  # of the training: an adapter's folder has no config of the model
    if dims := facts.get("matryoshka_dimensions"):
        merged.config.is_matryoshka, merged.config.matryoshka_dimensions = True, dims
    if step := facts.get("int8_step"):
        merged.config.int8_step = step
    return merged
