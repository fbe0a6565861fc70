from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from rime_fast.model.processor import RimeProcessor
from rime_fast.model.tiny import FAMILIES, SPECIAL_TOKENS, tiny_config, tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

TEXTS = ["the quick brown fox", "<rewrite>1 2 3</rewrite>\n", "the dog"]


def test_tokenizer_is_lossless_and_word_level():
    tokenizer = tiny_tokenizer(TEXTS)
    text = "<|im_start|>user\nthe quick  zebra, 12!\t<rewrite>1 2 3</rewrite>\n<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("the quick brown fox", add_special_tokens=False)) == 4
    assert len(tokenizer.encode("<rewrite>", add_special_tokens=False)) == 1
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.decode(tokenizer.encode("the<|im_end|>"), skip_special_tokens=True) == "the"


def test_tokenizer_depends_on_the_texts_alone():
    assert tiny_tokenizer(TEXTS).get_vocab() == tiny_tokenizer(reversed(TEXTS)).get_vocab()


def test_processor_round_trip(tmp_path):
    tokenizer = tiny_tokenizer(TEXTS)
    add_embedding_tokens(tiny_model(tokenizer=tokenizer), tokenizer)
    processor = tiny_processor(tokenizer, patch_size=4)
    processor.save_pretrained(tmp_path)
    again = RimeProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (24, 16), (200, 10, 90))
    one, two = (p.image_processor(images=[image], return_tensors="pt") for p in (processor, again))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert one["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert again.tokenizer.encode("the<gen_emb>") == tokenizer.encode("the<gen_emb>")
    smaller = RimeProcessor.from_pretrained(tmp_path, max_pixels=64)
    assert smaller.image_processor(images=[image], return_tensors="pt")["image_grid_thw"].prod() == 4
    with pytest.raises(ValueError, match="min_pixels is 4096"):
        RimeProcessor.from_pretrained(tmp_path, min_pixels=4096, max_pixels=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_runs_and_round_trips(family, tmp_path):
    state = torch.random.get_rng_state()
    model = tiny_model(family, vocab_size=128, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    tokens = [10, 5, *[7] * 6, 6, 11, 12]
    inputs = {
        "input_ids": torch.tensor([tokens]),
        "mm_token_type_ids": torch.tensor([[int(t == 7) for t in tokens]]),
        "pixel_values": torch.randn(24, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    logits = model(**inputs).logits
    assert logits.shape == (1, len(tokens), 128)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(again(**inputs).logits, logits)
    same = tiny_model(family, vocab_size=128, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="family is 'llama'"):
        tiny_config("llama", vocab_size=64)
    with pytest.raises(ValueError, match="hidden is 65"):
        tiny_config("qwen2_vl", vocab_size=64, hidden=65)
