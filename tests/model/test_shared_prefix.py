"""A prompt with its rollouts as one row set against G separate sequences: values and every parameter's gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import rime_fast.model.prefix_attention as passes
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.packing import packed_layout
from rime_fast.model.shared_prefix import SharedPrefixLayout, shared_prefix_batch
from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.tiny_batch import tiny_batch

VOCAB = 160
GEN = 40
PROMPTS = [
    [3, ("image", 4, 6), 9],
    [12],
    [2, ("image", 4, 4), 2, ("image", 8, 4), 5],
    [2, ("video", 2, 4, 4), 6],
    [2],
    [12],
]


def dual(family="qwen2_vl", **sizes):
    return DualModeModel.from_model(tiny_model(family, vocab_size=VOCAB, seed=1, init_std=0.12, **sizes))


def make_prompts(config, prompts=PROMPTS):
    batch = tiny_batch(config, prompts, seed=2)
    return {k: v for k, v in batch.items() if k not in ("targets", "gen_index")}


def make_responses(count, seed=3, longest=9):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [[*torch.randint(9, VOCAB, (n - 1,), generator=draw).tolist(), GEN] for n in sizes]


def separate(prompts, responses):
    """Every rollout as a sequence of its own, its prompt and pixels copied: what the plain way feeds."""
    group = len(responses) // len(prompts["lengths"])
    found = {key: [] for key in ("ids", "positions", "kinds", "targets", "disc", "gen", "image", "video", "ig", "vg")}
    lengths, start, seen = [], 0, {1: 0, 2: 0}
    kinds = prompts["mm_token_type_ids"]
    for b, n in enumerate(prompts["lengths"]):
        rows = slice(start, start + n)
        here = {kind: int((kinds[rows] == kind).sum()) for kind in seen}
        last = int(prompts["position_ids"][0, start + n - 1])
        for g in range(group):
            response = torch.tensor(responses[b * group + g])
            r = len(response)
            found["ids"] += [prompts["input_ids"][rows], response]
            found["positions"] += [prompts["position_ids"][:, rows], (last + 1 + torch.arange(r)).expand(3, -1)]
            found["kinds"] += [kinds[rows], torch.zeros(r, dtype=torch.long)]
            found["targets"] += [torch.full((n - 1,), -100), response, torch.tensor([-100])]
            found["disc"].append(int(prompts["disc_index"][b]) - start + sum(lengths))
            lengths.append(n + r)
            found["gen"].append(sum(lengths) - 1)
            for kind, pixels, grids in ((1, "pixel_values", "image"), (2, "pixel_values_videos", "video")):
                if here[kind]:
                    first = 4 * seen[kind]
                    found[grids].append(prompts[pixels][first : first + 4 * here[kind]])
                    ends = (prompts[f"{grids}_grid_thw"].prod(-1)).cumsum(0)
                    mine = (ends > first) & (ends <= first + 4 * here[kind])
                    found[grids[0] + "g"].append(prompts[f"{grids}_grid_thw"][mine])
        start += n
        for kind in seen:
            seen[kind] += here[kind]
    batch = {
        "input_ids": torch.cat(found["ids"]),
        "lengths": lengths,
        "position_ids": torch.cat(found["positions"], dim=1),
        "mm_token_type_ids": torch.cat(found["kinds"]),
        "targets": torch.cat(found["targets"]),
        "disc_index": torch.tensor(found["disc"]),
        "gen_index": torch.tensor(found["gen"]),
    }
    for pixels, grids in (("pixel_values", "image"), ("pixel_values_videos", "video")):
        if found[grids]:
            batch[pixels] = torch.cat(found[grids])
            batch[f"{grids}_grid_thw"] = torch.cat(found[grids[0] + "g"])
    return batch


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def scored(out, batch):
    return out.logp[batch["targets"] >= 0]


def some_loss(logp, gen, disc):
    draw = torch.Generator().manual_seed(7)
    return sum((torch.randn(x.shape, generator=draw) * x).sum() for x in (logp, gen, disc))


def gradients(model, logp, gen, disc):
    model.zero_grad()
    some_loss(logp, gen, disc).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model, group, prompts=PROMPTS, *, longest=9, bound=1e-5):
    asked = make_prompts(model.config, prompts)
    responses = make_responses(group * len(prompts), longest=longest)
    plain = separate(asked, responses)
    out = model(**plain)
    disc = out.embeddings["disc"].view(len(prompts), group, -1)[:, 0]
    expected = (scored(out, plain), out.embeddings["gen"], disc)
    wanted = gradients(model, *expected)

    batch = shared_prefix_batch(asked, responses)
    assert len(batch["input_ids"]) == sum(asked["lengths"]) + sum(map(len, responses)) + (group - 1) * len(prompts)
    out = model(**batch)
    found = (scored(out, batch), out.embeddings["gen"], out.embeddings["disc"])
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < bound
    got = gradients(model, *found)
    assert got.keys() == wanted.keys()
    assert len(wanted) == len(list(model.parameters()))
    for name, g in wanted.items():
        assert relative(got[name], g) < bound, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", [1, 2, 5, 16])
def test_equals_separate_rows(family, group):
    compare(dual(family), group)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_equals_separate_rows_with_gradient_checkpointing(family, reentrant):
    model = dual(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    compare(model, 4)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["no sharing", "one key head"])
def test_any_sharing_of_key_heads(heads):
    compare(dual(heads=heads[0], kv_heads=heads[1]), 3, PROMPTS[:3])


def test_long_rows_cross_the_kernels_blocks():
    compare(dual(), 3, [[700], [3, ("image", 8, 8), 600]], longest=80)


def test_a_rollout_does_not_see_the_others():
    """One rollout's tokens change: nothing else may change, bit for bit where shapes stay the same."""
    model = dual().eval()
    asked = make_prompts(model.config)
    responses = make_responses(3 * len(PROMPTS), longest=6)
    batch = shared_prefix_batch(asked, responses)
    with torch.no_grad():
        first = model(**batch)
        responses[4] = [17] * (len(responses[4]) - 1) + [GEN + 1]
        second = model(**shared_prefix_batch(asked, responses))
    moved = (first.embeddings["gen"] - second.embeddings["gen"]).abs().amax(1)
    assert moved[4] > 1e-3
    moved[4] = 0
    assert moved.max() == 0
    assert torch.equal(first.embeddings["disc"], second.embeddings["disc"])


def attention_case(dtype=torch.float64, heads=4, kv=2, width=8):
    torch.manual_seed(0)
    layout = SharedPrefixLayout([5, 9, 1], [3, 1, 4, 4, 2, 6], torch.device("cpu"))
    rows = sum(layout.lengths)
    shapes = [(1, heads, rows, width), (1, kv, rows, width), (1, kv, rows, width)]
    return layout, [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def dense(layout, query, key, value, scale):
    """The truth by one mask over all rows."""
    n = len(layout.prefixes.lengths)
    part = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths))
    prompt = torch.where(part < n, part, (part - n).div(layout.group_size, rounding_mode="floor"))
    is_prompt = part < n
    same = part[:, None] == part[None]
    above = is_prompt[None] & ~is_prompt[:, None] & (prompt[:, None] == prompt[None])
    mask = (same & torch.ones_like(same).tril()) | above
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True).transpose(1, 2)


def outcome(function, inputs):
    out = function()
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), inputs)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_alone_against_one_dense_mask(dtype, bound, scale):
    layout, inputs = attention_case(dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = outcome(lambda: dense(layout, *wide, scale), wide)
    found = outcome(lambda: layout.attention(None, *inputs, scale=scale, dropout=0.0), inputs)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < bound


def test_masked_form_where_no_flash_kernel_serves(monkeypatch):
    layout, inputs = attention_case()
    expected = outcome(lambda: dense(layout, *inputs, 0.3), inputs)
    monkeypatch.setattr("rime_fast.model.shared_prefix.flash_serves", lambda x: False)
    found = outcome(lambda: layout.attention(None, *inputs, scale=0.3, dropout=0.0), inputs)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-12


def varlen_stand_in(query, key, value, cuts, causal, scale, grad=None, out=None, lse=None):
    """Flash-attention's varlen interface in plain arithmetic: forward, or the backward with a given lse and out."""
    bounds, longest = [cut.tolist() for cut in cuts[:2]], list(cuts[2:])
    assert [max(b - a for a, b in pairwise(c)) for c in bounds] == longest
    shared = query.shape[1] // key.shape[1]
    results = [torch.zeros_like(query), query.new_zeros(query.shape[:2])]
    if grad is not None:
        results = [torch.zeros_like(x) for x in (query, key, value)]
    for (a, b), (s, e) in zip(*(pairwise(c) for c in bounds), strict=True):
        q = query[a:b].transpose(0, 1)
        k, v = (x[s:e].repeat_interleave(shared, 1).transpose(0, 1) for x in (key, value))
        scores = q @ k.mT * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, float("-inf"))
        if grad is None:
            results[0][a:b] = (scores.softmax(-1) @ v).transpose(0, 1)
            results[1][a:b] = scores.logsumexp(-1).transpose(0, 1)
            continue
        g, o = grad[a:b].transpose(0, 1), out[a:b].transpose(0, 1)
        p = (scores - lse[a:b].transpose(0, 1)[..., None]).exp()
        ds = p * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scale
        results[0][a:b] = (ds @ k).transpose(0, 1)
        for result, part in zip(results[1:], (ds.mT @ q, p.mT @ g), strict=True):
            result[s:e] = part.transpose(0, 1).unflatten(1, (-1, shared)).sum(2)
    return tuple(results)


def test_the_varlen_passes_get_the_right_boundaries(monkeypatch):
    """The CUDA route's bookkeeping, with a stand-in for the kernel."""
    layout, inputs = attention_case()
    expected = outcome(lambda: layout.attention(None, *inputs, scale=0.3, dropout=0.0), inputs)
    bounds = layout.bounds
    cuts = {
        "device_prefix": torch.tensor(bounds.prefix),
        "device_group": torch.tensor(bounds.group),
    }
    for name, cut in cuts.items():
        object.__setattr__(bounds, name, cut)
    monkeypatch.setattr(passes, "_varlen", varlen_stand_in)

    def backward(grad, done, cuts, causal, scale):
        return varlen_stand_in(done.query, done.key, done.value, cuts, causal, scale, grad, done.out, done.lse)

    monkeypatch.setattr(passes, "_varlen_backward", backward)
    for kind in ("prefix", "own"):
        for suffix in ("", "_backward"):
            monkeypatch.setattr(passes, f"_cpu_{kind}{suffix}", getattr(passes, f"_varlen_{kind}{suffix}"))
    found = outcome(lambda: layout.attention(None, *inputs, scale=0.3, dropout=0.0), inputs)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_attention_on_the_gpu(dtype, bound):
    _, inputs = attention_case(width=32)
    layout = SharedPrefixLayout([5, 9, 1], [3, 1, 4, 4, 2, 6], torch.device("cuda"))
    wide = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    expected = outcome(lambda: dense(attention_case()[0], *wide, 0.3), wide)
    moved = [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]
    found = outcome(lambda: layout.attention(None, *moved, scale=0.3, dropout=0.0).cpu(), moved)
    for a, b in zip(found, expected, strict=True):
        assert relative(a.cpu(), b) < bound


def test_bfloat16_autocast():
    model = dual().eval()
    batch = shared_prefix_batch(make_prompts(model.config), make_responses(2 * len(PROMPTS)))
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    assert relative(out.embeddings["gen"], exact.embeddings["gen"]) < 3e-2
    out.logp.sum().backward()


def test_the_vision_tower_sees_every_prompt_once():
    model = dual().eval()
    asked = make_prompts(model.config)
    seen = []
    handle = model.model.visual.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    model(**shared_prefix_batch(asked, make_responses(4 * len(PROMPTS))))
    handle.remove()
    assert seen == [len(asked["pixel_values"]) + len(asked["pixel_values_videos"])]


def test_a_disc_token_at_the_end_of_its_prompt_is_found():
    model = dual().eval()
    asked = make_prompts(model.config, [[6], [4]])
    expected = model(**asked).embeddings["disc"]
    last = torch.tensor(asked["lengths"]).cumsum(0) - 1
    at_end = model(**(asked | {"disc_index": last})).embeddings["disc"]
    responses = make_responses(6)
    out = model(**shared_prefix_batch(asked, responses))
    torch.testing.assert_close(out.embeddings["disc"], expected, rtol=1e-5, atol=1e-6)
    out = model(**shared_prefix_batch(asked | {"disc_index": last}, responses))
    torch.testing.assert_close(out.embeddings["disc"], at_end, rtol=1e-5, atol=1e-6)


def test_errors_are_named():
    config = dual().config
    asked = make_prompts(config, [[6], [4]])
    with pytest.raises(ValueError, match="responses has 3 entries; expected a multiple of 2 prompts"):
        shared_prefix_batch(asked, [[1]] * 3)
    with pytest.raises(ValueError, match=r"responses\[1\] is empty"):
        shared_prefix_batch(asked, [[1], []])
    with pytest.raises(ValueError, match="prompt 1 has one token"):
        shared_prefix_batch(make_prompts(config, [[6], [1]]), [[1], [2]])
    with pytest.raises(ValueError, match="expected G positive ones"):
        SharedPrefixLayout([2, 2], [1, 2, 3], torch.device("cpu"))
    layout, (query, key, value) = attention_case()
    with pytest.raises(ValueError, match="query has shape"):
        layout.attention(None, query[:, :, 1:], key, value, scale=None, dropout=0.0)
    assert packed_layout([3], torch.device("cpu")).total == 3


@pytest.mark.parametrize("shape", [(5, 4, 16), (3, 7, 24), (1, 1, 128)])
def test_passes_are_merged_by_one_kernel(shape):
    """What runs on a GPU, in Triton's interpreter: rows that only one pass sees much of, and some of both."""
    from rime_fast.model.prefix_attention import _merge
    from rime_fast.model.triton_prefix import merge_passes

    # flash gives its output the order of its queries' strides: heads outside
    out = [torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1) for _ in range(2)]
    lse = [30 * torch.randn(shape[:2]) for _ in range(2)]
    wanted, found = _merge(out[0], lse[0], out[1], lse[1]), merge_passes(out[0], lse[0], out[1], lse[1])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
