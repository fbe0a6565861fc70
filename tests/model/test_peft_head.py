"""The scoring head under what peft and a resize put in its place."""

from __future__ import annotations

import pytest
import torch

from rime_fast.data.collate import Collator
from rime_fast.data.records import Side
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.head import ScoringHead
from rime_fast.model.tiny import tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import add_embedding_tokens

SIDES = [Side(text="a red shoe", rewrite="red shoe"), Side(text="blue", rewrite="a blue shoe")]


def made(tied: bool, room: int = 64):
    processor = tiny_processor(tiny_tokenizer(["a red blue shoe"]))
    vocab = len(processor.tokenizer) + room
    model = tiny_model("qwen2_vl", vocab_size=vocab, hidden=32, layers=1, tie_word_embeddings=tied)
    model = DualModeModel.from_model(model)
    tokens = add_embedding_tokens(model, processor.tokenizer)
    batch = Collator(processor, "rewrite", model.config).collate_sides(SIDES)
    return model, tokens, {key: batch[key] for key in ("input_ids", "lengths", "position_ids", "targets")}


def stock_logp(model, batch):
    """The targets' log-probabilities by the stock forward, a sequence at a time."""
    begin, found = 0, []
    for length in batch["lengths"]:
        part = slice(begin, begin + length)
        logits = model(input_ids=batch["input_ids"][None, part]).logits[0]
        targets = batch["targets"][part]
        chosen = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        found.append(torch.where(targets >= 0, chosen, 0.0))
        begin += length
    return torch.cat(found)


def test_an_untied_table_that_grows_keeps_its_scoring_head():
    """V = len(tokenizer): the two tokens need new rows, and a resize makes a new, plain head."""
    model, _, batch = made(tied=False, room=0)
    assert type(model.lm_head) is ScoringHead
    torch.testing.assert_close(model(**batch).logp, stock_logp(model, batch), rtol=1e-4, atol=1e-5)


def test_a_plain_head_put_in_by_hand_scores_too():
    model, _, batch = made(tied=False)
    expected = model(**batch).logp
    plain = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    plain.weight = model.lm_head.weight
    model.lm_head = plain
    assert torch.equal(model(**batch).logp, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_single_trained_rows(tied):
    """peft's trainable_token_indices: the rows train through the input and, on a tied model, through the head."""
    peft = pytest.importorskip("peft")
    model, tokens, batch = made(tied)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=list(tokens))
    model = peft.get_peft_model(model, config)
    start = model(**batch).logp.detach()
    weight = torch.linspace(0.5, 1.5, len(start))
    (model(**batch).logp * weight).sum().backward()
    rows = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    fused, rows.grad = rows.grad, None
    (stock_logp(model, batch) * weight).sum().backward()
    torch.testing.assert_close(fused, rows.grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        rows += 0.5 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    trained = model(**batch).logp.detach()
    assert not torch.allclose(trained, start, rtol=0, atol=1e-5)
    torch.testing.assert_close(trained, stock_logp(model, batch), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logp, start)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logp, trained, rtol=1e-5, atol=1e-6)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
