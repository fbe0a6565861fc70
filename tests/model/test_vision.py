"""The tower with segmented attention against the stock tower."""

from __future__ import annotations

import pytest
import torch

from rime_fast.model.tiny import FAMILIES, tiny_model
from rime_fast.model.vision import segment_attention, vision_features


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "grids",
    [[(1, 4, 4)] * 5, [(1, 4, 6), (1, 2, 2), (1, 4, 6), (1, 12, 8)], [(3, 4, 4), (1, 4, 4)]],
    ids=["equal", "mixed", "video"],
)
def test_equals_stock_tower(family, grids):
    tower = tiny_model(family, init_std=0.12, vision_layers=3).model.visual
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 96, requires_grad=True)
    stock = tower(pixels, grid_thw=torch.tensor(grids))
    wanted = [stock.pooler_output, *(getattr(stock, "deepstack_features", None) or [])]
    loss = sum((x**2).sum() for x in wanted)
    expected = [*wanted, *torch.autograd.grad(loss, [pixels, *tower.parameters()])]

    names = dict(tower.named_parameters()).keys()
    segment_attention(tower)
    segment_attention(tower)
    assert dict(tower.named_parameters()).keys() == names
    for _ in range(2):  # the second call takes its geometry from the first
        features, deepstack = vision_features(tower, pixels, grids)
        loss = sum((x**2).sum() for x in [features, *deepstack])
        found = [features, *deepstack, *torch.autograd.grad(loss, [pixels, *tower.parameters()])]
        scale = max(float(x.detach().norm()) for x in expected)
        for a, b in zip(found, expected, strict=True):
            a, b = a.detach(), b.detach()
            assert float((a - b).norm()) < 1e-5 * max(float(b.norm()), 1e-2 * scale)
    again = tower(pixels, grid_thw=torch.tensor(grids))
    torch.testing.assert_close(again.pooler_output, stock.pooler_output)


def test_patches_must_fit_the_grids():
    tower = tiny_model("qwen2_vl").model.visual
    with pytest.raises(ValueError, match="15 patches"):
        vision_features(tower, torch.randn(15, 96), [(1, 4, 4)])
