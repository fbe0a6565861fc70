"""score_rewrites_: the compiled backend against the reference, precision, missing values, errors, compilation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rime_fast.bench.harness import peak_memory
from rime_fast.ops import native
from rime_fast.ops.reward import TERM_NAMES, RewardWeights, score_rewrites_, stream
from tests.ops.reward_cases import assert_same, make_case, score

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

WEIGHTS = {
    "mean": RewardWeights(),
    "softmax": RewardWeights(negative="softmax", rank_reward="1/rank"),
    "max": RewardWeights(negative="max", rank_reward="hit", hit_k=10, normalize_std=False),
    "ume_r1": RewardWeights.ume_r1(5),
}


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("tau", [5e-324, 1e-40, 1e-6, 1e45, 1e308])
def test_softmax_of_any_temperature(tau: float, backend: str) -> None:
    """Its inverse need not be a number of fp32, or at all: it is the max, or the mean, long before."""
    weights = RewardWeights(negative="softmax", softmax_temperature=tau)
    limit = RewardWeights(negative="max" if tau < 1 else "mean")
    for n_anchors in (40, 700):
        case = make_case(2, 3, 21, n_anchors)
        assert_same(score(case, weights, backend=backend), score(case, limit, backend="reference"))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("n_items", "group_size", "width", "n_anchors"),
    [(1, 1, 1, 5), (7, 8, 33, 257), (3, 64, 96, 1023), (5, 16, 256, 5000)],
)
def test_chunked_equals_reference(
    kind: str, masked: bool, ties: bool, n_items: int, group_size: int, width: int, n_anchors: int
) -> None:
    weights = WEIGHTS[kind]
    case = make_case(n_items, group_size, width, n_anchors, positives=weights.positives, ties=ties, masked=masked)
    assert_same(score(case, weights, backend="chunked"), score(case, weights, backend="reference"))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_rests_of_panels_blocks_and_segments(kind: str) -> None:
    """Widths and counts that leave rests everywhere: 2 panels of 32 rollouts, blocks of 192 anchors, 2 segments.

    test_cpu_levels.py has it run with every instruction set.
    """
    weights = WEIGHTS[kind]
    for n_anchors, positive in ((1000, 190), (4100, 2048)):  # own groups on both sides of a block and of a segment
        case = make_case(5, 9, 37, n_anchors, positives=weights.positives, ties=True)
        case["positive"] = torch.arange(5) + positive
        assert_same(score(case, weights, backend="chunked"), score(case, weights, backend="reference"))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_bank_cast_tile_by_tile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own groups that straddle tile borders, and a last tile that is not full."""
    monkeypatch.setattr(stream, "CAST_BYTES", 7 * 4 * 24)
    weights = WEIGHTS[kind]
    case = make_case(9, 4, 24, 1000, positives=weights.positives, ties=True, dtype=torch.bfloat16)
    case["positive"] = torch.arange(9) * 7 + 3
    assert_same(score(case, weights, backend="chunked"), score(case, weights, backend="reference"))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_small_bank_of_many_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to EXACT_ANCHORS: fp64 products, here a few columns at a time."""
    monkeypatch.setitem(stream.BUFFER_BYTES, "cpu", 1)
    monkeypatch.setattr(stream, "MIN_COLUMNS", 7)
    weights = WEIGHTS[kind]
    case = make_case(9, 4, 24, 250, positives=weights.positives, ties=True)
    case["positive"] = torch.arange(9) * 7 + 3
    assert_same(score(case, weights, backend="chunked"), score(case, weights, backend="reference"))


@pytest.mark.parametrize("shape", [(1, 3, 24), (9, 4, 7), (40, 1, 130)])
@pytest.mark.parametrize("anchors", [257, 535, 1029, 1621])
def test_parts_of_a_bank_and_what_is_left_of_them(shape: tuple[int, int, int], anchors: int) -> None:
    """Every size of a scan's last steps, in one part of the bank and in several; a norm that is known changes nothing,
    however long the anchors are."""
    n_items, group, width = shape
    case = make_case(n_items, group, width, anchors, ties=True)
    case["anchors"][3] *= 50
    for kind in ("mean", "max", "softmax"):
        found = score(case, WEIGHTS[kind], backend="chunked")
        assert_same(found, score(case, WEIGHTS[kind], backend="reference"))
        norm = case["anchors"].norm(dim=1).amax(0, keepdim=True)
        again = score(case | {"largest_norm": norm}, WEIGHTS[kind], backend="chunked")
        assert all(torch.equal(found[name], again[name]) for name in found)


def test_similarities_near_the_largest_number_have_a_finite_mean() -> None:
    case = make_case(2, 3, 8, 600)
    direction = torch.eye(8)[0]
    case["gen"][:], case["anchors"][:] = 1e19 * direction, 1.5e19 * direction
    found = score(case, WEIGHTS["mean"], backend="chunked")
    torch.testing.assert_close(found["negative"], torch.full((2, 3), 1.5e38))


def test_a_large_bank() -> None:
    case = make_case(2, 4, 16, 100_000, masked=False)
    case["positive"] = torch.tensor([0, 99_999])
    assert_same(score(case, backend="chunked"), score(case, backend="reference"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_banks_and_groups(kind: str, dtype: torch.dtype) -> None:
    weights = WEIGHTS[kind]
    for group_size, n_anchors in ((1, 100_000), (64, 30_000), (8, 99_999)):
        case = make_case(8, group_size, 128, n_anchors, positives=weights.positives, ties=True, dtype=dtype)
        assert_same(score(case, weights, backend="chunked"), score(case, weights, backend="reference"))


@settings(max_examples=60, deadline=None)
@given(
    n_items=st.integers(1, 4),
    group_size=st.integers(1, 9),
    width=st.integers(1, 40),
    n_anchors=st.integers(5, 700),
    kind=st.sampled_from(sorted(WEIGHTS)),
    ties=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    n_items: int, group_size: int, width: int, n_anchors: int, kind: str, ties: bool, masked: bool, seed: int
) -> None:
    weights = WEIGHTS[kind]
    case = make_case(
        n_items, group_size, width, n_anchors, positives=weights.positives, ties=ties, masked=masked, seed=seed
    )
    assert_same(score(case, weights, backend="chunked"), score(case, weights, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_collapsed_bank_is_still_ranked_exactly(dtype: torch.dtype) -> None:
    """Every anchor within a few fp32 steps of the positive: nothing is clear from the product alone."""
    case = make_case(3, 4, 64, 600, dtype=dtype)
    centre = case["anchors"][0].float()
    case["anchors"] = (centre + 1e-7 * torch.randn(600, 64)).to(dtype)
    case["gen"] = F.normalize(centre + 1e-3 * torch.randn(3, 4, 64), dim=-1).to(dtype)
    # With equal anchors the product's rounding (3e-8) is the same in all of them and stays in the mean.
    for weights, tolerance in ((RewardWeights(), 1e-5), (RewardWeights(negative="max"), 1e-6)):
        got = score(case, weights, backend="chunked")
        assert_same(got, score(case, weights, backend="reference"), tolerance)


def test_dtypes_may_differ_and_float64_goes_to_the_reference() -> None:
    case = make_case(dtype=torch.bfloat16)
    case["gen"] = case["gen"].float() + 1e-3
    assert_same(score(case), score(case, backend="reference"))
    case = make_case(dtype=torch.float64)
    assert_same(score(case), score(case, backend="reference"), tolerance=0.0)
    with pytest.raises(ValueError, match=r"backend='chunked'.*float64"):
        score(case, backend="chunked")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.01), (torch.bfloat16, 0.1)])
def test_advantages_of_a_tight_group(kind: str, dtype: torch.dtype, bound: float) -> None:
    """In-group cosine 0.998: rewards differ by about 1e-3. Truth: the reference on the unrounded fp64 embeddings.

    What rounding the embeddings to bf16 does to an advantage is not the operator's: on the rounded ones it is exact.
    """
    random = torch.Generator().manual_seed(1)
    n_items, group_size, width = 16, 8, 256
    item = F.normalize(torch.randn(n_items, 1, width, generator=random, dtype=torch.float64), dim=-1)
    noise = F.normalize(torch.randn(n_items, group_size, width, generator=random, dtype=torch.float64), dim=-1)
    gen = F.normalize(item + 0.045 * noise, dim=-1)
    cosine = (gen @ gen.transpose(1, 2)).mean()
    assert 0.9978 < float(cosine) < 0.9985
    anchors = F.normalize(torch.randn(1024, width, generator=random, dtype=torch.float64), dim=-1)
    anchors[:n_items] = F.normalize(item[:, 0] + anchors[:n_items], dim=-1)
    case = {
        "gen": gen,
        "anchors": anchors,
        "positive": torch.arange(n_items),
        "format_ok": torch.ones(n_items, group_size, dtype=torch.bool),
    }
    truth = score(case, WEIGHTS[kind], backend="reference")["advantage"]
    rounded = case | {"gen": gen.to(dtype), "anchors": anchors.to(dtype)}
    got = score(rounded, WEIGHTS[kind], backend="chunked")["advantage"]
    assert float((got - truth).abs().mean()) <= bound
    if dtype == torch.float32:
        assert float((got - truth).abs().max()) <= bound
    exact = score(rounded | {name: rounded[name].double() for name in ("gen", "anchors")}, WEIGHTS[kind])["advantage"]
    assert float((got - exact).abs().max()) <= 1e-4
    clear = truth.abs() > 0.2
    assert bool((got.sign() == truth.sign())[clear].all())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_missing_embeddings_get_the_format_failed_reward(backend: str) -> None:
    case = make_case(4, 3, 16, 300)
    clean = score(case, backend=backend)
    case["gen"][0, 1, 5] = torch.nan
    case["gen"][2, 0, 0] = torch.inf
    case["anchors"][case["positive"][3]] = torch.nan
    got = score(case, backend=backend)
    missing = torch.zeros(4, 3, dtype=torch.bool)
    missing[0, 1] = missing[2, 0] = True
    missing[3] = True
    assert torch.equal(got["nan"].bool(), missing)
    assert torch.equal(got["reward"][missing], clean["length"][missing])
    for name in ("format", "score", "refine", "rank", "hit", "positive", "negative"):
        assert not got[name][missing].any()
    assert bool(torch.stack(list(got.values())).isfinite().all())
    # Item 1 sees the lost anchor only as one negative fewer.
    assert not bool(missing[1].any())
    torch.testing.assert_close(got["positive"][1], clean["positive"][1])
    assert_same(got, score(case, backend="reference"))


def test_an_infinite_anchor_is_nobodys_negative() -> None:
    case = make_case(3, 4, 16, 300, masked=False)
    case["positive"] = torch.tensor([10, 11, 12])
    want = score(case | {"anchors": case["anchors"][:299]}, backend="chunked")
    for lost in (torch.inf, torch.nan):
        case["anchors"][299] = lost
        assert_same(score(case, backend="chunked"), want)
        assert_same(score(case, backend="reference"), want)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_without_negatives(backend: str, kind: str) -> None:
    case = make_case(3, 2, 8, 300, positives=5)
    case["negatives_mask"] = torch.zeros(3, 300, dtype=torch.bool)
    got = score(case, WEIGHTS[kind], backend=backend)
    assert not got["negative"].any()
    assert bool((got["rank"] == 1).all())
    assert bool((got["hit"] == 1).all())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_group_of_one_has_no_advantage(backend: str) -> None:
    got = score(make_case(5, 1), backend=backend)
    assert not got["advantage"].any()
    assert not got["group_std"].any()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equal_rollouts_have_no_advantage(backend: str) -> None:
    case = make_case(5, 4)
    case["gen"] = case["gen"][:, :1].expand(-1, 4, -1)
    case["format_ok"] = case["format_ok"][:, :1].expand(-1, 4)
    case["lengths"] = case["lengths"][:, :1].expand(-1, 4)
    got = score(case, backend=backend)
    assert float(got["advantage"].abs().max()) < 1e-9


def test_writes_into_views_of_a_buffer() -> None:
    case = make_case(3, 4)
    want = score(case)
    buffer = torch.full((3, 9, 4), 7.0)
    score_rewrites_(buffer[:, 2], buffer[:, 5], terms={"rank": buffer[:, 8]}, **case)
    assert torch.equal(buffer[:, 2], want["reward"])
    assert torch.equal(buffer[:, 5], want["advantage"])
    assert torch.equal(buffer[:, 8], want["rank"])
    assert bool((buffer[:, [0, 1, 3, 4, 6, 7]] == 7.0).all())


def test_strided_inputs() -> None:
    case = make_case(4, 4, 32, 400)
    want = score(case)
    wide = torch.zeros(4, 4, 64)
    wide[:, :, ::2] = case["gen"]
    strided = case | {
        "gen": wide[:, :, ::2],
        "anchors": case["anchors"].T.contiguous().T,
        "negatives_mask": case["negatives_mask"].T.contiguous().T,
        "format_ok": case["format_ok"].T.contiguous().T,
    }
    assert_same(score(strided), want)


def test_the_same_bits_again_and_with_more_threads() -> None:
    case = make_case(32, 8, 64, 9000)  # 2 x 3 tasks
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            runs.append(score(case, RewardWeights(negative="softmax")))
    finally:
        torch.set_num_threads(before)
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name])
        assert torch.equal(value, runs[2][name])


def test_users_precision_setting_does_not_reach_the_product() -> None:
    case = make_case(4, 8, 256, 2000)
    want = score(case, backend="chunked")
    try:
        torch.set_float32_matmul_precision("medium")
        got = score(case, backend="chunked")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_keeps_no_similarity_matrix() -> None:
    """512 x 40,000 similarities are 78 MiB; what a call takes beyond its inputs stays below a tenth of that."""
    case = make_case(32, 16, 8, 40_000, masked=False)
    score(case, backend="chunked")
    taken = peak_memory(lambda: score(case, backend="chunked"))
    if taken < 0:
        pytest.skip("this kernel reports no peak memory")
    assert taken < 8 << 20


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_opcheck(backend: str) -> None:
    case = make_case(3, 2, 8, 300)
    torch.library.opcheck(
        torch.ops.rime_fast.score_rewrites_.default,
        (
            torch.zeros(3, 2),
            torch.zeros(3, 2),
            [torch.zeros(3, 2), torch.zeros(3, 2)],
            [4, 6],
            case["gen"],
            case["anchors"],
            case["positive"],
            case["format_ok"],
            case["lengths"],
            None,
            case["negatives_mask"],
            None,
            RewardWeights().encode(),
            "",
            backend,
            True,
        ),
    )


def test_compiles_into_one_graph_and_writes_views() -> None:
    case = make_case(3, 4)

    def step(buffer: torch.Tensor, rank: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
        score_rewrites_(buffer[0], buffer[1], terms={"rank": rank}, **(case | {"gen": gen * 1.0}))
        return buffer * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    rank = torch.zeros(3, 4)
    assert torch.equal(compiled(got, rank, case["gen"]), step(want, rank.clone(), case["gen"]))
    assert torch.equal(got, want)
    assert bool((rank >= 1).all())


def test_never_reads_a_tensor_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the CPU's check of ``positive``, which a GPU does not make."""
    from rime_fast.ops.reward import op

    monkeypatch.setattr(op, "require_range", lambda *_: None)
    case = make_case()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a host read")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    buffers = {name: torch.empty(6, 4) for name in TERM_NAMES}
    score_rewrites_(torch.empty(6, 4), torch.empty(6, 4), terms=buffers, backend="chunked", **case)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gen": torch.zeros(6, 4)}, ValueError, r"gen: expected shape \[B, G, D\], got a float32 tensor"),
        ({"gen": torch.zeros(6, 4, 32, dtype=torch.int64)}, TypeError, "gen: expected dtype"),
        ({"gen": torch.zeros(0, 4, 32)}, ValueError, "gen: expected at least one"),
        ({"anchors": torch.zeros(9, 31)}, ValueError, r"anchors: expected shape \[A, 32\]"),
        ({"anchors": torch.zeros(0, 32)}, ValueError, "anchors: expected at least one"),
        ({"anchors": [1.0]}, TypeError, "anchors: expected a tensor, got list"),
        ({"positive": torch.zeros(5, dtype=torch.int64)}, ValueError, r"positive: expected shape \[6\]"),
        ({"positive": torch.zeros(6, dtype=torch.int32)}, TypeError, "positive: expected dtype int64"),
        ({"positive": torch.full((6,), 400)}, ValueError, r"positive: expected values in \[0, 400\), got 400"),
        ({"positive": torch.full((6,), -1)}, ValueError, "positive: .* got -1 at position 0"),
        ({"format_ok": torch.zeros(6, 4)}, TypeError, "format_ok: expected dtype bool"),
        ({"lengths": torch.zeros(6, 3)}, ValueError, "lengths: expected shape"),
        ({"disc_similarity": torch.zeros(5)}, ValueError, "disc_similarity: expected shape"),
        ({"negatives_mask": torch.ones(6, 399, dtype=torch.bool)}, ValueError, "negatives_mask: expected shape"),
        ({"negatives_mask": torch.ones(6, 400)}, TypeError, "negatives_mask: expected dtype bool"),
        ({"largest_norm": torch.ones(2)}, ValueError, r"largest_norm: expected shape \[1\]"),
        ({"terms": {"ranks": torch.zeros(6, 4)}}, ValueError, "terms: unknown term 'ranks'"),
        ({"terms": {"rank": torch.zeros(6, 3)}}, ValueError, r"terms\['rank'\]: expected shape"),
        ({"weights": {"w_fmt": 1.0}}, TypeError, "weights: expected RewardWeights, got dict"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run here"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score_rewrites_(torch.zeros(6, 4), torch.zeros(6, 4), **(make_case() | change))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_default_dtype_changes_nothing(backend: str, default: torch.dtype) -> None:
    case = make_case(n_anchors=700)
    expected = score(case, WEIGHTS["ume_r1"], backend=backend)
    torch.set_default_dtype(default)
    try:
        found = score(case, WEIGHTS["ume_r1"], backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_length_below_the_limit_adds_nothing(backend: str) -> None:
    case = make_case()
    lengths = torch.full((6, 4), -torch.inf)
    assert torch.equal(score(case | {"lengths": lengths}, backend=backend)["length"], torch.zeros(6, 4))


def test_bad_outputs_are_named() -> None:
    case = make_case()
    with pytest.raises(TypeError, match="rewards: expected dtype float32"):
        score_rewrites_(torch.zeros(6, 4, dtype=torch.float64), torch.zeros(6, 4), **case)
    with pytest.raises(ValueError, match="advantages: expected shape"):
        score_rewrites_(torch.zeros(6, 4), torch.zeros(6, 5), **case)
    same = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="same memory as rewards"):
        score_rewrites_(same, same, **case)


def test_outputs_in_one_memory_are_refused_where_they_meet() -> None:
    case = make_case()
    buffer = torch.zeros(6, 8)
    for rewards, advantages in ((buffer[:, :4], buffer[:, 3:7]), (buffer.view(12, 4)[:6], buffer[:, :4])):
        with pytest.raises(
            ValueError, match="advantages: expected a buffer of its own, got the same memory as rewards"
        ):
            score_rewrites_(rewards, advantages, **case)
    with pytest.raises(ValueError, match=r"terms\['rank'\]: .* the same memory as rewards"):
        score_rewrites_(buffer[:, :4], buffer[:, 4:], terms={"rank": buffer[:, 2:6]}, **case)
    overlapping = np.zeros(7 * 4, np.float32)  # two storages over one memory
    first, second = (torch.from_numpy(part).view(6, 4) for part in (overlapping[:24], overlapping[4:]))
    with pytest.raises(ValueError, match="advantages: expected a buffer of its own"):
        score_rewrites_(first, second, **case)
    traced = torch.compile(score_rewrites_, backend="eager")
    # An error inside of a compiled no_grad leaves gradients off: set_grad_enabled puts them back.
    with torch.set_grad_enabled(True), pytest.raises(ValueError, match="advantages: expected a buffer of its own"):
        traced(buffer[:, :4], buffer[:, 1:5], **case)
    with pytest.raises(ValueError, match="rewards: expected memory for each element"):
        score_rewrites_(torch.zeros(6, 1).expand(6, 4), torch.zeros(6, 4), **case)
    want = score(case)
    for rewards, advantages in ((buffer[:, :4], buffer[:, 4:]), (buffer[:, ::2], buffer[:, 1::2])):
        score_rewrites_(rewards, advantages, **case)
        assert torch.equal(rewards, want["reward"])
        assert torch.equal(advantages, want["advantage"])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.bfloat16)])
def test_products_of_parts_have_fp32_precision(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rows, anchors = torch.randn(40, 300).to(dtypes[0]), torch.randn(50, 300).to(dtypes[1])
    parts = [stream.split(x.float(), stream.parts_of(x.dtype)) for x in (rows, anchors)]
    for x, found in zip((rows, anchors), parts, strict=True):
        assert torch.equal(sum(part.double() for part in found), x.double())
    found = torch.full((40, 50), torch.nan)
    stream.multiply(*parts, found)
    exact = rows.double() @ anchors.double().T
    bound = (
        stream.PARTS_BAND * (300 + 16) * 2.0**-24 * rows.double().norm(dim=1)[:, None] * anchors.double().norm(dim=1)
    )
    assert bool(((found - exact).abs() < bound / 8).all())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("n_anchors", [100, 700])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_argument_may_be_a_view(kind: str, n_anchors: int, backend: str) -> None:
    """Each second row of something larger, whose other rows would be another result."""
    weights = WEIGHTS[kind]
    case = make_case(5, 3, 20, n_anchors, positives=weights.positives, ties=True)
    views = {name: torch.stack([x, torch.ones_like(x)], dim=1).flatten(0, 1)[::2] for name, x in case.items()}
    assert not any(view.is_contiguous() for view in views.values())
    assert_same(score(views, weights, backend=backend), score(case, weights, backend=backend))
