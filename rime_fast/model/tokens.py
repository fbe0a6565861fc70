"""The two embedding tokens and the latent tokens: added to the tokenizer, given weights in the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rime_fast.model.token_names import DISC_TOKEN as DISC_TOKEN
from rime_fast.model.token_names import GEN_TOKEN as GEN_TOKEN
from rime_fast.model.token_names import LATENT_TOKEN
from rime_fast.model.token_names import REWRITE_CLOSE as REWRITE_CLOSE
from rime_fast.model.token_names import REWRITE_OPEN as REWRITE_OPEN

# UME-R1's choice: the new rows start as copies of two tokens that the checkpoint already trained as marks of a span.
_SOURCES = {DISC_TOKEN: "<|object_ref_start|>", GEN_TOKEN: "<|object_ref_end|>"}


class EmbeddingTokens(NamedTuple):
    """Token ids of ``<disc_emb>`` and ``<gen_emb>``."""

    disc_id: int
    gen_id: int


def embedding_token_ids(tokenizer: PreTrainedTokenizerBase) -> EmbeddingTokens:
    """Look up the ids of both tokens. Raises ValueError if the tokenizer lacks one."""
    vocab = tokenizer.get_vocab()
    missing = [token for token in _SOURCES if token not in vocab]
    if missing:
        raise ValueError(
            f"tokenizer lacks {', '.join(missing)}: expected a model that rime-fast trained, or one after "
            "add_embedding_tokens(model, tokenizer)"
        )
    return EmbeddingTokens(disc_id=vocab[DISC_TOKEN], gen_id=vocab[GEN_TOKEN])


def latent_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Look up the ids of ``<latent_0>``, ``<latent_1>``, ..., as many as the tokenizer has; []
    without latent rewrites."""
    vocab = tokenizer.get_vocab()
    ids: list[int] = []
    while (token := LATENT_TOKEN.format(len(ids))) in vocab:
        ids.append(vocab[token])
    return ids


@torch.no_grad()
def add_embedding_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, latent_tokens: int = 0
) -> EmbeddingTokens:
    """Make ``<disc_emb>`` and ``<gen_emb>`` known to tokenizer and model; a second call changes nothing.

    A token the tokenizer lacks is added as a special token. Its rows of the input table, and of the output table
    where that is a tensor of its own, become copies of ``<|object_ref_start|>`` (disc) and ``<|object_ref_end|>``
    (gen), or of the mean row when the tokenizer has no such tokens. The tables grow only when an id lies beyond
    them: Qwen2-VL's are padded past its tokenizer, so there they keep their size. Rows of tokens that the tokenizer
    already had are left alone: they are trained weights.

    latent_tokens: add as many latent tokens (``rime_fast/model/latent.py``) where there are none: ordinary tokens of
    the vocabulary, so that every loader, adapter and tied table keeps them. Their rows are drawn around the mean row
    with the table's own spread, from a fixed seed [ours]: K equal rows would differ by their positions alone.
    Raises ValueError where the tokenizer has another number of them.

    Call it before wrapping the model (DDP, FSDP, peft) and before the optimizer is made: a resize makes new tensors.
    """
    vocab = tokenizer.get_vocab()
    there = len(latent_token_ids(tokenizer))
    if there and latent_tokens not in (0, there):
        raise ValueError(f"latent_tokens is {latent_tokens}; this model was made with {there}")
    latents = [LATENT_TOKEN.format(i) for i in range(0 if there else latent_tokens)]
    added = [token for token in _SOURCES if token not in vocab] + latents
    if added:
        tokenizer.add_tokens(added, special_tokens=True)
    ids = embedding_token_ids(tokenizer)
    rows = _height(_tables(model)[0])
    last = max(*ids, *latent_token_ids(tokenizer))
    if last >= rows:
        model.resize_token_embeddings(last + 1, mean_resizing=False)
    for table in _tables(model) if added else []:
        with _whole(table):
            mean = table[:rows].float().mean(dim=0)
            drawn = torch.randn(len(latents), table.shape[1], generator=torch.Generator().manual_seed(0))
            spread = table[:rows].float().std(dim=0) if latents else mean
            new = dict(zip(latents, mean + drawn.to(mean.device) * spread, strict=True))
            for token in added:
                source = vocab.get(_SOURCES.get(token, ""))
                row = new.get(token, mean).to(table.dtype) if source is None else table[source]
                table[tokenizer.convert_tokens_to_ids(token)] = row
    return ids


def _height(table: torch.Tensor) -> int:
    """Rows of a table, also where ZeRO-3 has left an empty shell of it on this rank."""
    return getattr(table, "ds_shape", table.shape)[0]


def _whole(table: torch.Tensor) -> AbstractContextManager:
    """Where ZeRO-3 has partitioned ``table``: a context with all of it, written back from rank 0."""
    if not hasattr(table, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([table], modifier_rank=0)


def _tables(model: PreTrainedModel) -> list[torch.Tensor]:
    """The input table, and the output table unless it is the same tensor."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tables = [embedding.weight]
    if head is not None and head.weight is not tables[0]:
        tables.append(head.weight)
    return tables
