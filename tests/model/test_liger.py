from __future__ import annotations

import sys

import pytest
import torch

from rime_fast.model import liger
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.tiny_batch import tiny_batch


@pytest.fixture
def restored_modules():
    """Liger replaces names inside transformers' modules: put them back."""
    modules = [sys.modules[f"transformers.models.{f}.modeling_{f}"] for f in FAMILIES]
    before = [dict(vars(m)) for m in modules]
    yield
    for module, names in zip(modules, before, strict=True):
        vars(module).clear()
        vars(module).update(names)


def test_what_is_missing_is_named(monkeypatch):
    model = tiny_model("qwen2_vl")
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"liger-kernel is not installed \(pip install"):
        liger.apply_liger(model)
    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="need a CUDA device"):
        liger.apply_liger(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "it is on cpu" in liger.liger_problem(torch.device("cpu"))
    model.config.model_type = "llama"
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        liger.apply_liger(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_reach_norms_mlp_and_rope(family, restored_modules):
    kernels = pytest.importorskip("liger_kernel.transformers")
    model = DualModeModel.from_model(tiny_model(family))
    names = {name: id(p) for name, p in model.named_parameters()}
    liger.install_liger(model)
    assert {name: id(p) for name, p in model.named_parameters()} == names
    layer = model.model.language_model.layers[0]
    assert layer.mlp.forward.__func__ is kernels.LigerSwiGLUMLP.forward
    norms = [m for m in model.model.language_model.modules() if "RMSNorm" in type(m).__name__]
    assert len(norms) == (9 if family == "qwen3_vl" else 5)  # Qwen3-VL norms queries and keys too
    assert all(type(m) is kernels.LigerRMSNorm for m in norms)
    module = sys.modules[f"transformers.models.{family}.modeling_{family}"]
    assert module.apply_rotary_pos_emb is kernels.liger_rotary_pos_emb


def test_another_activation_is_refused(restored_modules):
    pytest.importorskip("liger_kernel")
    model = tiny_model("qwen2_vl")
    for layer in model.model.language_model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="needs 'silu'"):
        liger.install_liger(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_same_numbers_on_cuda(family, restored_modules):
    pytest.importorskip("liger_kernel")
    model = DualModeModel.from_model(tiny_model(family, init_std=0.12)).cuda()
    batch = tiny_batch(model.config, [[3, ("image", 4, 6), 9], [14]], seed=1)
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    expected = model(**batch)
    liger.apply_liger(model)
    out = model(**batch)
    torch.testing.assert_close(out.logp, expected.logp, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.embeddings["gen"], expected.embeddings["gen"], rtol=1e-3, atol=1e-3)
