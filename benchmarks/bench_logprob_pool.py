"""Operator A: loss and all gradients of the head, against the bare GEMMs on the scored rows and against the peers.

The floor is three library products on the M scored rows, logits, dX and dW (6MHV FLOP); "ours_forward" is
fused_linear_ce (6MHV), "ours_recompute" fused_logprob_pool with a gradient for every token (8MHV: 1.33 x the floor's
FLOP). Peers: eager torch with full logits, F.linear_cross_entropy with its chunks, TRL's chunked log-probs, Liger's
fused linear cross-entropy, cut-cross-entropy, torch.compile of the eager form. Errors: relative, of the head's
gradient, against fp64. Data: random logits and peaked ones (the target leads by about 10).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from torch import Tensor

from rime_fast.ops.logprob_pool import fused_linear_ce, fused_logprob_pool


@dataclass(frozen=True)
class Shape:
    """T tokens of which ``ignored`` are not scored, width H, vocabulary V."""

    T: int
    H: int
    V: int
    ignored: float
    peaked: bool = False
    head: bool = True  # the head is trained

    def __str__(self) -> str:
        tail = ("-peaked" if self.peaked else "") + ("" if self.head else "-frozen")
        return f"T{self.T}-H{self.H}-V{self.V}-ign{int(100 * self.ignored)}{tail}"


SHAPES = {
    "tiny": [Shape(32, 16, 200, 0.5)],
    "cpu": [
        Shape(1024, 256, 32_000, 0.9), Shape(1024, 256, 32_000, 0.0), Shape(1024, 256, 32_000, 0.9, peaked=True),
        Shape(1024, 256, 32_000, 0.9, head=False), Shape(512, 256, 151_936, 0.9),
    ],
    "cuda": [
        Shape(8192, H, V, ignored)
        for H, V in ((1536, 151_936), (2048, 151_936), (3584, 151_936), (4096, 151_936), (4096, 248_320))
        for ignored in (0.0, 0.9)
    ] + [Shape(16_384, 4096, 151_936, 0.0), Shape(8192, 4096, 151_936, 0.0, peaked=True),
         Shape(8192, 4096, 151_936, 0.9, head=False)],
}  # fmt: skip


class Inputs:
    """Leaves and targets of one shape; ``step`` runs one forward and backward of a loss."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(shape.T, shape.H, generator=random)
        lm_head = torch.randn(shape.V, shape.H, generator=random) / shape.H**0.5
        self.targets = torch.randint(0, shape.V, (shape.T,), generator=random)
        if shape.peaked:
            hidden += 10 * lm_head[self.targets] / lm_head[self.targets].norm(dim=1, keepdim=True)
        self.targets[torch.rand(shape.T, generator=random) < shape.ignored] = -100
        self.targets = self.targets.to(device)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.lm_head = lm_head.to(device, dtype).requires_grad_(shape.head)
        self.rows = self.hidden.detach()[self.targets != -100]

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.lm_head) if t.requires_grad]

    def step(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(loss(self.hidden, self.lm_head, self.targets), self.leaves())


def floor(inputs: Inputs) -> Callable[[], object]:
    """Logits, dX, dW of the scored rows by the library, and nothing else."""
    head = inputs.lm_head.detach()

    def call() -> object:
        logits = torch.mm(inputs.rows, head.t())
        dx = torch.mm(logits, head)
        return dx, torch.mm(logits.t(), inputs.rows) if inputs.lm_head.requires_grad else None

    return call


def eager(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, lm_head).float(), targets, reduction="sum")


def torch_chunked(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, lm_head, targets, reduction="sum", options=options)


def ours_forward(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    return fused_linear_ce(hidden, lm_head, targets)[0]


def ours_recompute(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    return -fused_logprob_pool(hidden, lm_head, targets).logp.sum()


def trl_chunked(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    scored = targets != -100
    logp = ChunkedLogProbFunction.apply(hidden, lm_head, None, targets.clamp_min(0), 1.0, 8192, None, 1.0, ())[0]
    return -(logp * scored).sum()


def liger(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    if not hidden.is_cuda:
        raise RuntimeError("Liger's kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(lm_head, hidden, targets)


def cut_cross_entropy(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    if not hidden.is_cuda:
        raise RuntimeError("cut-cross-entropy's kernels need a GPU")
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, lm_head, targets, reduction="sum", filter_eps=None)


def peers(inputs: Inputs, tiny: bool) -> dict[str, Callable[[], object]]:
    """Every implementation at one shape. torch.compile takes minutes on a CPU and is left to the GPU run."""
    losses = {
        "ours_forward": ours_forward, "ours_recompute": ours_recompute, "eager": eager,
        "F.linear_cross_entropy": torch_chunked, "trl_chunked": trl_chunked, "liger": liger, "cce": cut_cross_entropy,
    }  # fmt: skip
    if inputs.hidden.is_cuda and not tiny:
        losses["compile"] = torch.compile(eager)
    return {"floor": floor(inputs)} | {name: inputs.step(loss) for name, loss in losses.items()}


def errors(inputs: Inputs, impls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Relative error of the last leaf's gradient against eager torch in fp64, of whoever runs here."""
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in (inputs.hidden, inputs.lm_head)]
    truth = torch.autograd.grad(
        F.cross_entropy(leaves[0] @ leaves[1].t(), inputs.targets, reduction="sum"),
        [t for t in leaves if t.requires_grad],
    )[-1]
    found = {}
    for name, call in impls.items():
        if name == "floor":
            continue
        try:
            grad = call()[-1]
        except (RuntimeError, ImportError):
            continue  # compare() says why
        found[name] = float((grad.double() - truth).norm() / truth.norm())
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    sizes = SHAPES["tiny" if config.getoption("--rime-tiny") else config.getoption("--rime-device")]
    metafunc.parametrize("shape", sizes, ids=str)


def test_head(shape: Shape, results, device: str, tiny: bool) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = Inputs(shape, device, dtype)
    impls = peers(inputs, tiny)
    scored = inputs.rows.shape[0]
    exact = shape.T * shape.V <= 1 << 25
    known = errors(inputs, impls) if exact else {}
    assert all(error < (1e-4 if dtype == torch.float32 else 2e-2) for name, error in known.items() if "ours" in name)
    found = compare(
        "logprob_pool", str(shape), impls, device=device, results=results, rounds=1 if tiny else 5, errors=known,
        shape={"T": shape.T, "M": scored, "H": shape.H, "V": shape.V, "dtype": str(dtype).removeprefix("torch.")},
        flops=(6.0 if shape.head else 4.0) * scored * shape.H * shape.V,
    )  # fmt: skip
    assert found["ours_forward"].ratio_to_floor is not None
