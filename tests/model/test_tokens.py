from __future__ import annotations

import pytest
import torch

from rime_fast.model.tiny import tiny_model, tiny_tokenizer
from rime_fast.model.tokens import DISC_TOKEN, GEN_TOKEN, add_embedding_tokens, embedding_token_ids

TEXTS = ["a small world of words", "<rewrite>3 1 4</rewrite>\n"]


def weights(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def test_no_resize_when_the_table_is_padded():
    tokenizer = tiny_tokenizer(TEXTS)
    model = tiny_model(tokenizer=tokenizer)
    before = weights(model)[0].shape
    ids = add_embedding_tokens(model, tokenizer)
    table = weights(model)[0]
    assert table.shape == before
    vocab = tokenizer.get_vocab()
    assert torch.equal(table[ids.disc_id], table[vocab["<|object_ref_start|>"]])
    assert torch.equal(table[ids.gen_id], table[vocab["<|object_ref_end|>"]])
    assert tokenizer.encode(f"a{DISC_TOKEN}{GEN_TOKEN}", add_special_tokens=False)[-2:] == list(ids)


@pytest.mark.parametrize("tied", [True, False])
def test_resize_when_the_table_is_too_small(tied):
    tokenizer = tiny_tokenizer(TEXTS)
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    kept = [table.clone() for table in weights(model)]
    ids = add_embedding_tokens(model, tokenizer)
    tables = weights(model)
    assert (tables[0] is tables[1]) == tied
    for table, old in zip(tables, kept, strict=True):
        assert table.shape[0] == len(tokenizer)
        assert torch.equal(table[: old.shape[0]], old)
        assert torch.equal(table[ids.disc_id], old[tokenizer.convert_tokens_to_ids("<|object_ref_start|>")])
        assert torch.equal(table[ids.gen_id], old[tokenizer.convert_tokens_to_ids("<|object_ref_end|>")])
    assert model.config.text_config.vocab_size == len(tokenizer)


def test_a_second_call_keeps_trained_rows():
    tokenizer = tiny_tokenizer(TEXTS)
    model = tiny_model(tokenizer=tokenizer)
    ids = add_embedding_tokens(model, tokenizer)
    with torch.no_grad():
        weights(model)[0][ids.gen_id] += 1.0
    trained = weights(model)[0].clone()
    size = len(tokenizer)
    assert add_embedding_tokens(model, tokenizer) == ids
    assert len(tokenizer) == size
    assert torch.equal(weights(model)[0], trained)


def test_mean_row_without_source_tokens():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>")), unk_token="<unk>"
    )
    model = tiny_model(vocab_size=64)
    mean = weights(model)[0].mean(dim=0)
    ids = add_embedding_tokens(model, tokenizer)
    assert ids == (3, 4)
    for row in ids:
        torch.testing.assert_close(weights(model)[0][row], mean)


def test_missing_tokens_are_an_error():
    with pytest.raises(ValueError, match="<disc_emb>, <gen_emb>"):
        embedding_token_ids(tiny_tokenizer(TEXTS))
