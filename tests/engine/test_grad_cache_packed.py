"""The gradient cache on real (tiny) vision-language models: slices of a packed batch, frozen towers, adapters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rime_fast.engine.grad_cache import GradCache
from rime_fast.engine.packed_batch import PackedBatch, PackedEncoder, part_tokens, plan_micro_batches
from rime_fast.engine.wrappers import GradSync
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.ops.contrastive import contrastive_loss

# Queries, then targets: images of several sizes, two in one sequence, videos, both, text alone.
QUERIES = [
    [3, ("image", 4, 6), 8],
    [2, ("image", 4, 4), 3, ("image", 8, 4), 6],
    [4, ("video", 2, 4, 4), 9],
    [9, 7],
    [2, ("image", 4, 4), 2, ("video", 3, 4, 6), 5],
]
TARGETS = [[12], [5, ("image", 6, 4), 4], [21], [3, ("video", 1, 4, 4), 3], [7]]
N, TOKENS = len(QUERIES), 40
TERMS = [("disc", "disc", 1.0), ("gen", "gen", 1.0), ("gen", "disc", 0.5), ("disc", "gen", 0.5)]


def make(family: str, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, dict]:
    model = tiny_model(
        family, vocab_size=160, seed=1, init_std=0.12, hidden=32, layers=3, vision_hidden=16, dtype=dtype
    )
    batch = tiny_batch(model.config, QUERIES + TARGETS)
    for key in ("pixel_values", "pixel_values_videos"):
        batch[key] = batch[key].to(dtype)
    batch["token_weight"] = torch.rand(batch["targets"].shape) * (batch["targets"] >= 0) / 20
    return DualModeModel.from_model(model).train(), batch


def contrast(rows: dict[str, Tensor], backend: str = "reference") -> Tensor:
    queries, keys = ({m: x[part] for m, x in rows.items()} for part in (slice(N), slice(N, None)))
    return contrastive_loss(queries, keys, terms=TERMS, temperature=0.1, backend=backend).loss


def whole_batch(model, batch: dict, backend: str = "reference") -> Tensor:
    out = model(**batch, logprob_backend=backend)
    return out.loss + contrast(out.embeddings, backend)


def cached(
    model,
    batch: dict,
    *,
    keep: float = 0,
    backend: str = "reference",
    tokens: int = TOKENS,
    bytes_per_token: float = 0.0,
):
    encoder = PackedEncoder(model, batch, tokens, logprob_backend=backend)
    cache = GradCache(sync=GradSync(model), keep_bytes=keep, cost=part_tokens)
    cache.bytes_per_cost = bytes_per_token
    return cache.step(encoder.parts, encode=encoder, loss=lambda rows: contrast(encoder.in_order(rows), backend))


def gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(ours: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == truth.keys()
    assert len(truth) > 4
    for name, want in truth.items():
        error = float((ours[name] - want).norm() / want.norm())
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_equals_the_single_full_batch(family):
    """fp64 to 1e-10; mixed image sizes, videos; no graph kept but the last, and all kept."""
    model, batch = make(family)
    loss = whole_batch(model, batch)
    loss.backward()
    loss = loss.detach()
    truth = gradients(model)
    for keep in (0, math.inf):
        step = cached(model, batch, keep=keep)
        assert step.encoded == 2 * len(plan_micro_batches(batch["lengths"], TOKENS)) - step.kept > 4
        assert abs(float(step.loss - loss)) < 1e-12 * float(loss)
        assert_close(gradients(model), truth, 1e-10)


def test_fp32_with_the_fast_backends():
    model, batch = make("qwen2_vl", torch.float32)
    wide, wide_batch = make("qwen2_vl")
    wide.load_state_dict(model.state_dict())
    wide_batch |= {key: batch[key].double() for key in ("pixel_values", "pixel_values_videos")}
    wide_batch["token_weight"] = batch["token_weight"]
    whole_batch(wide, wide_batch).backward()
    cached(model, batch, backend="auto")
    assert_close(gradients(model), gradients(wide), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_for_kept_graphs_changes_no_bit(family):
    """fp32, dropout, the fast backends: a resumed run that keeps another number of graphs takes the same step."""
    from peft import LoraConfig, get_peft_model

    model, batch = make(family, torch.float32)
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], modules_to_save=["merger"])
    model = get_peft_model(model, lora).train()
    found, kept = [], []
    for keep in (0, 60, math.inf):
        torch.manual_seed(5)
        step = cached(model, batch, keep=keep, backend="auto", bytes_per_token=1.0)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"": step.loss})
        kept.append(step.kept)
        model.zero_grad()
    assert kept[0] == 1 < kept[1] < kept[2] == step.encoded
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], want) for name, want in found[0].items())


def test_checkpointing_changes_nothing():
    model, batch = make("qwen2_5_vl")
    whole_batch(model, batch).backward()
    truth = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cached(model, batch)
    assert_close(gradients(model), truth, 1e-10)


def test_lora_with_dropout_is_replayed_to_the_bit():
    from peft import LoraConfig, get_peft_model

    model, batch = make("qwen2_vl")
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora).train()
    torch.manual_seed(5)
    cached(model, batch, keep=math.inf)  # one graph a micro-batch, nothing replayed: a plain step
    truth = gradients(model)
    torch.manual_seed(5)
    step = cached(model, batch, keep=0)
    assert step.kept == 1
    ours = gradients(model)
    assert_close(ours, truth, 1e-10)
    torch.manual_seed(6)
    cached(model, batch, keep=0)
    other = gradients(model)
    assert any((other[name] - truth[name]).norm() > 1e-3 * truth[name].norm() for name in truth)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_runs_once(family):
    """Its features are reused by the second pass; the mergers are trained."""
    model, batch = make(family)
    for name, parameter in model.model.visual.named_parameters():
        parameter.requires_grad_("merger" in name)
    whole_batch(model, batch).backward()
    truth = gradients(model)
    assert any("merger" in name for name in truth)
    runs = []
    block = model.model.visual.blocks[0]
    hook = block.register_forward_hook(lambda module, args, out: runs.append(len(args[0])))
    step = cached(model, batch)
    hook.remove()
    assert_close(gradients(model), truth, 1e-10)
    patches = len(batch["pixel_values"]) + len(batch["pixel_values_videos"])
    assert step.encoded > len(plan_micro_batches(batch["lengths"], TOKENS))
    assert sum(runs) == patches


def test_a_trained_tower_runs_in_both_passes():
    model, batch = make("qwen2_vl")
    runs = []
    model.model.visual.blocks[0].register_forward_hook(lambda module, args, out: runs.append(len(args[0])))
    cached(model, batch, tokens=25)
    assert sum(runs) > len(batch["pixel_values"]) + len(batch["pixel_values_videos"])


def test_parts_of_a_packed_batch_encode_as_the_whole():
    """Any order of sequences; hard negatives' missing <gen_emb> (-1); counts given or worked out."""
    model, batch = make("qwen3_vl")
    batch["gen_index"][3] = -1
    whole = model(**batch, logprob_backend="reference")
    starts = [sum(batch["lengths"][:i]) for i in range(2 * N + 1)]
    counted = batch | {"image_counts": [1, 2, 0, 0, 1, 0, 1, 0, 0, 0], "video_counts": [0, 0, 1, 0, 1, 0, 0, 0, 1, 0]}
    counted |= {f"{kind}_grids": batch[f"{kind}_grid_thw"].tolist() for kind in ("image", "video")}
    for source in (batch, counted):
        packed = PackedBatch(source)
        for sequences in ([0], [3], [2, 3, 4], [9, 1, 4], [8, 0, 6]):
            part = packed.take(sequences)
            out = model(**part, logprob_backend="reference")
            rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in sequences])
            torch.testing.assert_close(out.logp, whole.logp[rows], rtol=1e-10, atol=1e-12)
            for mode in ("disc", "gen"):
                ours, truth = out.embeddings[mode], whole.embeddings[mode][sequences]
                torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)
        assert "pixel_values" not in packed.take([3, 5])


def test_the_plan_fills_the_budget_and_covers_everything():
    lengths = [5, 40, 7, 7, 30, 2, 19, 100]
    groups = plan_micro_batches(lengths, 45)
    assert sorted(i for group in groups for i in group) == list(range(8))
    assert all(sum(lengths[i] for i in group) <= 45 or len(group) == 1 for group in groups)
    assert groups == [[7], [1], [4], [0, 2, 3, 5, 6]]
    assert plan_micro_batches(lengths, 1000) == [list(range(8))]


def test_errors_name_the_argument():
    _, batch = make("qwen2_vl")
    with pytest.raises(ValueError, match="max_tokens is 0"):
        plan_micro_batches([3], 0)
    with pytest.raises(ValueError, match="lengths sum to"):
        PackedBatch(batch | {"lengths": batch["lengths"][:-1]})
    with pytest.raises(ValueError, match="sequence 1 has 12 image tokens"):
        PackedBatch(batch | {"image_grid_thw": batch["image_grid_thw"].roll(1, 0)})
    with pytest.raises(ValueError, match="patches"):
        PackedBatch(batch | {"pixel_values": batch["pixel_values"][1:]})
