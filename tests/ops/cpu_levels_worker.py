"""One process of test_cpu_levels.py: csrc's CPU kernels with the instruction set that RIME_FAST_CPU names.

Every operator meets the rule against fp64 with 1, 2 and 4 threads, and the kernels by themselves give the same bits.
Prints the level and what a fixed input gave, as JSON.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import torch
from torch import Tensor

from rime_fast.ops import native
from rime_fast.ops.reward import RewardWeights
from tests.ops import contrastive_cases, logprob_cases, reward_cases

THREADS = (1, 2, 4)


def check_operators() -> None:
    """Small cases with rests everywhere, through the public functions."""
    for options in ({"temperature": 0.05}, {"temperature": 0.004, "ids": True, "margin": 0.1, "shuffled": True}):
        whole = contrastive_cases.make_case(67, 333, 33, **options)
        for case in (whole, replace(whole, settings={**whole.settings, "dims": [5, 16, 33]})):
            found, eager = (contrastive_cases.run(case, torch.float32, name) for name in ("chunked", "reference"))
            contrastive_cases.check_rule(
                found, eager, contrastive_cases.run(case, torch.float64, "reference"), torch.float32
            )
    for case in (logprob_cases.Case(vocabulary=1531), logprob_cases.Case(softcap=5.0, spread=30.0)):
        logprob_cases.assert_close_to_truth(case, case.run("chunked"))
    for weights in (RewardWeights(), RewardWeights(negative="softmax"), RewardWeights(negative="max")):
        case = reward_cases.make_case(5, 9, 37, 1000, ties=True)
        found, truth = (reward_cases.score(case, weights, backend=name) for name in ("chunked", "reference"))
        reward_cases.assert_same(found, truth)


def tile_results(scale: float, bounded: bool) -> list[Tensor]:
    """Statistics and gradient of a tile of 37 x 533 similarities, one of them a NaN with every bit set."""
    rows, columns, generator = 37, 533, torch.Generator().manual_seed(0)
    tile = torch.rand(rows, columns, generator=generator) * 2 - 1
    tile[3].view(torch.int32)[7] = -1
    labels = torch.randint(8, columns, (rows, 1), generator=generator)
    start = 0.0 if bounded else -torch.inf
    row_max, col_max, rival = torch.full((rows,), start), torch.full((columns,), start), torch.full((rows,), -torch.inf)
    row_sum, col_sum = torch.zeros(rows).double(), torch.zeros(columns).double()
    positive, flag = torch.empty(rows, 1), torch.tensor([int(bounded)], dtype=torch.int32)
    common = (torch.tensor(scale), 0, 0, labels, None, None, None, None, flag)
    torch.ops.rime_fast_C.contrast_statistics(
        tile.clone(), *common, row_max, row_sum, col_max, col_sum, positive, rival, None
    )
    logits = (tile * scale).double().scatter(1, labels, -torch.inf)
    for found, dim in ((row_max + row_sum.log(), 1), (col_max + col_sum.log(), 0)):
        torch.testing.assert_close(found, logits.logsumexp(dim), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert row_sum.isnan().nonzero().tolist() == [[3]]
    assert col_sum.isnan().nonzero().tolist() == [[7]]
    shifts = [torch.full((size,), 0.0 if bounded else 250.0) for size in (rows, columns)]
    coefs = [torch.rand(size, generator=generator) for size in (rows, columns)]
    slopes = (shifts[0], coefs[0], shifts[1], coefs[1], torch.zeros(rows, 1), torch.tensor(0.5))
    gradient = tile.clone()
    torch.ops.rime_fast_C.contrast_gradient(gradient, *common, *slopes, gradient)
    exact = (logits - shifts[0][0]).exp() * (coefs[0][:, None].double() + coefs[1].double()) / 2
    torch.testing.assert_close(gradient.double(), exact, rtol=3e-5, atol=1e-30, equal_nan=True)
    return [row_max, row_sum, col_max, col_sum, positive, rival, gradient]


def row_results(softcap: float | None) -> list[Tensor]:
    """Statistics and gradient of 5 rows of 2,083 logits, one of which is a NaN with every bit set."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(5, 2083, generator=generator)
    logits[3].view(torch.int32)[7] = -1
    targets = torch.tensor([-1, 0, 2082, 5, 77])
    cap = None if softcap is None else torch.tensor(softcap)
    common = (targets, torch.randn(2083, generator=generator), torch.tensor(0.7), cap)
    lse, hit, entropy, products = torch.empty(2, 5), torch.empty(5), torch.empty(5), torch.empty(5)
    torch.ops.rime_fast_C.row_softmax_forward(logits, *common, lse, hit, entropy)
    z = logits.double() + common[1]
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / common[2].double()
    log_p = z.log_softmax(1)
    torch.testing.assert_close(lse.double().sum(0), z.logsumexp(1), rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=2e-5, atol=2e-6, equal_nan=True)
    g, h = torch.rand(2, 5, generator=generator)
    gradient = logits.clone()
    torch.ops.rime_fast_C.row_softmax_backward(gradient, *common, lse, hit, entropy, g, h, gradient, products)
    dz = -log_p.exp() * (g.double()[:, None] + h.double()[:, None] * (log_p + entropy.double()[:, None]))
    dz[range(1, 5), targets[1:]] += g[1:]
    slope = 1.0 if softcap is None else 1 - (z * common[2].double() / softcap) ** 2
    exact = dz * slope / common[2].double()
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6, equal_nan=True)
    return [lse, hit, entropy, gradient, products]


def kernels(case: reward_cases.Case) -> list[Tensor]:
    found = tile_results(50.0, True) + tile_results(300.0, False) + row_results(None) + row_results(6.0)
    for negative in ("mean", "softmax", "max"):
        found += reward_cases.score(case, RewardWeights(negative=negative), backend="chunked").values()
    return found


def main() -> None:
    case = reward_cases.make_case(5, 9, 37, 4100, ties=True)  # once: torch's indexing depends on the threads
    marks = set()
    for threads in THREADS:
        torch.set_num_threads(threads)
        check_operators()
        digest = hashlib.sha256()
        for tensor in kernels(case):
            digest.update(tensor.contiguous().numpy().tobytes())
        marks.add(digest.hexdigest())
    assert len(marks) == 1, "bits depend on the number of threads"
    print(json.dumps({"level": native.cpu_level(), "bits": marks.pop()}))


if __name__ == "__main__":
    main()
