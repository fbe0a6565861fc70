"""From what a user passes (a path, a stock model, a processor, an adapter config) to a model ready to train."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import set_seed
from transformers.utils import logging

from rime_fast.data.check import CheckRules
from rime_fast.data.collate import Collator
from rime_fast.data.datasets import PairDataset, open_pairs
from rime_fast.data.mixture import MixtureSet, mixture_sets, open_mixture
from rime_fast.engine.anchor_bank import model_fingerprint
from rime_fast.engine.wrappers import vision_tower
from rime_fast.model.compiled import compile_layers
from rime_fast.model.dual_mode import DualModeModel, resolve_attention
from rime_fast.model.packing import PACKED_SDPA
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.state_cache import StateCache
from rime_fast.model.tokens import EmbeddingTokens, add_embedding_tokens, latent_token_ids
from rime_fast.trainers.config import CommonConfig

logger = logging.get_logger(__name__)


def prepare_model(
    model: Any, processor: Any, args: CommonConfig, peft_config: Any = None
) -> tuple[Any, Any, EmbeddingTokens]:
    """Make (model, processor, ids of the embedding tokens), ready for Trainer.

    model: directory or hub name, a stock transformers model of a supported family (its class is changed in place), a
        DualModeModel, or a peft model around one of these.
    processor: anything with ``tokenizer`` and ``image_processor``; None loads it from the model's directory.
    peft_config: wraps the model in an adapter (LoRA); ValueError if the model has one already. Latent tokens' rows are
        trained beside it.

    Adds the embedding tokens (and ``args.latent_tokens``) where they are missing, freezes the vision tower
    (``args.freeze_vision``), applies ``args.max_pixels`` and compiles the decoder layers (``args.torch_compile``).
    """
    if not isinstance(model, (str, Path, nn.Module)):
        raise TypeError(f"model is {type(model).__name__}; expected a path, a transformers model or a DualModeModel")
    source = str(model) if isinstance(model, (str, Path)) else getattr(model.config, "_name_or_path", "")
    adapted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    if adapted and peft_config is not None:
        raise ValueError("peft_config was given, but model already is a peft model; pass one or the other")
    if isinstance(model, (str, Path)):
        model = DualModeModel.from_pretrained(
            source, attn_implementation=args.attn_implementation, dtype=loading_dtype(args)
        )
    else:
        base: Any = model.get_base_model() if adapted else model  # type: ignore[operator]
        if not isinstance(base, DualModeModel):
            DualModeModel.from_model(base, attn_implementation=args.attn_implementation)
    processor = load_processor(processor, source, args.max_pixels)
    base = model.get_base_model() if adapted else model
    latents = getattr(args, "latent_tokens", 0)
    tokens = add_embedding_tokens(base, processor.tokenizer, latents)
    if args.freeze_vision:
        freeze_vision(base)
    if getattr(args, "head", None) is not None:
        if adapted or peft_config is not None:
            raise ValueError("head is set beside a peft adapter; the backbone below a head is frozen")
        give_head(base, args)
    elif (found := getattr(base.config, "embedding_head", None)) is not None:
        raise ValueError(
            f"the model has a head ({found!r}), which makes its gen embedding; joint training goes on with it by "
            f"head={found!r}, Refine-RL and adapters not at all: expected the model below the head"
        )
    if args.torch_compile:
        check_compile(args)
        compile_layers(base, args.torch_compile_backend or "inductor", args.torch_compile_mode)
    if peft_config is not None:
        from peft import get_peft_model

        if latents and not getattr(peft_config, "trainable_token_indices", None):
            # the rest of the table stays frozen; the adapter keeps these rows
            peft_config = copy.copy(peft_config)
            peft_config.trainable_token_indices = {"embed_tokens": latent_token_ids(processor.tokenizer)}
        set_seed(args.seed)  # of the adapter's first values; the Trainer's own comes too late for them
        model = get_peft_model(model, peft_config)
    return model, processor, tokens


def check_compile(args: CommonConfig) -> None:
    """Raise ValueError for settings that no graph of a layer can hold."""
    if getattr(args, "head", None) is not None:
        raise ValueError("torch_compile is set beside head, which reads states between layers; leave it out")
    if resolve_attention(args.attn_implementation) != PACKED_SDPA:
        raise ValueError("torch_compile is set, with flash-attention's package; set attn_implementation to 'sdpa'")
    plan = getattr(args, "hf_deepspeed_config", None)
    if plan is not None and plan.is_zero3():
        raise ValueError(
            "torch_compile is set beside ZeRO-3, whose hooks gather parameters inside each layer; use FSDP2"
        )


def give_head(model: Any, args: Any) -> None:
    """Give the model the head of ``args.head``, unless it has it, with everything else frozen. Raises ValueError for
    another one."""
    found = getattr(model.config, "embedding_head", None)
    if found not in (None, args.head):
        raise ValueError(f"head is {args.head!r}; the model has {found!r}")
    set_seed(args.seed)  # of the head's first values
    if found is None:
        model.attach_head(args.head)
    model.requires_grad_(False)
    model.embedding_head.requires_grad_(True)
    args.learning_rate = args.learning_rate if args.head_lr is None else args.head_lr  # nothing else is trained
    if args.state_cache is not None:
        about = f"{args.head} {model_fingerprint(model.model)}"  # below the head
        model.state_cache = StateCache(args.state_cache, about)


def loading_dtype(args: CommonConfig) -> torch.dtype:
    """The dtype that a model given as a path is loaded in (``model_dtype``)."""
    return torch.float32 if args.model_dtype == "auto" else getattr(torch, args.model_dtype)


def load_processor(processor: Any, source: str, max_pixels: int | None) -> Any:
    """Give the processor passed, or loads the one saved beside the model. Raises ValueError when there is none."""
    if processor is None:
        if not source:
            raise ValueError("processing_class is None and the model names no directory to load a processor from")
        try:
            processor = RimeProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(f"processing_class is None and {source!r} holds no processor: {error}") from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ValueError(
                f"processing_class is {type(processor).__name__} without {part}; expected a processor with "
                "tokenizer and image_processor (RimeProcessor, or transformers' Qwen processors)"
            )
    if max_pixels is not None:
        size = processor.image_processor.size
        smallest = size["shortest_edge"]
        if max_pixels < smallest:
            raise ValueError(f"max_pixels is {max_pixels}, below the processor's smallest image ({smallest})")
        processor.image_processor.size = type(size)(shortest_edge=smallest, longest_edge=max_pixels)
    return processor


def freeze_vision(model: Any) -> None:
    """Switch the gradients of the vision tower off, except its mergers' (Qwen3-VL has one per deepstack level)."""
    for name, parameter in vision_tower(model).named_parameters():
        if "merger" not in name:
            parameter.requires_grad_(False)


def make_collator(processor: Any, template: Any, config: Any, args: CommonConfig, *, ids: bool) -> Collator:
    """Make the Collator with a run's limits."""
    return Collator(
        processor,
        template,
        config,
        max_length=args.max_length,
        video_fps=args.video_fps,
        video_frames=args.video_frames,
        max_video_frames=args.max_video_frames,
        max_image_pixels=args.max_image_pixels,
        ids=ids,
    )


def as_pairs(source: Any, name: str, args: CommonConfig, collator: Collator, *, rewrites: bool) -> tuple[Any, int]:
    """Open what a user passes as a dataset, checked before step 1: (a dataset of Pair or None, bad rows left out).

    source: None, a path or a list of paths (joined), a list of sets (MixtureSet, or dicts with its fields), a list of
    Pair or of rows, a datasets.Dataset, any map-style or iterable dataset. name: for messages.
    rewrites: both sides need one. Raises DataError with file, row and field of every bad row unless
    ``args.on_bad_row`` is "skip"; TypeError for a source of another kind.
    """
    if source is None:
        return None, 0
    if (sets := mixture_sets(source, name)) is not None:
        bad = []

        def one(entry: MixtureSet) -> Any:
            root = args.image_root if entry.image_root is None else entry.image_root
            part, left_out = _opened(entry.path, entry.label, args, collator, rewrites, root, entry.format)
            bad.append(left_out)
            return part

        return open_mixture(sets, one), sum(bad)
    if isinstance(source, (list, tuple)) and source and all(isinstance(part, (str, Path)) for part in source):
        parts = [as_pairs(part, name, args, collator, rewrites=rewrites) for part in source]
        return ConcatDataset([pairs for pairs, _ in parts]), sum(bad for _, bad in parts)
    return _opened(source, name, args, collator, rewrites, args.image_root, None)


def _opened(
    source: Any,
    name: str,
    args: CommonConfig,
    collator: Collator,
    rewrites: bool,
    image_root: str | None,
    file_format: str | None,
) -> tuple[PairDataset, int]:
    options: dict[str, Any] = {"image_root": image_root, "file_format": file_format, "name": name}
    options |= {"allow_outside": args.allow_outside, "allow_urls": args.allow_urls}
    if not args.check_data:
        return PairDataset(source, **options), 0
    rules = CheckRules(
        rewrites=rewrites, max_length=args.max_length, measure=collator.measure, max_pixels=args.max_image_pixels
    )
    dataset, report = open_pairs(
        source,
        rules=rules,
        on_bad_row=args.on_bad_row,  # type: ignore[arg-type]
        **options,
    )
    if report.bad_rows and is_main_process():
        shown = "\n".join(str(problem) for problem in report.problems[:5])
        logger.warning("%s; they are left out. The first:\n%s", report.summary(), shown)
    return dataset, report.bad_rows


def is_main_process() -> bool:
    """Whether this is the first process, before the accelerator exists: by the launcher's environment."""
    return int(os.environ.get("RANK", "0")) == 0
