"""Rollouts against transformers' generate, against the re-encoded sequences, and against exact distributions."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rime_fast.engine.sampling as sampling
from rime_fast.engine.decode import DecodeCache
from rime_fast.engine.rollout import generate_rollouts
from rime_fast.engine.sampling import draw_tokens, filter_logits
from rime_fast.engine.triton_nucleus import nucleus_floor
from rime_fast.engine.wrappers import dual_mode_of
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.shared_prefix import shared_prefix_batch
from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.tiny_batch import tiny_batch

VOCAB = 96
PROMPTS = [
    [3, ("image", 4, 6), 9],
    [12],
    [2, ("image", 4, 4), 2, ("image", 8, 4), 14],
    [2, ("video", 2, 4, 4), 16],
]


def dual(family="qwen2_vl", vocab=VOCAB, seed=0):
    return DualModeModel.from_model(tiny_model(family, vocab_size=vocab, seed=seed, init_std=0.15)).eval()


def alone(batch, i):
    """Prompt i as a stock batch of one row, without positions: generate makes its own."""
    start, length = sum(batch["lengths"][:i]), batch["lengths"][i]
    rows = slice(start, start + length)
    one = {"input_ids": batch["input_ids"][None, rows], "attention_mask": torch.ones(1, length, dtype=torch.long)}
    kinds = batch["mm_token_type_ids"]
    if (kinds[rows] > 0).any():
        one["mm_token_type_ids"] = kinds[None, rows]
    for pixels, grids, kind in (("pixel_values", "image_grid_thw", 1), ("pixel_values_videos", "video_grid_thw", 2)):
        before, here = int((kinds[:start] == kind).sum()), int((kinds[rows] == kind).sum())
        if here:
            ends = (batch[grids].prod(-1) // 4).cumsum(0)
            one[grids] = batch[grids][(ends > before) & (ends <= before + here)]
            one[pixels] = batch[pixels][4 * before : 4 * (before + here)]
    return one


def with_responses(batch, rollout, group):
    """The packed batch of every prompt with every response: what a scoring forward reads."""
    ids, positions, kinds, targets, lengths, response_rows = [], [], [], [], [], []
    pixels, grids = [], []
    start = 0
    for b, n in enumerate(batch["lengths"]):
        rows = slice(start, start + n)
        one = alone(batch, b)
        for g in range(group):
            r = int(rollout.lengths[b * group + g])
            tokens = rollout.tokens[b * group + g, :r]
            ids.append(torch.cat([batch["input_ids"][rows], tokens]))
            last = batch["position_ids"][:, start + n - 1]
            positions += [batch["position_ids"][:, rows], last[:, None] + torch.arange(1, r + 1)]
            kinds += [batch["mm_token_type_ids"][rows], torch.zeros(r, dtype=torch.long)]
            target = torch.full((n + r,), -100)
            target[n - 1 : n + r - 1] = tokens
            targets.append(target)
            response_rows.append(torch.arange(n - 1, n + r - 1) + sum(lengths))
            lengths.append(n + r)
            for kind in ("image", "video"):
                if f"{kind}_grid_thw" in one:
                    grids.append((kind, one[f"{kind}_grid_thw"]))
                    pixels.append((kind, one["pixel_values" if kind == "image" else "pixel_values_videos"]))
        start += n
    full = {
        "input_ids": torch.cat(ids),
        "position_ids": torch.cat(positions, dim=1),
        "mm_token_type_ids": torch.cat(kinds),
        "targets": torch.cat(targets),
        "lengths": lengths,
        "gen_index": torch.tensor(lengths).cumsum(0) - 1,
    }
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if any(k == kind for k, _ in pixels):
            full[name] = torch.cat([x for k, x in pixels if k == kind])
            full[f"{kind}_grid_thw"] = torch.cat([x for k, x in grids if k == kind])
    return full, response_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family):
    model = dual(family)
    batch = tiny_batch(model.config, PROMPTS, seed=1)
    cap = 24
    free = generate_rollouts(model, batch, gen_id=VOCAB, max_new_tokens=cap, temperature=0.0, stop_ids=[])
    # A token that the greedy responses do contain serves as <gen_emb>: rows then end at different steps.
    gen_id = int(free.tokens[0, cap // 2])
    stop = int(free.tokens[1, cap // 3])
    for group in (1, 3):
        out = generate_rollouts(
            model, batch, gen_id=gen_id, max_new_tokens=cap, group_size=group, temperature=0.0, stop_ids=[stop]
        )
        for i in range(len(PROMPTS)):
            one = alone(batch, i)
            full = model.generate(
                **one, max_new_tokens=cap, do_sample=False, eos_token_id=[gen_id, stop], pad_token_id=0
            )
            expected = full[0, one["input_ids"].shape[1] :]
            for row in range(i * group, (i + 1) * group):
                assert int(out.lengths[row]) == len(expected)
                assert torch.equal(out.tokens[row, : len(expected)], expected)
                assert (out.tokens[row, len(expected) :] == 0).all()
                assert (out.logp[row, len(expected) :] == 0).all()
                assert bool(out.finished[row]) == (int(expected[-1]) == gen_id)
    assert len(set(out.lengths.tolist())) > 1
    assert out.finished.any()
    assert not out.finished.all()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_scores_equal_the_reencoded_ones(family):
    model = dual(family)
    batch = tiny_batch(model.config, PROMPTS, seed=2)
    group = 4
    out = generate_rollouts(
        model,
        batch,
        gen_id=20,
        max_new_tokens=70,  # past the first capacity of the cache
        group_size=group,
        stop_ids=[21],
        generator=torch.Generator().manual_seed(3),
    )
    assert out.tokens.shape[1] > 64
    assert 0 < int(out.finished.sum()) < len(out.finished)
    full, response_rows = with_responses(batch, out, group)
    with torch.no_grad():
        again = model(**full, normalize=False)
    states = again.embeddings["gen"]
    assert float((out.gen_states - states).norm() / states.norm()) < 1e-5
    for row, rows in enumerate(response_rows):
        torch.testing.assert_close(out.logp[row, : len(rows)], again.logp[rows], rtol=0, atol=1e-4)
    ends = out.tokens.gather(1, out.lengths[:, None] - 1)[:, 0]
    assert torch.equal(out.finished, ends == 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_updates_forward_gives_the_scores_of_decoding(family):
    """Prompts of different lengths with images, G rollouts each: the shared-prefix forward recomputes logp and g."""
    model = dual(family)
    batch = {k: v for k, v in tiny_batch(model.config, PROMPTS, seed=6).items() if k not in ("targets", "gen_index")}
    group = 5
    out = generate_rollouts(
        model,
        batch,
        gen_id=20,
        max_new_tokens=30,
        group_size=group,
        stop_ids=[21, 22, 23],
        generator=torch.Generator().manual_seed(1),
    )
    lengths = out.lengths.tolist()
    assert len(set(lengths)) > 3
    assert out.finished.any()
    responses = [row[:n] for row, n in zip(out.tokens.tolist(), lengths, strict=True)]
    shared = shared_prefix_batch(batch, responses)
    with torch.no_grad():
        again = model(**shared, normalize=False)
    decoded = torch.cat([row[:n] for row, n in zip(out.logp, lengths, strict=True)])
    torch.testing.assert_close(again.logp[shared["targets"] >= 0], decoded, rtol=0, atol=1e-4)
    states = again.embeddings["gen"]
    assert float((out.gen_states - states).norm() / states.norm()) < 1e-5


def test_a_model_that_never_ends_is_capped_and_counted():
    model = dual()
    batch = tiny_batch(model.config, PROMPTS, seed=3)
    out = generate_rollouts(model, batch, gen_id=VOCAB, max_new_tokens=5, group_size=2, stop_ids=[])
    assert out.tokens.shape == (8, 5)
    assert out.lengths.tolist() == [5] * 8
    assert not out.finished.any()
    full, _ = with_responses(batch, out, 2)
    with torch.no_grad():
        states = model(**full, normalize=False).embeddings["gen"]
    assert float((out.gen_states - states).norm() / states.norm()) < 1e-5


def test_disc_states_come_with_the_prefill():
    model = dual()
    batch = tiny_batch(model.config, PROMPTS, seed=3)
    out = generate_rollouts(model, batch, gen_id=VOCAB, max_new_tokens=2, group_size=2, stop_ids=[])
    with torch.no_grad():
        expected = model(**{**batch, "targets": None}, normalize=False).embeddings["disc"]
    torch.testing.assert_close(out.disc_states, expected)
    plain = {k: v for k, v in batch.items() if k != "disc_index"}
    assert generate_rollouts(model, plain, gen_id=VOCAB, max_new_tokens=2, stop_ids=[]).disc_states is None


def test_default_stops_are_the_generation_configs():
    model = dual()
    batch = tiny_batch(model.config, PROMPTS, seed=3)
    free = generate_rollouts(model, batch, gen_id=VOCAB, max_new_tokens=12, temperature=0.0, stop_ids=[])
    model.generation_config.eos_token_id = [int(free.tokens[0, 4])]
    out = generate_rollouts(model, batch, gen_id=VOCAB, max_new_tokens=12, temperature=0.0)
    assert int(out.lengths[0]) <= 5
    assert not out.finished.any()


def test_suppressed_tokens_are_never_drawn():
    model = dual()
    batch = tiny_batch(model.config, PROMPTS, seed=3)
    options = {"gen_id": VOCAB, "max_new_tokens": 6, "temperature": 0.0, "stop_ids": []}
    free = generate_rollouts(model, batch, **options)
    banned = sorted(set(free.tokens[:, 0].tolist()))
    out = generate_rollouts(model, batch, suppress_ids=banned, **options)
    assert not set(banned) & set(out.tokens.flatten().tolist())
    full, _ = with_responses(batch, out, 1)
    with torch.no_grad():
        logp = model(**full).logp
    assert torch.allclose(logp[full["targets"] >= 0], out.logp.flatten(), atol=1e-4)


def test_a_generator_makes_it_reproducible():
    model = dual()
    batch = tiny_batch(model.config, PROMPTS, seed=4)

    def run(seed):
        draw = torch.Generator().manual_seed(seed)
        return generate_rollouts(model, batch, gen_id=9, max_new_tokens=20, group_size=3, generator=draw)

    one, two, other = run(0), run(0), run(1)
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.logp, two.logp)
    assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)
    groups = [{tuple(row) for row in one.tokens[3 * b : 3 * b + 3].tolist()} for b in range(len(PROMPTS))]
    assert all(len(g) == 3 for g in groups)


def chi_square(counts, probs, n):
    """Pearson's statistic, in standard deviations above its mean; cells under 5 expected are taken as one."""
    expected = probs * n
    big = expected >= 5
    cells = [(counts[big], expected[big])]
    rest = expected[~big].sum()
    if rest >= 5:
        cells.append((counts[~big].sum()[None], rest[None]))
    value = sum(float(((c - e) ** 2 / e).sum()) for c, e in cells)
    freedom = sum(len(c) for c, _ in cells) - 1
    return (value - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("way", ["sum", "race"])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.3, 0.8, 0), (1.0, 0.9, 5)]
)
def test_draws_follow_the_distribution(temperature, top_p, top_k, way, monkeypatch):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 24, generator=torch.Generator().manual_seed(5)) * 1.5
    exact = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1.0 else logits
    if top_k:
        exact = TopKLogitsWarper(top_k)(None, exact)
    if top_p < 1:
        exact = TopPLogitsWarper(top_p)(None, exact)
    assert torch.equal(filter_logits(logits / temperature, top_p, top_k).isinf(), exact.isinf())
    if way == "race":  # what a GPU does
        monkeypatch.setattr(sampling, "_draw_by_sum", sampling._draw_by_race)
    n = 40_000
    draw = torch.Generator().manual_seed(6)
    drawn = draw_tokens(logits.expand(n, -1), temperature, top_p, top_k, draw)
    counts = torch.bincount(drawn, minlength=24).double()
    probs = exact.softmax(-1)[0].double()
    assert counts[probs == 0].sum() == 0
    assert chi_square(counts, probs, n) < 4
    wrong = (exact / 1.15).softmax(-1)[0].double()
    assert chi_square(counts, wrong, n) > 8


@pytest.mark.parametrize("shape", [(3, 24), (2, 5000), (4, 1)])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.95, 0.9999])
def test_a_nucleus_without_a_sort(shape, top_p):
    """What runs on a GPU, in Triton's interpreter, against fp64: where sums of fp32 may differ from it, either set."""
    logits = 3 * torch.randn(shape)
    logits[0, : shape[1] // 3] = float("-inf")  # as top-k leaves them
    logits[-1] = logits[-1].round()  # ties stay in together
    lowest = nucleus_floor(logits, top_p)
    probs = logits.double().softmax(-1)
    for row, p, x in zip(lowest, probs, logits, strict=True):
        assert (x == row).any()
        assert p[x > row].sum() < top_p + 1e-6
        assert p[x >= row].sum() >= top_p - 1e-6
    if shape[1] < 100:  # where no token's share is as small as rounding
        assert torch.equal(sampling._floor_by_sort(logits, top_p), lowest)


def test_what_has_no_probability_is_never_drawn():
    """At the edges of the cumulative sum: the first and the last tokens have none, and the number is 0 or nearly 1."""
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(3, -1)
    for number, expected in ((0.0, 1), (0.2999, 1), (0.31, 3), (1 - 2**-53, 3), (1.0, 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda shape, number=number, **_: torch.full(shape, number).double())
            assert sampling._draw_by_sum(probs, None).tolist() == [expected] * 3


def test_rollouts_follow_the_models_distribution():
    model = dual(vocab=14, seed=2)
    batch = tiny_batch(model.config, [[("image", 4, 4), 6]], seed=5)
    group = 6000
    out = generate_rollouts(
        model,
        batch,
        gen_id=13,
        max_new_tokens=2,
        group_size=group,
        stop_ids=[],
        generator=torch.Generator().manual_seed(8),
    )
    one = alone(batch, 0)
    n = one["input_ids"].shape[1]
    with torch.no_grad():
        position = batch["position_ids"][:, None]
        first = model(**one, position_ids=position).logits[0, -1].softmax(-1)
        joint = torch.zeros(14, 14)
        for token in range(14):
            ids = torch.cat([one["input_ids"], torch.tensor([[token]])], dim=1)
            where = torch.cat([position, position[:, :, -1:] + 1], dim=2)
            hidden = model.encode_hidden(
                ids[0],
                [n + 1],
                where[:, 0],
                mm_token_type_ids=torch.cat([batch["mm_token_type_ids"], torch.zeros(1, dtype=torch.long)]),
                pixel_values=one["pixel_values"],
                image_grid_thw=one["image_grid_thw"],
            )
            joint[token] = first[token] * model.lm_head(hidden[-1]).softmax(-1)
    joint[13] = 0
    joint[13, 0] = first[13]  # the stop token, then padding
    counts = torch.bincount(out.tokens[:, 0] * 14 + out.tokens[:, 1], minlength=196).double()
    assert chi_square(counts, joint.flatten().double(), group) < 4
    wrong = (first[:, None] * first[None]).flatten().double()
    assert chi_square(counts, wrong, group) > 8


def test_the_model_is_left_as_it_was():
    peft = pytest.importorskip("peft")
    model = dual().train()
    model.model.visual.eval()
    model.gradient_checkpointing_enable()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    states = [m.training for m in wrapped.modules()]
    attention = model.model.language_model.config._attn_implementation
    batch = tiny_batch(model.config, PROMPTS, seed=4)
    out = generate_rollouts(wrapped, batch, gen_id=9, max_new_tokens=4, temperature=0.0)
    assert [m.training for m in wrapped.modules()] == states
    assert model.model.language_model.config._attn_implementation == attention
    assert not out.logp.requires_grad
    again = generate_rollouts(model.eval(), batch, gen_id=9, max_new_tokens=4, temperature=0.0)
    assert torch.equal(out.tokens, again.tokens)


def test_finished_rows_leave_the_cache(monkeypatch):
    model = dual()
    batch = tiny_batch(model.config, PROMPTS, seed=2)
    sizes = []
    keep = DecodeCache.keep

    def spy(self, done):
        kept = keep(self, done)
        sizes.append(len(self.rows))
        return kept

    monkeypatch.setattr(DecodeCache, "keep", spy)
    options = {"gen_id": 20, "max_new_tokens": 60, "group_size": 4, "temperature": 0.0, "stop_ids": [21, 30, 31, 32]}
    one = generate_rollouts(model, batch, **options)
    assert sizes[-1] < sizes[0] == 16
    rare = generate_rollouts(model, batch, **options, check_every=1000)
    assert torch.equal(one.tokens, rare.tokens)
    torch.testing.assert_close(one.gen_states, rare.gen_states)


def test_bf16_and_autocast():
    model = dual()
    batch = tiny_batch(model.config, PROMPTS, seed=2)
    options = {"gen_id": VOCAB, "max_new_tokens": 6, "temperature": 0.0, "group_size": 2, "stop_ids": []}
    exact = generate_rollouts(model, batch, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = generate_rollouts(model, batch, **options)
    half = generate_rollouts(model.to(torch.bfloat16), batch, **options)
    for out in (mixed, half):
        assert out.gen_states.dtype == out.logp.dtype == torch.float32
        same = (out.tokens == exact.tokens).all(dim=1)
        assert same.any()
        error = (out.gen_states - exact.gen_states)[same].norm() / exact.gen_states[same].norm()
        assert float(error) < 0.1


class Casts(TorchDispatchMode):
    """How often each tensor of ``watched`` (by memory) is converted."""

    def __init__(self, watched):
        super().__init__()
        self.counts = dict.fromkeys((x.data_ptr() for x in watched), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [1, 6])
def test_autocast_converts_frozen_weights_once(steps):
    model = dual().requires_grad_(False)
    model.model.language_model.norm.requires_grad_(True)
    batch = tiny_batch(model.config, PROMPTS, seed=2)
    weights = [p for name, p in model.named_parameters() if name.endswith("_proj.weight") and "language" in name]
    with Casts(weights) as casts, torch.autocast("cpu", torch.bfloat16):
        generate_rollouts(model, batch, gen_id=VOCAB, max_new_tokens=steps, stop_ids=[])
    assert set(casts.counts.values()) == {1}
    assert [p.requires_grad for p in model.model.language_model.norm.parameters()] == [True]
    assert not any(p.requires_grad for p in weights)


def test_bad_input_is_named():
    model = dual()
    batch = tiny_batch(model.config, PROMPTS[:1], seed=2)
    good = {"gen_id": 9, "max_new_tokens": 3}
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"group_size": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            generate_rollouts(model, batch, **{**good, **bad})
    with pytest.raises(ValueError, match="pad_id is 9"):
        generate_rollouts(model, batch, **good, pad_id=9)
    with pytest.raises(TypeError, match="expected a DualModeModel"):
        dual_mode_of(torch.nn.Linear(1, 1))
