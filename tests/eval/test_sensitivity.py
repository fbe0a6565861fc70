"""Rewrites given instead of decoded, and what swapping them costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rime_fast.data.collate import Collator
from rime_fast.data.retrieval import RetrievalSet
from rime_fast.data.templates import get_template
from rime_fast.eval.embedder import Encoded, RimeEmbedder, as_side
from rime_fast.eval.sensitivity import rewrite_sensitivity, swap_partners
from tests.eval.test_embedder import ITEMS, TEXTS, parts


@pytest.mark.parametrize("template", ["rewrite", "cot"])
def test_a_given_rewrite_is_read_as_in_training(template):
    """Each item alone through the stock class: its prompt, the rewrite, the state at <gen_emb>."""
    stock, processor = parts()
    rewrites = ["a shoe", "", "blue <gen_emb> it", "a <rewrite> b", "seven\nboats", "one"]
    escaped = ["a shoe", "", "blue < gen_emb> it", "a < rewrite> b", "seven\nboats", "one"]
    if template == "cot":
        escaped[3] = rewrites[3]
    expected = []
    for item, rewrite in zip(ITEMS, escaped, strict=True):
        given = get_template(template, filler=rewrite)
        batch = Collator(processor, given, stock.config).collate_sides([as_side(item)])
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        with torch.no_grad():
            hidden = stock.model(
                input_ids=batch["input_ids"][None],
                attention_mask=torch.ones_like(batch["input_ids"])[None],
                mm_token_type_ids=batch["mm_token_type_ids"][None],
                **{name: batch[name] for name in names if name in batch},
            ).last_hidden_state[0]
        expected.append(torch.nn.functional.normalize(hidden[batch["gen_index"][0]], dim=0))
    embedder = RimeEmbedder(stock, processor, template, token_budget=200)
    found = embedder.encode_rewritten(ITEMS, rewrites)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="rewrites has 1 entries for 6 items"):
        embedder.encode_rewritten(ITEMS, ["a"])


def test_partners_have_another_rewrite_and_another_answer():
    rewrites = ["a", "a", "b", "c", "c", "d"]
    correct = [[0], [1], [2], [0], [3], [4]]
    partners = swap_partners(rewrites, correct)
    for i, j in enumerate(partners):
        assert rewrites[i] != rewrites[j]
        assert set(correct[i]).isdisjoint(correct[j])
    assert swap_partners(rewrites, correct) == partners
    assert swap_partners(["a", "b"], [[0], [0]]) == [1, 0]  # no other answer: another rewrite will do
    assert swap_partners(["a", "a"], [[0], [1]]) == [0, 1]


class Reader:
    """Embeds the numbers that a rewrite names; deaf: takes them from the query instead."""

    def __init__(self, deaf: bool = False) -> None:
        self.deaf = deaf

    def encode(self, items):
        return torch.eye(5)[[int(item.text) for item in items]]

    def encode_items(self, items, mode):
        return encoded([f"number {item.text}" for item in items])

    def encode_rewritten(self, items, rewrites):
        given = [item.text if self.deaf else text[7:] or "0" for item, text in zip(items, rewrites, strict=True)]
        return torch.eye(5)[[int(one) for one in given]]


def encoded(rewrites):
    n = len(rewrites)
    return Encoded(torch.zeros(n, 5), rewrites, [3] * n, [True] * n, [True] * n, 1.0)


@pytest.fixture
def numbers() -> RetrievalSet:
    sides = [as_side(str(i)) for i in range(5)]
    return RetrievalSet(sides, sides, [[i] for i in range(5)])


def test_a_model_that_reads_its_rewrites(numbers):
    found = rewrite_sensitivity(Reader(), numbers)
    assert list(found.rewrites) == ["own", "swapped", "empty"]
    assert found.rewrites["own"] == {"score": 1, "cosine": 1, "loss": 0, "error": 0}
    assert found.rewrites["swapped"]["score"] == 0
    assert found.rewrites["empty"]["score"] == pytest.approx(0.2)
    assert found.rewrites["empty"]["loss"] == pytest.approx(0.8)
    assert found.rewrites["empty"]["error"] == pytest.approx(0.2)
    assert found.unrelated == pytest.approx(0)
    assert not found.decoration
    taught = replace(numbers, queries=[replace(side, rewrite=f"number {side.text}") for side in numbers.queries])
    assert rewrite_sensitivity(Reader(), taught).rewrites["teacher"]["score"] == 1
    disc = replace(encoded([""] * 5), rewrites=None)
    with pytest.raises(ValueError, match="no rewrites"):
        rewrite_sensitivity(Reader(), numbers, queries=disc)


def test_a_rewrite_that_nobody_reads_is_decoration(numbers):
    found = rewrite_sensitivity(Reader(deaf=True), numbers)
    assert found.rewrites["swapped"]["loss"] == 0
    assert found.decoration
    assert "decoration" in found.line()


def test_own_rewrites_read_again_are_what_was_decoded():
    """A well-formed generation, read again, is the same sequence."""
    embedder = RimeEmbedder(*parts(), max_new_tokens=8)
    data = RetrievalSet([as_side(i) for i in ITEMS], [as_side(t) for t in TEXTS], [[i % 4] for i in range(6)])
    made = embedder.encode_items(data.queries, "gen")
    again = embedder.encode_rewritten(data.queries, made.rewrites)
    for i, whole in enumerate(made.well_formed):
        if whole:
            torch.testing.assert_close(again[i], made.embeddings[i], rtol=0, atol=1e-5)
    found = rewrite_sensitivity(embedder, data, queries=made, metric="mrr")
    assert found.n_queries == 6
    assert found.rewrites["own"]["cosine"] == pytest.approx(1, abs=1e-5)
