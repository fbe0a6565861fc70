"""RimeEmbedder against independent computations: the stock states, transformers' generate, items one by one."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image

from rime_fast.data.collate import Collator
from rime_fast.data.records import Side
from rime_fast.data.templates import get_template
from rime_fast.eval.embedder import RimeEmbedder, as_side
from rime_fast.eval.index import EmbeddingIndex
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import FAMILIES, tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tokens import GEN_TOKEN, add_embedding_tokens

TEXTS = ["a red shoe", "which one is blue ?", "seven", "find the picture of a small green boat on the lake"]


class Table(list):
    columns = ("text", "image")


def picture(seed: int, width: int = 16, height: int = 8) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


ITEMS = [
    TEXTS[0],
    picture(0),
    {"text": TEXTS[1], "image": picture(1, 24, 16)},
    Side(text=TEXTS[2], images=[picture(2), picture(3)]),
    {"text": TEXTS[3], "video": [picture(i) for i in range(4, 8)]},
    TEXTS[1],
]


def parts(family: str = "qwen2_vl", seed: int = 0):
    tokenizer = tiny_tokenizer([get_template("rewrite").render_prompt(Side(text=text)) for text in TEXTS])
    model = tiny_model(family, tokenizer=tokenizer, seed=seed, init_std=0.12)
    add_embedding_tokens(model, tokenizer)
    return model.eval(), tiny_processor(tokenizer)


@pytest.fixture(scope="module")
def embedder() -> RimeEmbedder:
    return RimeEmbedder(*parts(), max_new_tokens=12)


@pytest.mark.parametrize("family", FAMILIES)
def test_disc_is_the_stock_models_state_at_the_token(family):
    """Each item alone through the stock class and its own position ids; the state at the last <disc_emb>."""
    stock, processor = parts(family)
    expected = []
    for item in ITEMS:
        batch = Collator(processor, "rewrite", stock.config).collate_prompts([as_side(item)], "disc")
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        kinds = batch["mm_token_type_ids"]
        with torch.no_grad():
            hidden = stock.model(
                input_ids=batch["input_ids"][None],
                attention_mask=torch.ones(1, len(kinds), dtype=torch.long),
                mm_token_type_ids=kinds[None],
                **{name: batch[name] for name in names if name in batch},
            ).last_hidden_state[0]
        expected.append(torch.nn.functional.normalize(hidden[batch["disc_index"][0]], dim=0))
    found = RimeEmbedder(stock, processor).encode(ITEMS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("template", ["rewrite", "cot"])
def test_gen_is_generates_text_and_the_state_at_its_end(template):
    """Greedy decoding by transformers' generate, then the stock state at the response's last token."""
    stock, processor = parts()
    tokenizer = processor.tokenizer
    gen_id = tokenizer.convert_tokens_to_ids(GEN_TOKEN)
    texts = list(TEXTS)
    expected, answers = [], []
    for text in texts:
        batch = Collator(processor, template, stock.config).collate_prompts([Side(text=text)])
        prompt = batch["input_ids"][None]
        with torch.no_grad():
            out = stock.generate(
                prompt,
                max_new_tokens=10,
                do_sample=False,
                eos_token_id=[gen_id, tokenizer.eos_token_id],
                pad_token_id=tokenizer.pad_token_id,
            )
            hidden = stock.model(input_ids=out).last_hidden_state[0, -1]
        expected.append(torch.nn.functional.normalize(hidden, dim=0))
        answers.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=False))
    embedder = RimeEmbedder(stock, processor, template, max_new_tokens=10)
    found, rewrites = embedder.encode(texts, mode="gen", return_rewrites=True)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=5e-5)
    assert rewrites == [embedder.collator.template.parse_response(answer).rewrite for answer in answers]


@pytest.mark.parametrize("mode", ["disc", "gen"])
def test_order_and_batching_do_not_matter(embedder, mode):
    whole = embedder.encode(ITEMS, mode)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = embedder.encode([ITEMS[i] for i in order], mode)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=2e-5)
    small = RimeEmbedder(embedder.model, embedder.processor, token_budget=1, max_new_tokens=12)
    torch.testing.assert_close(small.encode(ITEMS, mode), whole, rtol=0, atol=2e-5)
    assert torch.allclose(whole.norm(dim=1), torch.ones(len(ITEMS)), atol=1e-5)
    assert len({tuple(row) for row in whole.round(decimals=4).tolist()}) == len(ITEMS)


def test_encode_both_equals_the_two_modes(embedder):
    disc, gen, rewrites = embedder.encode_both(ITEMS)
    torch.testing.assert_close(disc, embedder.encode(ITEMS), rtol=0, atol=2e-5)
    again, same = embedder.encode(ITEMS, "gen", return_rewrites=True)
    torch.testing.assert_close(gen, again, rtol=0, atol=2e-5)
    assert rewrites == same


class Obedient(torch.nn.Module):
    """Stands in for the head: emits a fixed response whatever the state, the item's row offset counted by calls."""

    def __init__(self, head: torch.nn.Module, script: list[int], vocab: int) -> None:
        super().__init__()
        self.head, self.script, self.vocab, self.step = head, script, vocab, 0

    def forward(self, hidden, **kwargs):
        if kwargs:
            return self.head(hidden, **kwargs)
        logits = torch.full((hidden.shape[0], self.vocab), -10.0)
        logits[:, self.script[min(self.step, len(self.script) - 1)]] = 10.0
        self.step += 1
        return logits


@pytest.mark.parametrize(
    ("response", "reached", "formed", "rewrite"),
    [
        ("<rewrite>red shoe</rewrite>\n<gen_emb>", True, True, "red shoe"),
        ("red<gen_emb>", True, False, "red"),
        ("<rewrite>red</rewrite>", False, False, "red"),
    ],
)
def test_every_kind_of_response_is_parsed_and_counted(monkeypatch, response, reached, formed, rewrite):
    model, processor = parts()
    embedder = RimeEmbedder(model, processor, max_new_tokens=60)
    script = embedder.collator.encoder([response])[0]
    stop = [] if reached else [processor.tokenizer.eos_token_id]
    head = Obedient(model.lm_head, [*script, *stop], model.config.text_config.vocab_size)
    monkeypatch.setitem(model._modules, "lm_head", head)
    encoded = embedder.encode_items(["x", "y"], "gen")
    assert encoded.rewrites == [rewrite] * 2
    assert encoded.tokens == [len(script) + len(stop)] * 2
    assert encoded.reached == [reached] * 2
    assert encoded.well_formed == [formed] * 2
    assert embedder.stats.missing_gen == (0 if reached else 2)
    assert embedder.stats.format_errors == (0 if formed else 2)
    assert embedder.stats.decoded_tokens == sum(encoded.tokens)
    assert embedder.stats.items == {"disc": 0, "gen": 2, "latent": 0}


def test_missing_gen_is_warned_of(monkeypatch, caplog):
    model, processor = parts()
    embedder = RimeEmbedder(model, processor, max_new_tokens=3)
    word = embedder.collator.encoder([" a"])[0]
    monkeypatch.setitem(model._modules, "lm_head", Obedient(model.lm_head, word, model.config.text_config.vocab_size))
    with caplog.at_level("WARNING"):
        embedder.encode(["x", "y", "z"], "gen")
    assert embedder.stats.missing_gen == 3
    assert "3 of 3 generations never reached <gen_emb> within 3 tokens" in caplog.text


def test_training_mode_and_gradients_are_left_alone(embedder):
    embedder.model.train()
    rows = embedder.encode(["x"])
    assert embedder.model.training
    assert not rows.requires_grad
    assert torch.is_grad_enabled()
    embedder.model.eval()


def test_progress_counts_items(embedder):
    seen: list[tuple[int, int]] = []
    small = RimeEmbedder(embedder.model, embedder.processor, token_budget=1)
    small.encode(["a", "b", "c"], progress=lambda *event: seen.append(event))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_saved_directory_loads_and_agrees(tmp_path, embedder):
    embedder.model.save_pretrained(tmp_path)
    embedder.processor.save_pretrained(tmp_path)
    loaded = RimeEmbedder.from_pretrained(tmp_path, max_new_tokens=12)
    assert isinstance(loaded.model, DualModeModel)
    assert loaded.max_new_tokens == 12
    for mode in ("disc", "gen"):
        torch.testing.assert_close(loaded.encode(ITEMS, mode), embedder.encode(ITEMS, mode), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "items is empty"),
        ((["x"], "fast"), ValueError, "mode is 'fast'; expected one of 'disc', 'gen', 'latent'"),
        (([3],), TypeError, r"items\[0\] is int; expected str, PIL image"),
        ((["a", {"txt": "b"}],), ValueError, r"items\[1\].txt unknown key"),
        (([{"image": "/gone.png"}],), ValueError, "/gone.png"),
    ],
)
def test_errors_name_the_item(embedder, arguments, error, message):
    with pytest.raises(error, match=message):
        embedder.encode(*arguments)


def test_rewrites_need_gen(embedder):
    with pytest.raises(ValueError, match="return_rewrites needs mode 'gen'"):
        embedder.encode(["x"], return_rewrites=True)
    with pytest.raises(ValueError, match="token_budget is 0"):
        RimeEmbedder(embedder.model, embedder.processor, token_budget=0)
    with pytest.raises(ValueError, match="max_image_pixels is 0"):
        RimeEmbedder(embedder.model, embedder.processor, max_image_pixels=0)


def test_the_limit_of_pixels_is_the_embedders(embedder):
    image = Image.new("RGB", (16, 12))
    small = RimeEmbedder(embedder.model, embedder.processor, max_image_pixels=191)
    for item in ({"image": image}, {"video": [image, image]}):
        with pytest.raises(ValueError, match="16 x 12 pixels; at most 191 are decoded"):
            small.encode([item])
        RimeEmbedder(embedder.model, embedder.processor, max_image_pixels=192).encode([item])


def test_both_modes_from_one_prefill(embedder, monkeypatch):
    """As many prefills as mode gen has; the embeddings are those of the modes alone."""
    prefills = 0
    original = embedder.model.encode_hidden

    def counted(*args, **kwargs):
        nonlocal prefills
        prefills += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(embedder.model, "encode_hidden", counted)
    both = embedder.encode_items(ITEMS, "both")
    made = prefills
    gen = embedder.encode_items(ITEMS, "gen")
    assert prefills - made == made == 1
    assert torch.equal(both.embeddings, gen.embeddings)
    assert gen.disc is None
    disc = both.without_decoding()
    torch.testing.assert_close(disc.embeddings, embedder.encode(ITEMS), rtol=0, atol=2e-5)
    assert 0 < disc.seconds < both.seconds
    assert (disc.tokens, disc.rewrites, disc.missing_gen) == ([0] * len(ITEMS), None, 0)
    with pytest.raises(ValueError, match="encode in mode 'both'"):
        gen.without_decoding()


@pytest.mark.parametrize(
    "item", ["ab", picture(1), np.asarray(picture(2)), {"text": "ab", "image": picture(3)}, Side("a")]
)
def test_one_item_is_one_row(embedder, item):
    rows = embedder.encode(item)
    assert rows.shape == (1, embedder.model.config.get_text_config().hidden_size)
    torch.testing.assert_close(rows, embedder.encode([item]))
    assert embedder.encode(iter([item, item])).shape[0] == 2


@pytest.mark.parametrize(
    "items",
    [
        3,
        None,
        b"ab",
        {"a", "b"},
        np.zeros((2, 8, 8, 3), dtype=np.uint8),
        MappingProxyType({"text": "a"}),
        Table(),
        [["a"]],
    ],
)
def test_what_is_no_item_is_a_type_error(embedder, items):
    with pytest.raises(TypeError, match="items"):
        embedder.encode(items)


def test_auto_sends_to_gen_what_the_index_is_unsure_about(embedder):
    index = EmbeddingIndex(embedder.encode(["a red shoe", "blue", "seven ?"]), facts={"mode": "disc"})
    disc, gen = embedder.encode(ITEMS), embedder.encode(ITEMS, "gen")
    margins = index.margins(disc).sort().values
    limit = float(margins[2:4].mean())
    unsure = index.margins(disc) < limit
    seen = []
    rows, rewrites = embedder.encode(
        ITEMS, "auto", index=index, threshold=limit, return_rewrites=True, progress=lambda *now: seen.append(now)
    )
    assert int(unsure.sum()) == 3
    torch.testing.assert_close(rows, torch.where(unsure[:, None], gen, disc), rtol=0, atol=2e-5)
    assert [rewrite == "" for rewrite in rewrites] == (~unsure).tolist()
    assert seen[-1] == (9, 9)
    made = embedder.encode_items(ITEMS, "auto", index=index, threshold=limit)
    assert [count > 0 for count in made.tokens] == unsure.tolist()
    torch.testing.assert_close(embedder.encode(ITEMS, "auto", index=index, threshold=0), disc, rtol=0, atol=2e-5)
    narrow = EmbeddingIndex(index.rows[:, :16])  # a Matryoshka prefix does too
    assert embedder.encode("it", "auto", index=narrow, threshold=2).shape == disc[:1].shape


def test_auto_without_a_usable_index_is_refused(embedder):
    rows = embedder.encode(TEXTS)
    good = EmbeddingIndex(rows)
    with pytest.raises(ValueError, match="mode 'auto' needs margins: give index="):
        embedder.encode("it", "auto")
    with pytest.raises(TypeError, match="index is Tensor; expected an EmbeddingIndex"):
        embedder.encode("it", "auto", index=rows)
    with pytest.raises(ValueError, match="index holds gen rows"):
        embedder.encode("it", "auto", index=EmbeddingIndex(rows, facts={"mode": "gen"}))
    with pytest.raises(ValueError, match="dimensions; expected at most the model's"):
        embedder.encode("it", "auto", index=EmbeddingIndex(torch.eye(embedder.width + 1)))
    for limit, error in ((-0.1, ValueError), (float("nan"), ValueError), (2.5, ValueError), ("0.1", TypeError)):
        with pytest.raises(error, match="threshold is"):
            embedder.encode("it", "auto", index=good, threshold=limit)
    with pytest.raises(ValueError, match="index goes with mode 'auto'"):
        embedder.encode("it", index=good)
