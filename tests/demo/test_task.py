"""The demo's tokenizer, templates and model: one token a sign, one visual token a scan, room to decode."""

from __future__ import annotations

import pytest
import torch

from rime_fast.data.collate import Collator
from rime_fast.data.digits import DigitChains, Style
from rime_fast.demo.task import MAX_NEW_TOKENS, STYLES, TERSE_TOKENS, demo_model, demo_template, demo_tokenizer


def test_every_sign_is_one_token_wherever_it_stands() -> None:
    tokenizer = demo_tokenizer()
    assert len(tokenizer("72441", add_special_tokens=False)["input_ids"]) == 5
    assert len(tokenizer("+-×+", add_special_tokens=False)["input_ids"]) == 4
    four = tokenizer("4", add_special_tokens=False)["input_ids"]
    assert tokenizer("72441 and so 41", add_special_tokens=False)["input_ids"][-2:-1] == four


@pytest.mark.parametrize("style", STYLES)
def test_sequences_of_each_style(style: Style) -> None:
    """Five visual tokens a query; no response is longer than the cap, and no token is unknown."""
    model, processor = demo_model(0)
    pairs = list(DigitChains("train", 40, style=style, wordy=0.4, vague=0.3))
    batch = Collator(processor, demo_template(style), model.config).collate_pairs(pairs)
    assert int((batch["mm_token_type_ids"] == 1).sum()) == 5 * len(pairs)
    assert not bool((batch["input_ids"] == processor.tokenizer.unk_token_id).any())
    lengths = torch.tensor(batch["lengths"]) - torch.tensor(batch["prompt_lengths"])
    assert int(lengths.max()) <= MAX_NEW_TOKENS[style]
    if style == "rewrite":
        assert set(lengths[: len(pairs)].tolist()) == {TERSE_TOKENS - 1, TERSE_TOKENS, TERSE_TOKENS + 5}
    if style == "control":  # as long as the longest rewrite
        assert set(lengths[: len(pairs)].tolist()) == {TERSE_TOKENS + 5}


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (demo_model(seed)[0].state_dict() for seed in (1, 1, 2))
    name = "lm_head.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
