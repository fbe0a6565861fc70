"""The joint loss of one training step against an independent computation with stock transformers and plain torch.

The other side of the comparison shares nothing with ours but the token ids and pixels: every sequence runs alone
through the stock model (no packing, its own position ids), with full logits and full similarity matrices.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.model.tiny import FAMILIES
from rime_fast.model.tokens import add_embedding_tokens
from rime_fast.trainers.config import RimeConfig
from rime_fast.trainers.joint import RimeTrainer

TAU, N = 0.02, 5


def stock_forward(model, batch: dict, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence i alone: logits [L, V], last hidden states [L, H], its token ids [L]."""
    starts = [sum(batch["lengths"][:j]) for j in range(len(batch["lengths"]) + 1)]
    ids = batch["input_ids"][starts[i] : starts[i + 1]]
    vision = {}
    before = int((batch["input_ids"][: starts[i]] == model.config.vision_start_token_id).sum())
    count = int((ids == model.config.vision_start_token_id).sum())
    if count:
        grids = batch["image_grid_thw"]
        patches = grids.prod(dim=1)
        first = int(patches[:before].sum())
        stop = first + int(patches[before : before + count].sum())
        vision = {"pixel_values": batch["pixel_values"][first:stop], "image_grid_thw": grids[before : before + count]}
        vision["mm_token_type_ids"] = batch["mm_token_type_ids"][None, starts[i] : starts[i + 1]]
    out = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], output_hidden_states=True, **vision)
    return out.logits[0], out.hidden_states[-1][0], ids


def plain_loss(model, batch: dict, disc_id: int, gen_id: int) -> Tensor:
    """recipe.md 3, line by line."""
    nll: dict[str, list[Tensor]] = {"query": [], "target": []}
    d, g = [], []
    for i in range(2 * N):
        logits, hidden, ids = stock_forward(model, batch, i)
        # the response starts after the last "assistant\n"
        prompt = batch["prompt_lengths"][i]
        lost = F.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="none")
        nll["query" if i < N else "target"].append(lost)
        d.append(F.normalize(hidden[(ids == disc_id).nonzero()[-1, 0]], dim=0))
        g.append(F.normalize(hidden[(ids == gen_id).nonzero()[-1, 0]], dim=0))
    d_q, d_p, g_q, g_p = (torch.stack(x) for x in (d[:N], d[N:], g[:N], g[N:]))
    text = [tuple(batch["key_texts"][j]) for j in range(N)]
    same = torch.tensor([[i != j and text[i] == text[j] for j in range(N)] for i in range(N)])

    def c(a: Tensor, b: Tensor) -> Tensor:
        s = (a @ b.T / TAU).masked_fill(same, -torch.inf)
        own = torch.arange(N)
        return (F.cross_entropy(s, own) + F.cross_entropy(s.T, own)) / 2

    contrast = c(d_q, d_p) + c(g_q, g_p) + 0.5 * (c(g_q, d_p) + c(d_q, g_p))
    return torch.cat(nll["query"]).mean() + torch.cat(nll["target"]).mean() + contrast


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_stock_transformers(tiny, tmp_path, family):
    processor = tiny.processor()
    # three layers: Qwen3-VL's second deepstack level would touch nothing that is read out of two
    stock = tiny.model(processor, family, hidden=32, layers=3)
    add_embedding_tokens(stock, processor.tokenizer)
    pairs = tiny.pairs(N)
    pairs[3].target = pairs[1].target  # a false negative
    pairs[2].query.images = pairs[2].query.images * 2
    args = RimeConfig(output_dir=str(tmp_path), temperature=TAU, freeze_vision=False, progress="none")
    run = RimeTrainer(copy.deepcopy(stock), args, pairs, processing_class=processor, template=tiny.template)
    batch = run.data_collator(pairs)
    ours = run.compute_loss(run.model.train(), dict(batch))
    ours.backward()

    truth = stock.double()
    batch["key_texts"] = [pair.target.text for pair in pairs]
    batch["pixel_values"] = batch["pixel_values"].double()
    vocab = processor.tokenizer.get_vocab()
    plain = plain_loss(truth, batch, vocab["<disc_emb>"], vocab["<gen_emb>"])
    plain.backward()

    assert abs(ours.item() - plain.item()) < 1e-5 * abs(plain.item())
    gradients = {name: p.grad for name, p in run.model.named_parameters()}
    compared = 0
    for name, parameter in truth.named_parameters():
        assert (gradients[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            error = (gradients[name].double() - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, f"{name}: relative error {error:.2e} (norm {parameter.grad.norm():.2e})"
            compared += 1
    assert compared > 30
