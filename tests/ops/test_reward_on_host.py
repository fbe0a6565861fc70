"""The CUDA kernels of the reward without a GPU: compiled for the host and run thread by thread, against the reference.

``tests/testing/cuda_on_host.h`` runs a block's threads as fibers in random order, so that barriers, warp exchanges and
shared memory mean what they mean on a GPU; a barrier that some thread never reaches ends the process.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rime_fast.ops.reward import RewardWeights, stream
from rime_fast.ops.reward.weights import PLANES, RANK_REWARDS
from tests.ops.reward_cases import Case, assert_same, make_case, score
from tests.testing.on_host import CXX, build

HERE = Path(__file__).parent
ADDRESS = "RIME_TEST_ADDRESS"  # in the environment: kernels are built with AddressSanitizer, whose library is loaded
WEIGHTS = {
    "mean": RewardWeights(),
    "softmax": RewardWeights(negative="softmax", rank_reward="1/rank"),
    "max": RewardWeights(negative="max", rank_reward="hit", hit_k=10, normalize_std=False),
    "ume_r1": RewardWeights.ume_r1(5),
}
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if CXX is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("kernels") / "kernels.so"
    build(HERE / "reward_on_host.cpp", out, "-fPIC", "-shared", sanitize="address" if ADDRESS in os.environ else "")
    return ctypes.CDLL(str(out))


def c(value: Any) -> Any:
    """An argument for ctypes: tensors by address."""
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return value


def call(function: Any, *arguments: Any, longs: tuple[int, ...] = ()) -> None:
    """Integers are int, those at the places ``longs`` int64."""
    function.restype = None
    function(*(ctypes.c_int64(a) if i in longs else c(a) for i, a in enumerate(arguments)))


def spec(weights: RewardWeights) -> tuple[Tensor, int, int]:
    numbers = [weights.w_fmt, weights.w_rank, weights.w_refine, weights.w_len, weights.length_limit, weights.eps]
    code = len(RANK_REWARDS) if weights.mode == "ume_r1" else RANK_REWARDS.index(weights.rank_reward)
    return torch.tensor(numbers, dtype=torch.float64), code, weights.negative_code


class OnHost:
    """The streaming kernels as an engine of ``chunked``."""

    ALIGN = 4

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self.kernels = kernels

    def reads(self, rows: Tensor, anchors: Tensor) -> bool:
        return True

    def begin(
        self, rows: Tensor, anchors: Tensor, positive: Tensor, weights: RewardWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, positives = rows.shape[0], weights.positives
        own, norms = torch.full((n, positives), torch.inf, dtype=torch.float64), torch.full((n,), torch.inf)
        state = torch.full((n, 4 + positives), torch.inf, dtype=torch.float64)
        sizes = n, n // len(positive), positives, *anchors.shape, weights.negative_code
        kinds = KINDS[rows.dtype], KINDS[anchors.dtype]
        given = rows, kinds[0], anchors.contiguous(), kinds[1], positive
        call(self.kernels.begin, *given, own, norms, state, *sizes, longs=(8, 9, 10, 11, 12))
        return own, norms, state

    def add_tile(
        self,
        sims: Tensor,
        rows: Tensor,
        tile: Tensor,
        tile_norm: Tensor,
        norms: Tensor,
        own: Tensor,
        positive: Tensor,
        mask: Tensor | None,
        first: int,
        weights: RewardWeights,
        slack: float,
        state: Tensor,
    ) -> None:
        assert sims.stride(0) % 4 == 0
        call(
            self.kernels.tile,
            sims,
            sims.dtype == torch.float64,
            rows,
            KINDS[rows.dtype],
            tile,
            KINDS[tile.dtype],
            tile_norm,
            norms,
            own,
            positive,
            mask,
            state,
            rows.shape[0],
            sims.shape[1],
            sims.stride(0),
            rows.shape[1],
            rows.shape[0] // len(positive),
            weights.positives,
            first,
            0 if mask is None else mask.stride(0),
            weights.negative_code,
            weights.tau,
            slack,
            longs=tuple(range(12, 20)),
        )

    def merge(self, parts: Tensor, state: Tensor, weights: RewardWeights) -> None:
        call(
            self.kernels.merge,
            parts,
            state,
            *parts.shape,
            weights.negative_code,
            weights.tau,
            longs=(2, 3, 4),
        )

    def finish(
        self,
        state: Tensor,
        own: Tensor,
        format_ok: Tensor,
        lengths: Tensor | None,
        disc_similarity: Tensor | None,
        weights: RewardWeights,
        rewards: Tensor,
        advantages: Tensor,
    ) -> Tensor:
        out = torch.full((12, *format_ok.shape), torch.nan)
        numbers, code, negative = spec(weights)
        disc = None if disc_similarity is None else disc_similarity.expand_as(format_ok).contiguous()
        call(
            self.kernels.finish,
            state,
            own,
            format_ok,
            lengths,
            disc,
            out,
            rewards,
            advantages,
            rewards.stride(0),
            *format_ok.shape,
            weights.positives,
            numbers,
            code,
            negative,
            weights.hit_k,
            weights.normalize_std,
            longs=(8, 9, 10, 11, 15),
        )
        return out


def streamed(kernels: ctypes.CDLL, case: Case, weights: RewardWeights) -> dict[str, Tensor]:
    """Into every second row of wider buffers, too."""
    disc, shape = case["disc_similarity"][:, None], case["gen"].shape[:2]
    buffers = torch.full((2, shape[0], 2, shape[1]), torch.nan)
    into = {"rewards": buffers[0, :, 0], "advantages": buffers[1, :, 0]}
    planes = stream.score(OnHost(kernels), **(case | {"disc_similarity": disc}), weights=weights, **into)
    assert torch.equal(buffers[:, :, 0].nan_to_num(7.0), planes[:2].nan_to_num(7.0))
    assert bool(buffers[:, :, 1].isnan().all())
    return dict(zip(PLANES, planes, strict=True))


def in_one_launch(kernels: ctypes.CDLL, case: Case, weights: RewardWeights) -> dict[str, Tensor]:
    """The small kernel, writing into every second row of wider buffers."""
    gen, anchors, mask = case["gen"], case["anchors"], case["negatives_mask"]
    shape = gen.shape[:2]
    buffers = torch.full((2, shape[0], 2, shape[1]), torch.nan)
    terms = torch.full((12, *shape), torch.nan)
    numbers, code, negative = spec(weights)
    disc = case["disc_similarity"][:, None].expand(shape).contiguous()
    call(
        kernels.small,
        gen,
        KINDS[gen.dtype],
        anchors,
        KINDS[anchors.dtype],
        case["positive"],
        mask,
        0 if mask is None else mask.stride(0),
        case["format_ok"],
        case["lengths"],
        disc,
        buffers[0],
        buffers[1],
        2 * shape[1],
        terms,
        *shape,
        anchors.shape[0],
        gen.shape[2],
        weights.positives,
        weights.tau,
        numbers,
        code,
        negative,
        weights.hit_k,
        weights.normalize_std,
        longs=(6, 12, 14, 15, 16, 17, 18, 23),
    )
    assert bool(buffers[:, :, 1].isnan().all())
    found = dict(zip(PLANES, terms, strict=True))
    for name, buffer in zip(("reward", "advantage"), buffers, strict=True):
        assert torch.equal(buffer[:, 0], found[name])
    return found


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("n_anchors", "masked"), [(4101, True), (303, True), (300, False), (40, True)])
def test_streaming_kernels(kernels: ctypes.CDLL, kind: str, n_anchors: int, masked: bool, dtype: torch.dtype) -> None:
    """300 anchors: fp32 products and the second look; 40: fp64 products; 4,101: a block's second step."""
    weights = WEIGHTS[kind]
    case = make_case(2, 3, 21, n_anchors, positives=weights.positives, ties=True, masked=masked, dtype=dtype)
    case["gen"][1, 2, 3] = torch.nan
    assert_same(streamed(kernels, case, weights), score(case, weights, backend="reference"))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_streaming_kernels_over_tiles(kernels: ctypes.CDLL, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own groups on both sides of a tile's border, and tiles that are not full."""
    monkeypatch.setitem(stream.BUFFER_BYTES, "cpu", 1)
    weights = WEIGHTS[kind]
    case = make_case(2, 3, 21, 530, positives=weights.positives, ties=True)
    case["positive"] = torch.tensor([254, 510])
    assert_same(streamed(kernels, case, weights), score(case, weights, backend="reference"))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("masked", [True, False])
def test_whole_steps_of_a_block(kernels: ctypes.CDLL, kind: str, masked: bool) -> None:
    """Steps without a positive, which are added at once, beside those with a positive, with a masked anchor, with one
    that is infinite, and one that is not full."""
    step, weights = 4096, WEIGHTS[kind]
    case = make_case(2, 2, 32, 6 * step + 5, positives=weights.positives, ties=True, masked=False)
    case["positive"] = torch.tensor([100, 3 * step + 7])
    case["anchors"][2 * step + 9, 0] = torch.inf
    if masked:
        case["negatives_mask"] = torch.ones(2, 6 * step + 5, dtype=torch.bool)
        case["negatives_mask"][:, step + 70] = False
    assert_same(streamed(kernels, case, weights), score(case, weights, backend="reference"))


@pytest.mark.parametrize("tau", [5e-324, 1e-40, 1e-6, 1e45, 1e308])
@pytest.mark.parametrize("n_anchors", [40, 530])
def test_softmax_of_any_temperature(
    kernels: ctypes.CDLL, tau: float, n_anchors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inverse need not be a number of fp32: it is the max, or the mean, long before; states merge too."""
    monkeypatch.setitem(stream.BUFFER_BYTES, "cpu", 1)
    weights, case = RewardWeights(negative="softmax", softmax_temperature=tau), make_case(2, 3, 21, n_anchors)
    limit = RewardWeights(negative="max" if tau < 1 else "mean")
    for found in (streamed(kernels, case, weights), in_one_launch(kernels, case, weights)):
        assert_same(found, score(case, limit, backend="reference"))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_merge_kernel(kernels: ctypes.CDLL, kind: str) -> None:
    """Three parts, one of them without a single negative for the first item."""
    weights, engine = WEIGHTS[kind], OnHost(kernels)
    case = make_case(2, 3, 16, 900, positives=weights.positives, ties=True)
    case["positive"] = torch.tensor([10, 310])
    case["negatives_mask"][0, 300:600] = False
    rows = case["gen"].flatten(0, 1)
    own, norms, _ = engine.begin(rows, case["anchors"], case["positive"], weights)
    parts = [stream.initial_state(rows, weights) for _ in range(3)]
    for first, part in zip((0, 300, 600), parts, strict=True):
        anchors, mask = (
            case["anchors"][first : first + 300],
            case["negatives_mask"][:, first : first + 300].contiguous(),
        )
        place = case["positive"] - first
        stream.scan(engine, rows, norms, own, anchors, place, mask, weights, part, exact=False)
    state = stream.initial_state(rows, weights)
    engine.merge(torch.stack(parts), state, weights)
    disc = case["disc_similarity"][:, None]
    into = torch.empty(2, *case["format_ok"].shape).unbind()
    planes = engine.finish(state, own, case["format_ok"], case["lengths"], disc, weights, *into)
    found = dict(zip(PLANES, planes, strict=True))
    assert_same(found, score(case, weights, backend="reference"))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("group_size", "n_anchors", "masked", "dtype"),
    [(3, 40, True, torch.float32), (11, 21, False, torch.bfloat16), (1, 9, True, torch.float16)],
)
def test_one_launch(
    kernels: ctypes.CDLL, kind: str, group_size: int, n_anchors: int, masked: bool, dtype: torch.dtype
) -> None:
    weights = WEIGHTS[kind]
    case = make_case(2, group_size, 37, n_anchors, positives=weights.positives, ties=True, masked=masked, dtype=dtype)
    case["gen"][1, 0, 3] = torch.nan
    assert_same(in_one_launch(kernels, case, weights), score(case, weights, backend="reference"))


def test_one_launch_outside_the_bank_and_without_negatives(kernels: ctypes.CDLL) -> None:
    case = make_case(3, 2, 8, 12)
    case["positive"] = torch.tensor([-1, 12, 4])
    case["negatives_mask"][2] = False
    found = in_one_launch(kernels, case, RewardWeights())
    assert torch.equal(found["nan"], torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
    assert not found["negative"][2].any()
    assert bool((found["rank"][2] == 1).all())
    assert bool(torch.stack(list(found.values())).isfinite().all())


def test_halves_are_read_exactly(kernels: ctypes.CDLL) -> None:
    """Every kind of fp16 number: zeros, subnormal, normal, largest; 1 x 1 similarities show them."""
    values = torch.tensor([0.0, 6e-8, 6.1e-5, -6.0e-5, 1.0, -1.5, 65504.0], dtype=torch.float16)
    case = make_case(1, len(values), 1, 1, masked=False, dtype=torch.float16)
    case["gen"], case["anchors"] = values.view(1, -1, 1), torch.ones(1, 1, dtype=torch.float16)
    found = in_one_launch(kernels, case, RewardWeights())
    assert torch.equal(found["positive"][0], values.float())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or CXX is None, reason="needs g++ and its sanitizers")
def test_under_the_address_sanitizer() -> None:
    """One case of each kernel with every access checked; Python itself must load the sanitizer's library first."""
    assert CXX is not None
    find = [CXX, "-print-file-name=libasan.so"]
    library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    names = "test_one_launch and softmax or test_streaming_kernels_over_tiles and max or test_merge_kernel and mean"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names],
        cwd=HERE.parents[1],
        env=os.environ | {ADDRESS: "1", "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
