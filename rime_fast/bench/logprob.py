"""Loss and all gradients of the language-model head, against the bare GEMMs on the scored rows and against the peers.

The floor is three library products on the M scored rows, logits, dX and dW (6MHV FLOP); "ours_forward" is
fused_linear_ce (6MHV), "ours_recompute" fused_logprob_pool with a gradient for every token (8MHV: 1.33 x the floor's
FLOP), "ours_in_chunks" the first in a workspace as large as the head, "ours_triton" it by Triton's tiles (on a GPU),
"ours_entropy" the second with the entropies' gradient. torch's own forms run beside them: full logits, torch.compile
of it (on peaked data), F.linear_cross_entropy with its chunks; benchmarks/lib/peers.py adds third-party packages.
Errors: relative, of the head's gradient (the hidden states' where the head is frozen), against fp64. Data: random
logits and peaked ones (the target leads by about 10).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.bench.harness import FLOOR, Results, Row, compare, dtype_name, fast_fp64, library_product, require_memory
from rime_fast.ops.logprob_pool import fused_linear_ce, fused_logprob_pool

EXACT, EXACT_FAST = 1 << 25, 1 << 31  # logits up to which fp64 is run for the errors; on GPUs with fast fp64
CHUNK = 1 << 27  # fp64 logits held at a time


@dataclass(frozen=True)
class Shape:
    """One head and one packed batch."""

    tokens: int = field(default=8192, metadata={"help": "Tokens of the packed batch, scored or not."})
    hidden: int = field(default=1536, metadata={"help": "Width of the hidden states."})
    vocab: int = field(default=151_936, metadata={"help": "Rows of the head."})
    ignored: float = field(default=0.9, metadata={"help": "Share of tokens that are not scored."})
    peaked: bool = field(default=False, metadata={"help": "The target's logit leads by about 10, as late in training."})
    frozen: bool = field(default=False, metadata={"help": "The head is not trained."})
    entropy: bool = field(default=False, metadata={"help": "The rows' entropies and their gradient as well."})

    def __post_init__(self) -> None:
        if min(self.tokens, self.hidden, self.vocab) < 1 or not 0 <= self.ignored < 1:
            raise ValueError("expected --tokens, --hidden, --vocab >= 1 and 0 <= --ignored < 1")

    def __str__(self) -> str:
        tail = "".join(f"-{name}" for name in ("peaked", "frozen", "entropy") if getattr(self, name))
        return f"T{self.tokens}-H{self.hidden}-V{self.vocab}-ign{round(100 * self.ignored)}{tail}"


ENTROPY = 0.01  # its weight in the objective of the shapes with entropy
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs:
    """Leaves and targets of one shape; ``step`` is one forward and backward of a loss, returning the last gradient."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        random = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(shape.tokens, shape.hidden, generator=random, device=device)
        lm_head = torch.randn(shape.vocab, shape.hidden, generator=random, device=device) / shape.hidden**0.5
        self.targets = torch.randint(0, shape.vocab, (shape.tokens,), generator=random, device=device)
        if shape.peaked:
            hidden += 10 * lm_head[self.targets] / lm_head[self.targets].norm(dim=1, keepdim=True)
        self.targets[torch.rand(shape.tokens, generator=random, device=device) < shape.ignored] = -100
        self.hidden = hidden.to(dtype).requires_grad_()
        self.lm_head = lm_head.to(dtype).requires_grad_(not shape.frozen)
        self.rows, self.entropy = self.hidden.detach()[self.targets != -100], shape.entropy

    def step(self, loss: Loss) -> Callable[[], Tensor]:
        leaves = [t for t in (self.hidden, self.lm_head) if t.requires_grad]
        return lambda: torch.autograd.grad(loss(self.hidden, self.lm_head, self.targets), leaves)[-1]

    def truth(self) -> Tensor:
        """The last leaf's gradient in fp64, some rows at a time: (softmax - one-hot) times the other factor."""
        head, trained = self.lm_head.detach().double(), self.lm_head.requires_grad
        # The entropy's part: d(-H) / dz = p (log p + H).
        grad = torch.zeros_like(head if trained else self.hidden, dtype=torch.float64)
        for rows in torch.nonzero(self.targets != -100)[:, 0].split(max(1, CHUNK // head.shape[0])):
            hidden = self.hidden.detach()[rows].double()
            log_p = (hidden @ head.t()).log_softmax(1)
            slopes = log_p.exp()
            if self.entropy:
                row_entropy = -(slopes * log_p).sum(1, keepdim=True)
                slopes = slopes * (1.0 + ENTROPY * (log_p + row_entropy))
            slopes[torch.arange(len(rows), device=rows.device), self.targets[rows]] -= 1.0
            if trained:
                grad.addmm_(slopes.t(), hidden)
            else:
                grad[rows] = slopes @ head
        return grad


def floor(inputs: Inputs) -> Callable[[], object]:
    """Make the floor of the comparison: logits, dX and dW of the scored rows by the library, and nothing else."""
    head = inputs.lm_head.detach()

    def call() -> object:
        logits = library_product(inputs.rows, head.t())
        dx = library_product(logits, head)
        return dx, library_product(logits.t(), inputs.rows) if inputs.lm_head.requires_grad else None

    return call


# --- ours ------------------------------------------------------------------------------------------------------------


def ours_forward(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    return fused_linear_ce(hidden, lm_head, targets, max_scored=_scored(targets))[0]


def ours_recompute(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    return -fused_logprob_pool(hidden, lm_head, targets, max_scored=_scored(targets)).logp.sum()


def ours_triton(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    """The summed loss by Triton's tiles, which need no bound on the number of scored rows."""
    return fused_linear_ce(hidden, lm_head, targets, backend="triton")[0]


def ours_in_chunks(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    """The summed loss in a workspace as large as the head."""
    before = os.environ.get("RIME_FAST_WORKSPACE_MIB")
    os.environ["RIME_FAST_WORKSPACE_MIB"] = str(max(256, lm_head.nbytes >> 20))
    try:
        return fused_linear_ce(hidden, lm_head, targets, max_scored=_scored(targets))[0]
    finally:
        del os.environ["RIME_FAST_WORKSPACE_MIB"]
        if before is not None:
            os.environ["RIME_FAST_WORKSPACE_MIB"] = before


@lru_cache(maxsize=1)
def _scored(targets: Tensor) -> int:
    """Count once a shape, outside of what is timed, what a collator knows."""
    return int((targets != -100).sum())


def ours_entropy(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    found = fused_logprob_pool(hidden, lm_head, targets, entropy=True)
    assert found.entropy is not None
    return -found.logp.sum() - ENTROPY * found.entropy.sum()


# --- torch's own forms ------------------------------------------------------------------------------------------------


def eager(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.shape[0] * lm_head.shape[0]
    require_memory(logits * (2 * hidden.element_size() + 8), hidden.device)  # they, their gradient, both again in fp32
    return F.cross_entropy(F.linear(hidden, lm_head).float(), targets, reduction="sum")


def eager_entropy(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.shape[0] * lm_head.shape[0]
    require_memory(logits * (2 * hidden.element_size() + 20), hidden.device)  # also log p, p and their product
    log_p = F.linear(hidden, lm_head).float().log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)[targets != -100].sum()
    return F.nll_loss(log_p, targets, reduction="sum") - ENTROPY * entropy


def compiled(plain: Loss) -> Loss:
    """Compile the eager form by torch.compile, once a shape."""
    program = torch.compile(plain, dynamic=False)

    def loss(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
        if not hidden.is_cuda:
            raise RuntimeError("torch.compile takes minutes on a CPU; GPU runs have it")
        return program(hidden, lm_head, targets)

    return loss


def torch_chunked(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, lm_head, targets, reduction="sum", options=options)


def losses(shape: Shape, cuda: bool) -> dict[str, Loss]:
    """The losses to compare by the name of their row, ours first; with entropy only those that give its gradient."""
    if shape.entropy:
        return {"ours_entropy": ours_entropy, "eager": eager_entropy, "compile": compiled(eager_entropy)}
    return {
        "ours_forward": ours_forward,
        "ours_recompute": ours_recompute,
        **({"ours_triton": ours_triton, "ours_in_chunks": ours_in_chunks} if cuda else {}),
        "eager": eager,
        **({"compile": compiled(eager)} if shape.peaked else {}),  # compiles for half a minute: where it is asked for
        "F.linear_cross_entropy": torch_chunked,
    }


# --- the measurement -------------------------------------------------------------------------------------------------


def measure(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 5,
    peers: Mapping[str, Loss] | None = None,
) -> dict[str, Row]:
    """Rows of the floor, ours, torch's own forms and every one of ``peers`` that runs here."""
    inputs = Inputs(shape, device, dtype)
    if not len(inputs.rows):
        raise ValueError(f"none of {shape.tokens} tokens is scored; expected fewer --ignored, or more --tokens")
    scored, every = inputs.rows.shape[0], losses(shape, inputs.hidden.is_cuda) | dict(peers or {})
    return compare(
        "logprob_pool",
        str(shape),
        {FLOOR: floor(inputs)} | {name: inputs.step(loss) for name, loss in every.items()},
        shape={"T": shape.tokens, "M": scored, "H": shape.hidden, "V": shape.vocab, "dtype": dtype_name(dtype)},
        device=device,
        rounds=rounds,
        results=results,
        truth=inputs.truth() if shape.tokens * shape.vocab <= (EXACT_FAST if fast_fp64(device) else EXACT) else None,
        flops=(4.0 if shape.frozen else 6.0) * scored * shape.hidden * shape.vocab,
        # hidden and head read, their gradients written
        nbytes=(2.0 * scored + (1 if shape.frozen else 2) * shape.vocab) * shape.hidden * dtype.itemsize,
    )
