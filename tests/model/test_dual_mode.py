"""The packed pass against the stock forward, sequence by sequence: values and every parameter's gradient."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from rime_fast.model.dual_mode import DualModeModel, resolve_attention
from rime_fast.model.tiny import FAMILIES, tiny_config, tiny_model
from rime_fast.model.tiny_batch import tiny_batch
from tests.ranks import run_ranks

VOCAB = 160
# Text only; one image; images of two sizes and text between; a video; image and video; a single token.
MIXED = [
    [9, 7],
    [3, ("image", 4, 6), 8],
    [2, ("image", 4, 4), 3, ("image", 8, 4), 6],
    [4, ("video", 2, 4, 4), 9],
    [2, ("image", 4, 4), 2, ("video", 3, 4, 6), 5],
    [1],
    [30],
]
EQUAL = [[3, ("image", 4, 4), 8]] * 3 + [[6]] * 3


def stock_model(family, **sizes):
    return tiny_model(family, vocab_size=VOCAB, seed=1, init_std=0.12, **sizes)


def split(batch, i):
    """Sequence i alone, as a stock batch of one row."""
    start, length = sum(batch["lengths"][:i]), batch["lengths"][i]
    rows = slice(start, start + length)
    one = {
        "input_ids": batch["input_ids"][None, rows],
        "position_ids": batch["position_ids"][:, None, rows],
        "mm_token_type_ids": batch["mm_token_type_ids"][None, rows],
    }
    for pixels, grids, kind in (
        ("pixel_values", "image_grid_thw", 1),
        ("pixel_values_videos", "video_grid_thw", 2),
    ):
        if pixels not in batch:
            continue
        tokens = (batch["mm_token_type_ids"] == kind).long()
        cells = batch[grids].prod(-1) // 4
        first = int(tokens[:start].sum())
        count = int(tokens[rows].sum())
        ends = cells.cumsum(0)
        chosen = (ends > first) & (ends <= first + count)
        if chosen.any():
            one[grids] = batch[grids][chosen]
            one[pixels] = batch[pixels][4 * first : 4 * (first + count)]
    return one, rows


def stock_read_outs(model, batch):
    logp, disc, gen = [], [], []
    for i in range(len(batch["lengths"])):
        one, rows = split(batch, i)
        hidden = model.model(**one).last_hidden_state[0]
        targets = batch["targets"][rows]
        scores = model.lm_head(hidden).log_softmax(-1)
        chosen = scores.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        logp.append(torch.where(targets >= 0, chosen, 0.0))
        disc.append(F.normalize(hidden[batch["disc_index"][i] - rows.start], dim=0))
        gen.append(F.normalize(hidden[batch["gen_index"][i] - rows.start], dim=0))
    return torch.cat(logp), torch.stack(disc), torch.stack(gen)


def some_loss(logp, disc, gen):
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in (logp, disc, gen)]
    return sum((w.to(x.dtype) * x).sum() for w, x in zip(weights, (logp, disc, gen), strict=True))


def relative(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sequences", [MIXED, EQUAL], ids=["mixed", "equal"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_equals_stock_forward(family, sequences, tied):
    model = stock_model(family, tie_word_embeddings=tied)
    batch = tiny_batch(model.config, sequences, seed=2)
    expected = stock_read_outs(model, batch)
    some_loss(*expected).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    model = DualModeModel.from_model(model)
    out = model(**batch)
    found = (out.logp, out.embeddings["disc"], out.embeddings["gen"])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert relative(a, b) < 1e-5
    some_loss(*found).backward()
    # Biases of the keys have no gradient in exact arithmetic: relative to the largest of their kind.
    scale = max(float(g.norm()) for g in gradients.values())
    for name, p in model.named_parameters():
        error = float((p.grad - gradients[name]).norm())
        assert error < 1e-5 * max(float(gradients[name].norm()), 1e-2 * scale), name


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_stock(family, tmp_path):
    model = DualModeModel.from_model(stock_model(family))
    batch = tiny_batch(model.config, MIXED[:3], seed=3)
    model.save_pretrained(tmp_path)
    assert not [f for f in tmp_path.iterdir() if f.suffix in (".bin", ".pt", ".pth")]
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not isinstance(stock, DualModeModel)
    assert stock.config.architectures == [type(stock).__name__]
    one, _ = split(batch, 1)
    torch.testing.assert_close(stock(**one).logits, model(**one).logits)
    again = DualModeModel.from_pretrained(tmp_path)
    assert isinstance(again, DualModeModel)
    assert isinstance(again, type(stock))
    assert torch.equal(again(**batch).logp, model(**batch).logp)
    fresh = DualModeModel.from_config(stock.config)
    assert fresh(**batch).embeddings["gen"].shape == (3, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_stock(family):
    model = stock_model(family)
    batch = tiny_batch(model.config, MIXED[:3], seed=4)
    one, _ = split(batch, 2)
    one.pop("position_ids")
    expected = model.generate(**one, max_new_tokens=6, do_sample=False)
    again = DualModeModel.from_model(model).generate(**one, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant):
    model = DualModeModel.from_model(stock_model(family)).train()
    batch = tiny_batch(model.config, MIXED, seed=5)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model(**batch)
        (out.embeddings["gen"].sum() + out.logp.sum()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_lora(task):
    peft = pytest.importorskip("peft")
    model = DualModeModel.from_model(stock_model("qwen2_vl"))
    batch = tiny_batch(model.config, MIXED, seed=6)
    before = model(**batch).logp
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task)
    wrapped = peft.get_peft_model(model, config)
    out = wrapped(**batch)
    torch.testing.assert_close(out.logp, before)
    (out.embeddings["disc"][0, 0] + out.logp.sum()).backward()
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


def test_lora_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    model = DualModeModel.from_model(stock_model("qwen2_vl", tie_word_embeddings=False))
    batch = tiny_batch(model.config, MIXED, seed=6)
    before = model(**batch).logp
    whole = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    torch.testing.assert_close(whole(**batch).logp, before)
    model = DualModeModel.from_model(stock_model("qwen2_vl", tie_word_embeddings=False))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(TypeError, match="modules_to_save"):
        wrapped(**batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(family):
    model = DualModeModel.from_model(stock_model(family))
    batch = tiny_batch(model.config, MIXED, seed=8)
    exact = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch)
        (out.logp.sum() + out.embeddings["gen"].sum()).backward()
    assert out.logp.dtype == torch.float32
    assert relative(out.embeddings["disc"], exact.embeddings["disc"]) < 0.1
    assert relative(out.logp, exact.logp) < 0.1
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    half = model.to(torch.bfloat16)(**batch)
    assert half.embeddings["gen"].dtype == torch.float32
    assert relative(half.embeddings["gen"], exact.embeddings["gen"]) < 0.1


def test_loss_entropy_hidden_and_pools():
    model = DualModeModel.from_model(stock_model("qwen2_vl"))
    batch = tiny_batch(model.config, MIXED, seed=9)
    weight = torch.rand(len(batch["input_ids"]))
    out = model(**batch, token_weight=weight, entropy=True, temperature=0.7)
    hidden = model(**{**batch, "targets": None}, pools={}).hidden
    plain = model(**batch, temperature=0.7)
    torch.testing.assert_close(out.loss, -(weight * plain.logp).sum())
    scores = (model.lm_head(hidden) / 0.7).log_softmax(-1)
    scored = batch["targets"] >= 0
    torch.testing.assert_close(out.entropy[scored], -(scores.exp() * scores).sum(-1)[scored])
    pooled = model(**{**batch, "targets": None}, pools={"last": batch["gen_index"]}, normalize=False)
    assert pooled.logp is None
    assert list(pooled.embeddings) == ["last"]
    torch.testing.assert_close(pooled.embeddings["last"], hidden[batch["gen_index"]])


def test_a_batch_without_images_can_touch_the_vision_tower(monkeypatch):
    model = DualModeModel.from_model(stock_model("qwen3_vl"))
    batch = tiny_batch(model.config, [[5], [8]], seed=9)
    expected = model(**batch).logp
    monkeypatch.setattr(model, "_must_touch_vision", lambda: True)
    out = model(**batch)
    assert torch.equal(out.logp, expected)
    out.logp.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.model.visual.parameters())


def ddp_rank(rank: int, world: int) -> None:
    model = DualModeModel.from_model(tiny_model("qwen2_vl", init_std=0.12))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    batch = tiny_batch(model.config, [[2, ("image", 4, 4), 5]] if rank == 0 else [[9]], seed=rank)
    for _ in range(2):  # a parameter without gradient fails the second forward
        wrapped(**batch).embeddings["gen"][:, 0].sum().backward()
    norm = model.model.visual.patch_embed.proj.weight.grad.norm()
    norms = [torch.empty_like(norm) for _ in range(world)]
    torch.distributed.all_gather(norms, norm)
    assert norms[0] == norms[1] > 0


@pytest.mark.dist
def test_ddp_with_images_on_one_rank():
    run_ranks(ddp_rank, 2)


def test_missing_token_gives_a_zero_row():
    model = DualModeModel.from_model(stock_model("qwen2_vl"))
    batch = tiny_batch(model.config, MIXED, seed=9)
    batch["gen_index"][1] = -1
    for targets in (batch["targets"], None):
        gen = model(**{**batch, "targets": targets}).embeddings["gen"]
        assert torch.equal(gen[1], torch.zeros(64))
        torch.testing.assert_close(gen[[0, 2]].norm(dim=1), torch.ones(2))


def test_host_grids_equal_grid_tensors():
    model = DualModeModel.from_model(stock_model("qwen2_5_vl"))
    batch = tiny_batch(model.config, MIXED, seed=9)
    expected = model(**batch).logp
    host = {k: v for k, v in batch.items() if "grid" not in k}
    host |= {"image_grids": batch["image_grid_thw"].tolist(), "video_grids": batch["video_grid_thw"].tolist()}
    assert torch.equal(model(**host).logp, expected)


def test_bad_input_is_named():
    model = DualModeModel.from_model(stock_model("qwen2_vl"))
    batch = tiny_batch(model.config, MIXED[:2], seed=9)
    with pytest.raises(ValueError, match="lengths sum to 3"):
        model(**{**batch, "lengths": [1, 2]})
    with pytest.raises(ValueError, match=r"position_ids is None; expected \[3,"):
        model(**{**batch, "position_ids": None})
    with pytest.raises(ValueError, match="together with attention_mask"):
        model(**batch, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="image pixels and image grids"):
        model(**{**batch, "image_grid_thw": None})
    with pytest.raises(ValueError, match="8 patches; the grids"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:8]})
    with pytest.raises(ValueError, match="0 image and 0 video tokens; the pixel values make 6"):
        model(**{**batch, "mm_token_type_ids": torch.zeros_like(batch["mm_token_type_ids"])})
    stray = torch.where(batch["gen_index"][0] == torch.arange(len(batch["input_ids"])), 7, batch["input_ids"])
    with pytest.raises(ValueError, match="7 image and 0 video tokens; the pixel values make 6"):
        model(**{**batch, "input_ids": stray, "mm_token_type_ids": None})
    with pytest.raises(ValueError, match="token_weight was given without targets"):
        model(**{**batch, "targets": None}, token_weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"targets, disc_index was given without lengths \(a packed batch\)"):
        model(batch["input_ids"][None], targets=batch["input_ids"], disc_index=torch.tensor([1]))
    with pytest.raises(ValueError, match="without input_ids"):
        model(lengths=batch["lengths"])
    with pytest.raises(ValueError, match="attn_implementation is 'eager'"):
        resolve_attention("eager")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="cannot keep packed sequences apart"):
        model(**batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_names_what_generate_and_trainers_look_for(family):
    """transformers asks forward's signature for these; a parameter that only one family has stays among **kwargs."""
    dual = DualModeModel.from_model(stock_model(family))
    names = inspect.signature(dual.forward).parameters
    own = inspect.signature(type(dual).__mro__[2].forward).parameters
    assert own.keys() - names.keys() <= {"self", "use_cache", "second_per_grid_ts"}
    assert names["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert type(dual).__name__ == type(dual).__mro__[2].__name__


def test_other_families_are_refused():
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="model_type is 'llama'"):
        DualModeModel.from_config(LlamaConfig())
    with pytest.raises(TypeError, match="Qwen2VLModel"):
        DualModeModel.from_model(stock_model("qwen2_vl").model)


def test_attention_names():
    model = DualModeModel.from_config(tiny_config("qwen3_vl", vocab_size=VOCAB), attn_implementation="sdpa")
    assert model.model.language_model.config._attn_implementation == "rime_sdpa"
    assert resolve_attention("flash_attention_2") == "flash_attention_2"
    assert resolve_attention("auto") in ("rime_sdpa", "flash_attention_2")


def test_checkpoints_hold_no_pickle(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "dumps", refuse)
    DualModeModel.from_model(stock_model("qwen2_vl")).save_pretrained(tmp_path)
    DualModeModel.from_pretrained(tmp_path)
