"""The packed batch: equal to the stock processor's tokens and pixels, every index where it belongs."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2VLProcessor, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from rime_fast.data.collate import IGNORED, Collator, token_budget_batches
from rime_fast.data.records import Pair, Side
from rime_fast.data.rope import FAMILIES
from rime_fast.data.templates import VIDEO, get_template
from rime_fast.model.tiny import tiny_tokenizer
from tests.data.builders import config, picture, processor, sample_pairs


class ImageOnlyProcessor(Qwen2VLProcessor):
    """transformers' processor where torchvision, and so its video processor, is missing."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def collator(family="qwen2_vl", template="rewrite", **options) -> Collator:
    return Collator(processor(), template, config(family), **options)


def rows(batch, key="input_ids"):
    return batch[key].split(batch["lengths"], dim=-1)


@pytest.mark.parametrize("template", ["rewrite", "cot"])
def test_images_and_tokens_equal_the_stock_processor(template):
    made = get_template(template)
    pairs = sample_pairs()
    sides = [pair.query for pair in pairs] + [pair.target for pair in pairs[:2]]
    batch = collator(template=template).collate_sides(sides)
    stock = ImageOnlyProcessor(image_processor=processor().image_processor, tokenizer=processor().tokenizer)
    expected = stock(
        text=[made.render_prompt(side) + made.render_response(side) for side in sides],
        images=[image for side in sides for image in side.images],
    )
    assert [row.tolist() for row in rows(batch)] == expected["input_ids"]
    assert [row.tolist() for row in rows(batch, "mm_token_type_ids")] == expected["mm_token_type_ids"]
    assert torch.equal(batch["pixel_values"], torch.as_tensor(expected["pixel_values"]))
    assert batch["image_grids"] == batch["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
    assert sum(batch["image_counts"]) == len(batch["image_grids"])
    assert len(batch["image_counts"]) == len(batch["lengths"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["rewrite", "cot"])
def test_pair_batch_in_every_detail(family, template):
    pairs = sample_pairs()
    made = collator(family, template)
    batch = made(pairs)
    tokenizer, n = processor().tokenizer, len(pairs)
    total = sum(batch["lengths"])
    assert batch["input_ids"].shape == batch["targets"].shape == batch["mm_token_type_ids"].shape == (total,)
    assert batch["position_ids"].shape == (3, total)
    assert all(t.dtype == torch.int64 for k, t in batch.items() if torch.is_tensor(t) and "pixel" not in k)
    assert batch["side"].tolist() == [0] * n + [1] * n
    sides = [pair.query for pair in pairs] + [pair.target for pair in pairs]
    start = 0
    for i, side in enumerate(sides):
        stop, first = start + batch["lengths"][i], start + batch["prompt_lengths"][i]
        ids = batch["input_ids"][start:stop].tolist()
        expected = tokenizer(made.template.render_response(side), add_special_tokens=False)["input_ids"]
        assert ids[batch["prompt_lengths"][i] :] == expected
        # Targets: the response, one row early; the last row of a sequence scores nothing.
        assert batch["targets"][first - 1 : stop - 1].tolist() == expected
        assert (batch["targets"][start : first - 1] == IGNORED).all()
        assert batch["targets"][stop - 1] == IGNORED
        # Read-outs: the last occurrence of each token.
        for key, token in (("disc_index", made.disc_id), ("gen_index", made.gen_id)):
            assert batch[key][i] == start + max(j for j, found in enumerate(ids) if found == token)
        start = stop
    grids = (batch.get("image_grid_thw"), batch.get("video_grid_thw"))
    seconds = [2 / 1.5]
    expected = made.rope.stock(batch["mm_token_type_ids"], batch["lengths"], *grids, seconds)
    assert torch.equal(batch["position_ids"], expected)
    assert batch["video_grids"] == [[2, 2, 4]]


def test_video_tokens_of_qwen3_equal_the_stock_processor():
    side = sample_pairs()[2].target
    made = collator("qwen3_vl")
    batch = made.collate_sides([side])
    stock = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=lambda *a: Qwen3VLProcessor._calculate_timestamps(None, *a),
    )
    inputs = {
        "video_grid_thw": batch["video_grid_thw"],
        "video_metadata": [VideoMetadata(total_num_frames=3, fps=side.fps, frames_indices=[0, 1, 2])],
    }
    expanded = Qwen3VLProcessor.replace_video_token(stock, inputs, 0)
    assert expanded.startswith("<0.3 seconds>")
    text = made.template.render_prompt(side).replace(VIDEO, expanded) + made.template.render_response(side)
    assert batch["input_ids"].tolist() == processor().tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_measure_equals_the_batch(family):
    made = collator(family)
    sides = [side for pair in sample_pairs() for side in (pair.query, pair.target)]
    assert made.measure(sides) == made.collate_sides(sides)["lengths"]
    for mode in ("gen", "disc"):
        assert made.measure(sides, mode) == made.collate_prompts(sides, mode)["lengths"]


def test_prompts_are_the_beginning_of_the_training_sequences():
    made = collator()
    sides = [pair.query for pair in sample_pairs()]
    full, prompt, disc = made.collate_sides(sides), made.collate_prompts(sides), made.collate_prompts(sides, "disc")
    assert full["prompt_lengths"] == prompt["lengths"] == prompt["prompt_lengths"]
    newline = processor().tokenizer("\n", add_special_tokens=False)["input_ids"]
    for i, (whole, part, short) in enumerate(zip(rows(full), rows(prompt), rows(disc), strict=True)):
        assert torch.equal(whole[: len(part)], part)
        assert torch.equal(part[: len(short)], short)
        assert short[-2:].tolist() == [made.disc_id, *newline]
        assert torch.equal(rows(full, "position_ids")[i][:, : len(short)], rows(disc, "position_ids")[i])
    for batch in (prompt, disc):
        assert not {"gen_index", "targets"} & batch.keys()
        assert (batch["input_ids"][batch["disc_index"]] == made.disc_id).all()


def test_text_alone_has_no_visual_keys():
    batch = collator().collate_sides([Side("cat", rewrite="dog")])
    assert not {key for key in batch if "pixel" in key or "grid" in key}
    assert batch["position_ids"].tolist() == [list(range(batch["lengths"][0]))] * 3


def test_given_responses():
    made = collator()
    sides = [pair.query for pair in sample_pairs()[:2]] + [sample_pairs()[2].target]
    word = processor().tokenizer(" red", add_special_tokens=False)["input_ids"]
    responses = [[*word, made.gen_id], word * 3] * 3
    batch = made.collate_responses(sides, responses)
    prompts = made.collate_prompts(sides)
    start = 0
    for i, response in enumerate(responses):
        prompt = rows(prompts)[i // 2].tolist()
        assert rows(batch)[i].tolist() == prompt + response
        stop = start + len(prompt) + len(response)
        # Without <gen_emb> the last row stands in; the rollout's `finished` says so.
        assert batch["gen_index"][i] == stop - 1
        assert batch["targets"][stop - len(response) - 1 : stop - 1].tolist() == response
        start = stop
    apart = made.collate_sides([side for side in sides for _ in range(2)])
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(batch[key], apart[key])
    assert batch["image_grids"] == apart["image_grids"]


def test_disc_is_read_in_the_prompt_and_gen_in_the_response():
    """A policy may emit <disc_emb>, and the cot prompt itself names <gen_emb>."""
    made = collator(template="cot")
    batch = made.collate_responses([Side("cat")], [[made.disc_id, made.gen_id, made.gen_id]])
    assert batch["disc_index"][0] < batch["prompt_lengths"][0]
    assert batch["gen_index"][0] == batch["lengths"][0] - 1
    assert made.gen_id in batch["input_ids"][: batch["prompt_lengths"][0]].tolist()


def test_hard_negatives_follow_and_are_not_scored():
    pairs = sample_pairs()[:2]
    pairs[1].negatives = [Side("dog", rewrite="dog"), Side("red")]
    batch = collator()(pairs)
    assert batch["side"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch["negative_of"].tolist() == [1, 1]
    assert batch["gen_index"][-2] > 0
    assert batch["gen_index"][-1] == -1
    assert batch["lengths"][-1] == batch["prompt_lengths"][-1]
    assert (batch["targets"][sum(batch["lengths"][:4]) :] == IGNORED).all()
    assert batch["negative_ids"].shape == (2,)


def test_ids_tell_items_apart_and_equal_ones_together():
    same = Side("cat", rewrite="a")
    image_targets = [Side("what", [picture(i)], rewrite="x") for i in (1, 1, 2)]
    pairs = [Pair(Side("one", rewrite="b"), same), Pair(Side("two", rewrite="c"), Side("cat", rewrite="other"))]
    pairs += [Pair(Side("one", rewrite="b"), target) for target in image_targets]
    batch = collator()(pairs)
    assert len(set(batch["query_ids"].tolist())) == 2
    keys = batch["key_ids"].tolist()
    assert keys[0] == keys[1]
    assert keys[2] == keys[3] != keys[4]
    assert all(key >= 0 for key in keys)
    named = [Pair(Side("q", rewrite="r"), Side(text, rewrite="a", id="7")) for text in ("cat", "dog")]
    assert len(set(collator()(named)["key_ids"].tolist())) == 1


def test_too_long_is_an_error_or_drops_the_pair_never_a_cut():
    pairs = sample_pairs()
    longest = max(collator()(pairs)["lengths"])
    assert collator(max_length=longest)(pairs)["lengths"]
    with pytest.raises(ValueError, match=rf"{longest} tokens; max_length is {longest - 1}"):
        collator(max_length=longest - 1)(pairs)
    batch = collator(max_length=longest - 1, on_too_long="drop")(pairs)
    assert len(batch["dropped"]) == 1
    assert batch["side"].shape == (2 * (len(pairs) - 1),)
    with pytest.raises(ValueError, match="no pairs to collate; too long: first"):
        collator(max_length=5, on_too_long="drop")(pairs)


def test_errors_name_the_side():
    made = collator()
    with pytest.raises(ValueError, match=r"side 'a7': rewrite is empty"):
        made([Pair(Side("cat", rewrite="x"), Side("dog", id="a7"))])
    with pytest.raises(ValueError, match=r"side 'a8': missing image: /nowhere.png"):
        made.collate_prompts([Side("cat"), Side("cat", ["/nowhere.png"], id="a8")])
    with pytest.raises(ValueError, match="a multiple of 2 sides"):
        made.collate_responses([Side("a"), Side("b")], [[1]])
    with pytest.raises(ValueError, match=r"responses\[1\] is empty"):
        made.collate_responses([Side("a"), Side("b")], [[1], []])
    with pytest.raises(ValueError, match="mode is 'both'"):
        made.collate_prompts([Side("a")], "both")  # type: ignore[arg-type]
    bare = SimpleNamespace(tokenizer=tiny_tokenizer(), image_processor=processor().image_processor)
    with pytest.raises(ValueError, match=r"lacks <disc_emb>, <gen_emb>"):
        Collator(bare, "rewrite", config())


def test_survives_a_dataloader_worker():
    made = collator()
    pairs = sample_pairs()
    before = made(pairs)
    again = pickle.loads(pickle.dumps(made))(pairs)
    assert before.keys() == again.keys()
    for key, value in before.items():
        assert torch.equal(value, again[key]) if torch.is_tensor(value) else value == again[key]


def test_token_budget_batches():
    lengths = [5, 100, 7, 6, 50, 5, 300]
    batches = token_budget_batches(lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches[0] == [6]  # alone, over the budget
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches)
    assert token_budget_batches([1] * 5, 100, max_items=2) == [[0, 1], [2, 3], [4]]
    assert token_budget_batches([], 10) == []
    with pytest.raises(ValueError, match="budget is 0"):
        token_budget_batches([1], 0)


def test_latent_branches_stand_behind_each_sequence():
    """The prompt and the response as without them; latent tokens and second copy go on where the prompt ends."""
    pairs, words = sample_pairs(), processor.__wrapped__()  # one of its own: it gets tokens
    plain = Collator(words, "rewrite", config("qwen2_vl")).collate_pairs(pairs)
    words.tokenizer.add_tokens(["<latent_0>", "<latent_1>"], special_tokens=True)
    ids = words.tokenizer.convert_tokens_to_ids(["<latent_0>", "<latent_1>"])
    made = Collator(words, "rewrite", config("qwen2_vl"))
    batch = made.collate_pairs(pairs, latents=True)
    n, copies = 2 * len(pairs), batch["condensed"].split(batch["lengths"])
    for i, (prompt, own, k, copy) in enumerate(batch["branches"]):
        front = prompt + own
        for key in ("input_ids", "mm_token_type_ids", "targets"):
            assert torch.equal(rows(batch, key)[i][:front], rows(plain, key)[i]), key
        places = rows(batch, "position_ids")[i]
        assert torch.equal(places[:, :front], rows(plain, "position_ids")[i])
        assert rows(batch)[i][front:].tolist() == [*ids, *rows(plain)[i][prompt : front - 1].tolist()]
        assert (places[:, front:] - places[:, prompt - 1 : prompt] - 1).tolist() == [[*range(k + copy)]] * 3
        assert batch["latent_index"][i].tolist() == [sum(batch["lengths"][:i]) + front + j for j in range(k)]
        scored = rows(batch, "targets")[i][copies[i]].tolist()
        assert scored == (rows(plain)[i][prompt:].tolist() if i < n else [IGNORED] * len(scored))
        assert copies[i].sum() == own
    assert made.measure([pairs[0].query], "latent") == [made.measure([pairs[0].query], "gen")[0] + 2]
    with pytest.raises(ValueError, match=r"text holds '<latent_1>'"):
        made.collate_sides([Side(text="a <latent_1>", rewrite="b")])
