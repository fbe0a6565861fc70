"""A decode step by fused kernels gives what the model's own modules give, on all families."""

from __future__ import annotations

import pytest
import torch

from rime_fast.engine import decode, fused_decode
from rime_fast.engine.decode import DecodeCache, PrefillRecorder
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.packing import PACKED_SDPA
from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.tiny_batch import tiny_batch
from tests.gpu.devices import CUDA

PROMPTS = [[3, ("image", 4, 6), 9], [12], [2, ("image", 4, 4), 2, ("image", 8, 4), 64]]
GROUP = 3


def policy_of(family, device="cpu", dtype=torch.float32, **sizes):
    sizes = {"vocab_size": 96, "hidden": 128, "heads": 4, "kv_heads": 2, "init_std": 0.15} | sizes
    model = DualModeModel.from_model(tiny_model(family, seed=0, **sizes)).eval().to(device, dtype)
    model.model.language_model.config._attn_implementation = PACKED_SDPA
    return model


def cache_of(policy, device="cpu", steps=4):
    batch = tiny_batch(policy.config, PROMPTS, scored=0.0)
    batch = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in batch.items() if k != "targets"}
    recorder = PrefillRecorder(batch["lengths"], torch.device(device))
    with torch.inference_mode():
        kind = next(policy.parameters()).dtype
        pixels = batch["pixel_values"].to(kind)
        keys = ("input_ids", "position_ids", "lengths", "image_grid_thw", "image_grids", "mm_token_type_ids")
        known = {k: batch[k] for k in keys if k in batch}
        policy.encode_hidden(**known, pixel_values=pixels, layout=recorder)
    return DecodeCache(recorder, GROUP, steps, static=True)


def steps(policy, device, fused, monkeypatch, count=3):
    monkeypatch.setattr(fused_decode, "DEVICES", {"cpu", "cuda"} if fused else set())
    cache, found = cache_of(policy, device), []
    n, draw = GROUP * len(PROMPTS), torch.Generator().manual_seed(3)
    position = torch.tensor([40, 12, 90]).repeat_interleave(GROUP).to(device)
    for step in range(count):
        cache.next_step()
        token = torch.randint(96, (n,), generator=draw).to(device)
        if step == count - 1:  # finished rows go, a whole prompt among them
            kept = cache.keep([True, True, True, True, False, False, True, True, True])
            token, position = token[kept], position[kept]
        with torch.inference_mode():
            found.append(decode.next_hidden(policy, cache, token, position + step))
    return [*found, *cache.own_keys.values(), *cache.own_values.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_the_models(family, monkeypatch):
    policy = policy_of(family)
    wanted = steps(policy, "cpu", False, monkeypatch)
    assert fused_decode.why_not(policy.model.language_model, cache_of(policy)) is not None
    found = steps(policy, "cpu", True, monkeypatch)
    assert fused_decode.why_not(policy.model.language_model, cache_of(policy)) is None
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_the_models_on_a_gpu(family, dtype, device, monkeypatch):
    """In bf16 by the rule: at most twice the modules' own distance from fp32."""
    truth = steps(policy_of(family, device), device, False, monkeypatch)
    policy = policy_of(family, device, dtype)
    eager, found = (steps(policy, device, fused, monkeypatch) for fused in (False, True))
    for a, b, c in zip(found, eager, truth, strict=True):
        scale = c.float().norm()
        assert (a.float() - c).norm() <= 2 * (b.float() - c).norm() + 1e-5 * scale


def test_what_cannot_be_fused_says_why(monkeypatch):
    monkeypatch.setattr(fused_decode, "DEVICES", {"cpu"})
    policy = policy_of("qwen2_vl", hidden=64)  # heads of 16
    assert "16 wide" in fused_decode.why_not(policy.model.language_model, cache_of(policy))
    policy = policy_of("qwen2_vl")
    policy.model.language_model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert "mlp has hooks" in fused_decode.why_not(policy.model.language_model, cache_of(policy))
