"""Inputs, the fp64 truth and same-dtype eager torch for the tests of the log-prob operator."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.ops.logprob_pool import LogprobPool, fused_linear_ce, fused_logprob_pool
from tests.ops.error_rule import assert_rule, relative

__all__ = ["Case", "assert_close_to_truth", "relative"]


@dataclass
class Case:
    """One call: sizes, what the logits look like, which options are on."""

    rows: int = 57
    width: int = 96
    vocabulary: int = 123
    dtype: torch.dtype = torch.float32
    scored: str = "some"  # all, some, one, none
    spread: float = 1.0  # standard deviation of the logits, roughly
    bias: bool = True
    temperature: float = 0.7
    softcap: float | None = None
    pools: bool = True
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    temperature_terms: float = field(default=0.0, repr=False)  # set by ``eager`` in fp64, see error_rule.py

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        T, H, V = self.rows, self.width, self.vocabulary
        targets = torch.randint(0, V, (T,), generator=g)
        keep = {"all": torch.ones(T), "some": torch.rand(T, generator=g).round(), "none": torch.zeros(T)}
        keep["one"] = torch.zeros(T).index_fill(0, torch.tensor([T // 2]), 1.0)
        targets[keep[self.scored] == 0] = -100
        last = torch.randint(0, T, (3,), generator=g)
        starts = torch.randint(0, T, (2,), generator=g)
        ends = starts + 1 + (torch.rand(2, generator=g) * (T - starts)).long().clamp_max(T - 1)
        self.tensors = {
            "hidden": torch.randn(T, H, generator=g).to(self.dtype),
            "lm_head": (torch.randn(V, H, generator=g) * self.spread / H**0.5).to(self.dtype),
            "bias": torch.randn(V, generator=g).to(self.dtype),
            "temperature": torch.tensor(self.temperature),
            "targets": targets,
            "last": last,
            "starts": starts,
            "ends": ends.clamp_max(T),
            "token_weight": torch.randn(T, generator=g),
            "grad_entropy": torch.randn(T, generator=g),
            "grad_last": torch.randn(3, H, generator=g),
            "grad_mean": torch.randn(2, H, generator=g),
        }

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh leaves that ask for gradients, all in ``dtype`` if given."""
        names = ("hidden", "lm_head", "temperature", *(("bias",) if self.bias else ()))
        return {n: self.tensors[n].clone().to(dtype or self.tensors[n].dtype).requires_grad_() for n in names}

    def named_pools(self) -> dict[str, Tensor | tuple[Tensor, Tensor]] | None:
        t = self.tensors
        return {"last": t["last"], "mean": (t["starts"], t["ends"])} if self.pools else None

    def options(self, leaves: dict[str, Tensor], **more: object) -> dict:
        return {
            "pools": self.named_pools(),
            "bias": leaves.get("bias"),
            "temperature": leaves["temperature"],
            "softcap": self.softcap,
            **more,
        }

    def run(self, backend: str, *, schedule: str = "recompute", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and gradients of one call through the public functions."""
        leaves, t = self.leaves(dtype), self.tensors
        args = leaves["hidden"], leaves["lm_head"], t["targets"]
        if schedule == "recompute":
            out = fused_logprob_pool(*args, entropy=True, **self.options(leaves, backend=backend))
            loss = -(out.logp * t["token_weight"]).sum() + (out.entropy * t["grad_entropy"]).sum()
        else:
            loss, out = fused_linear_ce(
                *args, token_weight=t["token_weight"], entropy=True, **self.options(leaves, backend=backend)
            )
        return self.collect(leaves, loss, out)

    def run_plain(self, backend: str, **options: object) -> dict[str, Tensor]:
        """Outputs and gradients of ``fused_logprob_pool`` with the temperature and the entropy not trained: of the same
        loss as ``fused_linear_ce``'s."""
        leaves, t = self.leaves(), self.tensors
        given = self.options(leaves, backend=backend, entropy=True, **options)
        given["temperature"] = leaves.pop("temperature").detach()
        out = fused_logprob_pool(leaves["hidden"], leaves["lm_head"], t["targets"], **given)
        return self.collect(leaves, -(out.logp * t["token_weight"]).sum(), out)

    def collect(self, leaves: dict[str, Tensor], loss: Tensor, out: LogprobPool) -> dict[str, Tensor]:
        total = 0.5 * loss
        if self.pools:
            total = total + (out.embeddings["last"] * self.tensors["grad_last"]).sum()
            total = total + (out.embeddings["mean"] * self.tensors["grad_mean"]).sum()
        grads = torch.autograd.grad(total, list(leaves.values()))
        result = {"logp": out.logp, "loss": loss, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}
        if out.entropy is not None:
            result["entropy"] = out.entropy
        return {name: value.detach() for name, value in (result | out.embeddings).items()}

    def eager(self, dtype: torch.dtype | None = None, schedule: str = "recompute") -> dict[str, Tensor]:
        """Plain torch with full logits in the inputs' dtype (fp64: the truth), written without the package."""
        leaves, t = self.leaves(dtype), self.tensors
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        z = F.linear(leaves["hidden"], leaves["lm_head"], leaves.get("bias")).to(wide)
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        log_p = torch.log_softmax(z / leaves["temperature"], dim=1)
        scored = (t["targets"] != -100).to(wide)
        logp = log_p.gather(1, t["targets"].clamp_min(0).unsqueeze(1)).squeeze(1) * scored
        entropy = -(log_p.exp() * log_p).sum(dim=1) * scored
        loss = -(logp * t["token_weight"]).sum()
        if schedule == "recompute":
            loss = loss + (entropy * t["grad_entropy"]).sum()
        embeddings = {}
        if self.pools:
            spans = zip(t["starts"].tolist(), t["ends"].tolist(), strict=True)
            mean = [leaves["hidden"][a:b].to(wide).mean(0) for a, b in spans]
            embeddings["last"] = F.normalize(leaves["hidden"][t["last"]].to(wide), dim=1)
            embeddings["mean"] = F.normalize(torch.stack(mean), dim=1)
        if dtype == torch.float64:  # the loss reaches the temperature through z / temperature alone
            (slope,) = torch.autograd.grad(0.5 * loss, z, retain_graph=True)
            self.temperature_terms = (slope * z.detach()).abs().sum().item() / self.temperature
        return self.collect(leaves, loss, LogprobPool(logp, entropy, embeddings))


def assert_close_to_truth(case: Case, found: dict[str, Tensor], schedule: str = "recompute") -> None:
    """The test rule (error_rule.py) for every output and gradient."""
    truth, eager = case.eager(torch.float64, schedule), case.eager(None, schedule)
    for name, value in truth.items():
        if name == "loss" and schedule == "recompute":
            continue  # a sum of terms of both signs, used for its gradient only
        absolute = case.temperature_terms if name == "d_temperature" else 0.0
        assert_rule(f"{name} of {case}", found[name], eager[name], value, case.dtype, absolute)
