from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from rime_fast.model import packing
from rime_fast.model.packing import PackedLayout, group_by_length, packed_attention, packed_layout

CPU = torch.device("cpu")


def separate(q, k, v, lengths, causal):
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    parts = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("shd,thd->hst", a, b) * a.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(len(a), len(a)).triu(1).bool(), float("-inf"))
        parts.append(torch.einsum("hst,thd->shd", scores.softmax(-1), c))
    return torch.cat(parts)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.booleans(), st.sampled_from([1, 2]))
def test_attend_equals_separate_sequences(lengths, causal, shared):
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 8) for heads in (4, 4 // shared, 4 // shared)]
    rows = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]
    weight = torch.randn(shapes[0], generator=draw, dtype=torch.float64)
    found, expected = [], []
    for out, f in (
        (found, lambda q, k, v: packed_layout(lengths, CPU, causal=causal).attend(q, k, v)),
        (expected, lambda q, k, v: separate(q, k, v, lengths, causal)),
    ):
        value = f(*rows)
        out += [value, *torch.autograd.grad((weight * value).sum(), rows)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_the_varlen_kernel_gets_the_right_boundaries(causal, monkeypatch):
    """The CUDA route's bookkeeping, with a stand-in for the kernel."""

    def stand_in(query, key, value, rows, keys, longest_rows, longest_keys, dropout, is_causal, mask, *, scale):
        assert rows.dtype == torch.int32
        assert torch.equal(rows, keys)
        assert longest_rows == longest_keys == 9
        assert (dropout, is_causal, mask, scale) == (0.0, causal, False, 8**-0.5)
        return separate(query, key, value, rows.diff().tolist(), causal), None

    lengths = [4, 9, 1, 4]
    rows = [torch.randn(18, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    expected = PackedLayout(lengths, CPU, causal=causal).attend(*rows)
    monkeypatch.setattr(packing, "serves_varlen", lambda rows: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_in)
    found = PackedLayout(lengths, CPU, causal=causal).attend(*rows, scale=8**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten":
            self.names.append(function.__name__)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_call_for_all_lengths_on_cuda(dtype):
    with FakeTensorMode():
        rows = [torch.empty(40, heads, 80, dtype=dtype, device="cuda") for heads in (4, 2, 2)]
        layout = PackedLayout([4, 5, 6, 7, 8, 10], CPU, causal=True)
        layout.__dict__["bounds"] = torch.empty(7, dtype=torch.int32, device="cuda")
        with Calls() as calls:
            out = layout.attend(*rows)
    assert calls.names == ["_flash_attention_forward.default"]
    assert out.shape == rows[0].shape
    assert out.dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("causal", [True, False])
def test_attend_on_the_gpu(dtype, bound, causal):
    for lengths in ([4, 9, 1, 4], [3, 200, 17]):
        rows = [torch.randn(sum(lengths), heads, 80, device="cuda", dtype=dtype) for heads in (4, 2, 2)]
        wide = [x.double().cpu().requires_grad_() for x in rows]
        rows = [x.requires_grad_() for x in rows]
        out = PackedLayout(lengths, torch.device("cuda"), causal=causal).attend(*rows)
        expected = separate(*wide, lengths, causal)
        found = [out, *torch.autograd.grad(out.sum(), rows)]
        for a, b in zip(found, [expected, *torch.autograd.grad(expected.sum(), wide)], strict=True):
            assert (a.cpu().double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("lengths", [[7] * 5, [7, 7, 3, 3, 3], [12]])
def test_equal_neighbours_are_views(lengths):
    layout = PackedLayout(lengths, CPU, causal=False)
    assert layout.take is None
    assert layout.padded == sum(lengths)


def test_groups_are_a_partition_and_pad_little():
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 500, (200,), generator=draw).tolist()
    groups = group_by_length(lengths, 96 * 96)
    assert sorted(i for g in groups for i in g) == list(range(200))
    padded = sum(len(g) * max(lengths[i] for i in g) for g in groups)
    assert padded < 1.25 * sum(lengths)
    assert len(groups) < 50
    # Blocks that cost nothing: each length its own. Blocks that cost everything: one.
    assert len(group_by_length(lengths, 0)) == len(set(lengths))
    assert len(group_by_length(lengths, 10**12)) == 1


def test_best_split_is_found():
    from itertools import combinations

    lengths, block = [3, 4, 9, 10, 30, 31, 33], 50
    best = min(
        sum(len(part) * max(part) ** 2 + block for part in parts)
        for n in range(len(lengths))
        for cuts in combinations(range(1, len(lengths)), n)
        for parts in [[lengths[a:b] for a, b in zip((0, *cuts), (*cuts, len(lengths)), strict=True)]]
    )
    groups = group_by_length(lengths, block)
    assert sum(len(g) * max(lengths[i] for i in g) ** 2 + block for g in groups) == best


def test_flash_boundaries():
    kwargs = PackedLayout([3, 1, 5], CPU, causal=True).flash_kwargs()
    assert kwargs["cu_seq_lens_q"].tolist() == [0, 3, 4, 9]
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    assert kwargs["max_length_k"] == 5


def test_without_layout_it_is_sdpa():
    q, k, v = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    out, _ = packed_attention(module, q, k, v, None, scaling=0.3)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="all positive"):
        PackedLayout([3, 0], CPU, causal=True)
    layout = packed_layout([3, 9], CPU)
    x = torch.randn(7, 2, 8)
    with pytest.raises(ValueError, match="7 rows; expected 12"):
        layout.attend(x, x, x)
    x = torch.randn(1, 2, 12, 8)
    with pytest.raises(ValueError, match="9 tokens exceeds sliding_window 4"):
        packed_attention(torch.nn.Module(), x, x, x, None, rime_layout=layout, sliding_window=4)
