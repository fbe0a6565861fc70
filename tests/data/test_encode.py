"""Part by part is the same as the whole, with a byte-level BPE split as Qwen splits."""

from __future__ import annotations

import pickle
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rime_fast.data.encode import TextEncoder
from rime_fast.data.records import Side
from rime_fast.data.templates import get_template
from rime_fast.model.tiny import SPECIAL_TOKENS
from rime_fast.model.tokens import DISC_TOKEN, GEN_TOKEN

QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(SPECIAL_TOKENS)
    )
    texts = ["What is it?\n\nthe rewrite of the cat\n", "user assistant system?\n", "</rewrite>\n"]
    bpe.train_from_iterator(texts * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe)
    made.add_tokens([DISC_TOKEN], special_tokens=True)
    made.add_tokens([GEN_TOKEN])  # UME-R1 adds its tokens as plain ones
    return made


FIXED = ["What is it?", "the cat", " \n", "?\n", "e\u0301", *SPECIAL_TOKENS, "<gen_emb>"]
PIECE = st.one_of(st.text(max_size=12), st.sampled_from(FIXED))


@given(st.lists(st.lists(PIECE, max_size=8).map("".join), max_size=4))
def test_parts_are_the_whole(texts):
    encoder = TextEncoder(tokenizer())
    expected = [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encoder(texts) == expected
    assert encoder(texts) == expected  # from memory


def test_a_newline_joins_the_sign_before_it():
    """Why parts are cut at control tokens only: "?" and the newline after it are one token."""
    side = Side("What is it?", rewrite="the cat?")
    template = get_template()
    text = template.render_prompt(side)
    (ids,) = TextEncoder(tokenizer())([text])
    assert "?\n" in [tokenizer().decode([i]) for i in ids]
    assert ids == tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_missing_token_is_named():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"lacks '<\|im_start\|>'"):
        TextEncoder(bare)(["<|im_start|>"])


def test_memory_is_bounded_and_not_pickled(monkeypatch):
    monkeypatch.setattr("rime_fast.data.encode._MEMORY", 10)
    encoder = TextEncoder(tokenizer())
    for i in range(50):
        encoder([f"word {i}"])
    assert len(encoder._memory) <= 12
    assert len(pickle.loads(pickle.dumps(encoder))._memory) == 1
