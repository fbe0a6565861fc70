"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL with a tokenizer and an image processor of their own.

For tests, the demo and the CPU benchmarks: real transformers classes, a few hundred thousand parameters, nothing to
download. The tokenizer knows Qwen's special tokens at fixed ids, so a model can be built before its tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from rime_fast.model.processor import RimeProcessor

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

# Fixed ids: position in this tuple.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_UNKNOWN = "<unk>"
# A tag, a word or a digit with the space before it, one other sign, one blank: the pieces join back to the same text.
_PIECES = r"</?[a-z_]+>| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]|\s"


def tiny_tokenizer(texts: Iterable[str] = (), *, max_words: int = 4096) -> PreTrainedTokenizerFast:
    """A word-level tokenizer made from ``texts``; words it has not seen fall back to their characters.

    Tokens: ``SPECIAL_TOKENS`` (ids 0..8), ``<unk>``, the printable ASCII signs, then up to ``max_words`` words of
    ``texts``, the most frequent first (ties by spelling, so the ids depend on the texts alone). Decoding gives the
    text back exactly, white space included. Pad is ``<|endoftext|>``, end of sequence ``<|im_end|>``.
    """
    splitter = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    counts: Counter[str] = Counter()
    for text in texts:
        for special in SPECIAL_TOKENS:
            text = text.replace(special, "\n")
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    signs = ["\n", "\t", *(chr(c) for c in range(32, 127))]
    signs += sorted({sign for word in counts for sign in word} - set(signs))
    words = [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if len(w) > 1][:max_words]
    entries = [*SPECIAL_TOKENS, _UNKNOWN, *signs, *words]
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    # No merges and ignore_merges: a piece is one token when it is in the vocabulary, else its signs.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=_UNKNOWN, ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|endoftext|>", "<|im_end|>")],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def tiny_processor(
    tokenizer: PreTrainedTokenizerFast,
    *,
    patch_size: int = 4,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> RimeProcessor:
    """Put ``tokenizer`` beside Qwen's image processor (PIL, no torchvision) with a small patch.

    Image sides are rounded to multiples of ``patch_size * merge_size``; areas are kept between ``min_pixels``
    (default: one merged patch) and ``max_pixels`` (default: 64 merged patches).
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    cell = (patch_size * merge_size) ** 2
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        merge_size=merge_size,
        temporal_patch_size=temporal_patch_size,
        size={"shortest_edge": min_pixels or cell, "longest_edge": max_pixels or 64 * cell},
    )
    return RimeProcessor(tokenizer=tokenizer, image_processor=image_processor)


def tiny_config(
    family: str,
    *,
    vocab_size: int,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int | None = None,
    vision_hidden: int = 32,
    vision_layers: int = 2,
    vision_heads: int = 2,
    patch_size: int = 4,
    temporal_patch_size: int = 2,
    max_positions: int = 4096,
    init_std: float = 0.02,
    tie_word_embeddings: bool = True,
) -> Qwen2VLConfig | Qwen2_5_VLConfig | Qwen3VLConfig:
    """The configuration behind ``tiny_model``; every size is a plain number."""
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; expected one of {', '.join(FAMILIES)}")
    if hidden % heads or (hidden // heads) % 2:
        raise ValueError(f"hidden is {hidden} with {heads} heads; expected an even number of channels a head")
    half = hidden // heads // 2
    side = 3 * half // 8 if family != "qwen3_vl" else 5 * half // 16  # the published split: 16:24:24, 24:20:20
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [half - 2 * side, side, side],
    }
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate or 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "initializer_range": init_std,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
    }
    vision: dict[str, Any] = {
        "depth": vision_layers,
        "num_heads": vision_heads,
        "patch_size": patch_size,
        "temporal_patch_size": temporal_patch_size,
        "spatial_merge_size": 2,
        "initializer_range": init_std,
    }
    common: dict[str, Any] = {
        "image_token_id": SPECIAL_TOKENS.index("<|image_pad|>"),
        "video_token_id": SPECIAL_TOKENS.index("<|video_pad|>"),
        "vision_start_token_id": SPECIAL_TOKENS.index("<|vision_start|>"),
        "vision_end_token_id": SPECIAL_TOKENS.index("<|vision_end|>"),
        "tie_word_embeddings": tie_word_embeddings,
    }
    if family == "qwen2_vl":
        vision |= {"embed_dim": vision_hidden, "hidden_size": hidden, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **common)
    vision |= {"hidden_size": vision_hidden, "out_hidden_size": hidden, "intermediate_size": 2 * vision_hidden}
    if family == "qwen2_5_vl":
        # Windows of 2 x 2 merged patches in all layers but the last, so that small images have several.
        vision |= {"window_size": 4 * patch_size, "fullatt_block_indexes": [vision_layers - 1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **common)
    text |= {"head_dim": hidden // heads}
    rope["mrope_interleaved"] = True
    vision |= {
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(range(min(2, vision_layers, layers))),
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, **common)


def tiny_model(
    family: str = "qwen2_vl",
    *,
    vocab_size: int = 256,
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    **sizes: Any,
) -> PreTrainedModel:
    """A randomly initialised stock transformers model of ``family`` ("qwen2_vl", "qwen2_5_vl", "qwen3_vl").

    ``tokenizer``: when given, ``vocab_size`` is its length plus room for two embedding tokens, padded to 64, as the
    published checkpoints pad theirs. ``seed``: the weights depend on it alone; the global generator is left as it
    was. ``sizes``: see ``tiny_config``. ``DualModeModel.from_model`` makes a dual-mode model of the result.
    """
    if tokenizer is not None:
        vocab_size = -(-(len(tokenizer) + 2) // 64) * 64
    config = tiny_config(family, vocab_size=vocab_size, **sizes)
    classes: dict[str, Any] = {
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = classes[family]._from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    # Greedy defaults without sampling fields; ends as the tokenizer's eos says.
    model.generation_config.eos_token_id = SPECIAL_TOKENS.index("<|im_end|>")
    model.generation_config.pad_token_id = SPECIAL_TOKENS.index("<|endoftext|>")
    return model
