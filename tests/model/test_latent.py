"""Latent rewrites: the packed branches set against one dense mask in the stock model, values and gradients."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.latent import latent_batch, latent_layout
from rime_fast.model.tiny import FAMILIES, tiny_model, tiny_processor, tiny_tokenizer
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.model.tokens import add_embedding_tokens, latent_token_ids

VOCAB, K = 160, 3
PROMPTS = [[3, ("image", 4, 6), 9], [12], [2, ("video", 2, 4, 4), 6], [5]]
REWRITES = [4, 7, 2, 0]  # the last has none, as a hard negative may


def dual(family="qwen2_vl", **sizes):
    return DualModeModel.from_model(tiny_model(family, vocab_size=VOCAB, seed=1, init_std=0.12, **sizes))


def make_batch(config, prompts=PROMPTS, rewrites=REWRITES, latents=K):
    """What the collator makes: prompt, rewrite, latent tokens, the rewrite again without its last token."""
    asked = tiny_batch(config, prompts, seed=2)
    draw = torch.Generator().manual_seed(3)
    found = {key: [] for key in ("ids", "positions", "kinds", "targets", "disc", "gen", "latent", "branches")}
    start = at = 0
    for p, r, disc in zip(asked["lengths"], rewrites, asked["disc_index"].tolist(), strict=True):
        rows = slice(start, start + p)
        rewrite = torch.randint(9, VOCAB, (r,), generator=draw)
        tail = torch.cat([rewrite, torch.arange(20, 20 + latents), rewrite[:-1]])
        last = int(asked["position_ids"][:, start + p - 1].max())
        place = torch.cat([torch.arange(r), torch.arange(latents + max(r - 1, 0))]) + last + 1
        targets = torch.full((p + len(tail),), -100)
        if r:
            targets[p - 1 : p + r - 1] = rewrite
            targets[p + r + latents - 1 :] = rewrite
        found["ids"] += [asked["input_ids"][rows], tail]
        found["positions"] += [asked["position_ids"][:, rows], place.expand(3, -1)]
        found["kinds"] += [asked["mm_token_type_ids"][rows], torch.zeros_like(tail)]
        found["targets"].append(targets)
        found["disc"].append(at + disc - start)
        found["gen"].append(at + p + r - 1 if r else -1)
        found["latent"].append(at + p + r + torch.arange(latents))
        found["branches"].append((p, r, latents, max(r - 1, 0)))
        start, at = start + p, at + p + len(tail)
    visual = {key: asked[key] for key in asked if "pixel" in key or "grid" in key}
    return {
        "input_ids": torch.cat(found["ids"]),
        "lengths": [sum(rows) for rows in found["branches"]],
        "position_ids": torch.cat(found["positions"], dim=1),
        "mm_token_type_ids": torch.cat(found["kinds"]),
        "targets": torch.cat(found["targets"]),
        "disc_index": torch.tensor(found["disc"]),
        "gen_index": torch.tensor(found["gen"]),
        "latent_index": torch.stack(found["latent"]),
        "branches": found["branches"],
    } | visual


def seen(branches) -> Tensor:
    """The dense mask [T, T] of the batch in its own order, written from the definition."""
    total = sum(map(sum, branches))
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for p, r, k, c in branches:
        rows = torch.arange(start, start + p + r + k + c)
        part = torch.repeat_interleave(torch.arange(4), torch.tensor([p, r, k, c]))
        allowed = {0: (0,), 1: (0, 1), 2: (0, 2), 3: (2, 3)}
        for i in rows.tolist():
            own = torch.tensor([int(part[j - start]) in allowed[int(part[i - start])] for j in rows.tolist()])
            mask[i, rows] = own & (rows <= i)
        start += p + r + k + c
    return mask


class Dense:
    """An attention layout that is one mask."""

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.longest = mask, len(mask)

    def attention(self, module, query, key, value, *, scale, dropout):
        return F.scaled_dot_product_attention(query, key, value, self.mask, scale=scale, enable_gqa=True).transpose(
            1, 2
        )


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def outcome(model, batch, place=None):
    out = model(**{key: value for key, value in batch.items() if key != "branches"})
    logp = out.logp if place is None else out.logp.index_select(0, place)
    found = (logp, out.embeddings["disc"], out.embeddings["gen"], out.embeddings["latent"])
    draw = torch.Generator().manual_seed(7)
    model.zero_grad()
    sum((torch.randn(x.shape, generator=draw) * x).sum() for x in found).backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_dense_mask(family):
    """Against the stock attention of the same rows under the dense mask: fp32, 1e-5, every parameter's gradient."""
    model = dual(family)
    batch = make_batch(model.config)
    expected, wanted = outcome(model, batch | {"layout": Dense(seen(batch["branches"]))})
    found, got = outcome(model, *latent_batch(batch))
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-5
    assert len(wanted) == len(list(model.parameters()))
    for name, gradient in wanted.items():
        assert relative(got[name], gradient) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_one_causal_forward_gives_the_trained_embedding(family):
    """What inference runs, prompt and latent tokens as an ordinary sequence, is the branch that was trained."""
    model = dual(family).eval()
    batch = make_batch(model.config)
    with torch.no_grad():
        trained = model(**latent_batch(batch)[0]).embeddings
        plain = {key: batch[key] for key in batch if "pixel" in key or "grid" in key}
        keep, first = [], 0
        for p, r, k, c in batch["branches"]:
            keep += [*range(first, first + p), *range(first + p + r, first + p + r + k)]
            first += p + r + k + c
        lengths = [p + k for p, _, k, _ in batch["branches"]]
        ends = torch.tensor(list(accumulate(lengths)))
        plain |= {"lengths": lengths, "latent_index": ends[:, None] - K + torch.arange(K)}
        plain |= {key: batch[key][keep] for key in ("input_ids", "mm_token_type_ids")}
        plain["position_ids"] = batch["position_ids"][:, keep]
        alone = model(**plain).embeddings
    assert relative(alone["latent"], trained["latent"]) < 1e-5
    torch.testing.assert_close(trained["latent"].norm(dim=1), torch.ones(4))


def test_the_second_copy_does_not_see_the_prompt():
    """Another prompt moves the second copy's scores through the latent tokens alone: not where these are held."""
    model = dual().eval()
    batch = make_batch(model.config, [[12]], [5])
    p, r, k, _ = batch["branches"][0]
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][:p] = torch.flip(other["input_ids"][:p], [0])
    first, second = (model(**latent_batch(one)[0]).logp for one in (batch, other))
    rows = slice(p + r + k, None)
    assert not torch.equal(first[rows], second[rows])
    # one layer deep nothing of the prompt has reached the latent tokens' keys
    shallow = dual(layers=1).eval()
    one, two = (shallow(**latent_batch(x)[0]).logp for x in (batch, other))
    assert torch.equal(one[rows], two[rows])
    assert not torch.equal(one[p - 1 : p + r - 1], two[p - 1 : p + r - 1])


def attention_case(dtype=torch.float64, heads=4, kv=2, width=8):
    torch.manual_seed(0)
    branches = [(5, 3, 2, 2), (9, 0, 2, 0), (1, 4, 2, 3)]
    layout, take = latent_layout(branches, torch.device("cpu"))
    shapes = [(1, n, len(take), width) for n in (heads, kv, kv)]
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    mask = seen(branches)[take][:, take]
    return layout, inputs, mask


def gradients(function, inputs):
    out = function()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), inputs)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_attention_alone(dtype, bound, masked, monkeypatch):
    """Flash passes, and the masked form where no kernel serves."""
    layout, inputs, mask = attention_case(dtype)
    if masked:
        monkeypatch.setattr("rime_fast.model.shared_prefix.flash_serves", lambda x: False)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = gradients(lambda: Dense(mask).attention(None, *wide, scale=0.7, dropout=0.0), wide)
    found = gradients(lambda: layout.attention(None, *inputs, scale=0.7, dropout=0.0), inputs)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_attention_on_the_gpu(dtype, bound):
    _, inputs, mask = attention_case(width=32)
    layout, _ = latent_layout([(5, 3, 2, 2), (9, 0, 2, 0), (1, 4, 2, 3)], torch.device("cuda"))
    wide = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    expected = gradients(lambda: Dense(mask).attention(None, *wide, scale=0.3, dropout=0.0), wide)
    moved = [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]
    found = gradients(lambda: layout.attention(None, *moved, scale=0.3, dropout=0.0).cpu(), moved)
    for a, b in zip(found, expected, strict=True):
        assert relative(a.cpu(), b) < bound


@pytest.mark.parametrize("tied", [True, False])
def test_latent_tokens_survive_saving(tied, tmp_path):
    """Ordinary tokens of the vocabulary: K rows that differ, drawn the same every time, kept by save and load."""
    processor = tiny_processor(tiny_tokenizer(["a b c"]))
    model = DualModeModel.from_model(tiny_model(tokenizer=processor.tokenizer, tie_word_embeddings=tied))
    add_embedding_tokens(model, processor.tokenizer, latent_tokens=70)  # more than the padded table has room for
    ids = latent_token_ids(processor.tokenizer)
    rows = model.get_input_embeddings().weight[ids].clone()
    assert len(ids) == 70
    assert len(rows.unique(dim=0)) == 70
    add_embedding_tokens(model, processor.tokenizer, latent_tokens=70)
    add_embedding_tokens(model, processor.tokenizer)
    with pytest.raises(ValueError, match="latent_tokens is 4; this model was made with 70"):
        add_embedding_tokens(model, processor.tokenizer, latent_tokens=4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = DualModeModel.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight[ids], rows)
    assert latent_token_ids(type(processor).from_pretrained(tmp_path).tokenizer) == ids
