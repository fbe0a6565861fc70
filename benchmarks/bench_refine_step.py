"""One whole Refine-RL step, rollout to optimizer, against the plain recipe written with stock parts.

Both sides get the same weights, prompt, anchors and sampled tokens (the rollout is timed, then replaced by fixed
samples, since two samplers draw differently), and must reach the same loss. The plain recipe is what a careful script
on transformers does: generate with the prompt repeated G times, a reference and a policy forward over G whole sequences
with full logits, a separate embedding forward, rewards row by row.

    pytest benchmarks/bench_refine_step.py --rime-json out.json
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_fast.bench.harness import Results, compare, relative_error
from rime_fast.engine.rollout import generate_rollouts
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.shared_prefix import shared_prefix_batch
from rime_fast.model.tiny import tiny_model
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.ops.reward import RewardWeights, score_rewrites_
from rime_fast.recipe.refine import policy_loss

BETA, ANCHORS = 0.04, 256


@dataclass
class Case:
    """``family`` sizes and the step: one prompt of ``prompt`` tokens (an image among them), G rollouts of R tokens."""

    sizes: dict[str, Any]
    image: tuple[int, int]  # patches
    prompt: int
    rollout: int
    group: int


FULL = Case(
    {"vocab_size": 32000, "hidden": 512, "layers": 8, "heads": 8, "kv_heads": 2, "intermediate": 1024,
     "init_std": 0.06},
    (32, 40), 512, 48, 8,
)  # fmt: skip
SMALL = Case({"vocab_size": 256, "hidden": 64, "layers": 2, "init_std": 0.2}, (8, 8), 32, 6, 3)


class Setting:
    """Weights, prompt, anchors and samples that both sides share; fp32 on ``device``."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.stock = tiny_model("qwen2_vl", seed=0, **case.sizes).to(device).eval()
        self.stock_reference = copy.deepcopy(self.stock)
        draw = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            for p in self.stock_reference.parameters():
                p += p.std(correction=0) * torch.randn(p.shape, device=device, generator=draw)
        self.policy = DualModeModel.from_model(copy.deepcopy(self.stock))
        self.reference = DualModeModel.from_model(copy.deepcopy(self.stock_reference))
        cells = case.image[0] * case.image[1] // 4
        batch = tiny_batch(self.stock.config, [[4, ("image", *case.image), case.prompt - cells - 6]], seed=2)
        batch = {k: v for k, v in batch.items() if k not in ("targets", "gen_index")}
        self.batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.batch["image_grids"] = batch["image_grid_thw"].tolist()
        vocab = case.sizes["vocab_size"]
        self.samples = torch.randint(9, vocab, (case.group, case.rollout), device=device, generator=draw)
        width = case.sizes["hidden"]
        self.anchors = F.normalize(torch.randn(ANCHORS, width, device=device, generator=draw), dim=1)
        self.format_ok = torch.arange(case.group, device=device) % 3 > 0
        self.positive = torch.zeros(1, dtype=torch.int64, device=device)
        self.weights = RewardWeights()
        # lr 0: the whole optimizer work, and the same step again in every round
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=0.0) for m in (self.policy, self.stock)]


def ours(s: Setting) -> Tensor:
    """The step as RefineRLTrainer runs it."""
    case = s.case
    generate_rollouts(
        s.policy, s.batch, gen_id=case.sizes["vocab_size"], max_new_tokens=case.rollout, group_size=case.group,
        temperature=1.0, stop_ids=[],
    )  # fmt: skip
    batch = shared_prefix_batch(s.batch, s.samples.tolist())
    with torch.no_grad():
        ref_logp = s.reference(**batch, pools={}).logp
    out = s.policy(**batch)
    gen, disc = (out.embeddings[name].detach() for name in ("gen", "disc"))
    rewards = torch.empty(1, case.group, device=gen.device)
    advantages = torch.empty_like(rewards)
    lengths = torch.full((1, case.group), case.rollout, device=gen.device)
    score_rewrites_(
        rewards, advantages, gen=gen[None], anchors=s.anchors, positive=s.positive, format_ok=s.format_ok[None],
        lengths=lengths, disc_similarity=disc @ s.anchors[0], weights=s.weights,
    )  # fmt: skip
    loss, _ = policy_loss(
        out.logp, None, ref_logp, advantages[0], batch["targets"] >= 0, row=batch["layout"].rows, beta=BETA,
        max_completion_length=case.rollout,
    )  # fmt: skip
    return _update(s.optimizers[0], loss)


def plain(s: Setting) -> Tensor:
    """The same step with transformers' generate, full logits and Python."""
    case, group = s.case, s.case.group
    prompt = s.batch["input_ids"][None].expand(group, -1)
    pixels = {
        "pixel_values": s.batch["pixel_values"].repeat(group, 1),
        "image_grid_thw": s.batch["image_grid_thw"].repeat(group, 1),
    }
    kinds = s.batch["mm_token_type_ids"][None].expand(group, -1)
    with torch.no_grad():
        s.stock.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), mm_token_type_ids=kinds, **pixels,
            do_sample=True, top_k=0, max_new_tokens=case.rollout, min_new_tokens=case.rollout, pad_token_id=0,
        )  # fmt: skip
    ids = torch.cat([prompt, s.samples], dim=1)
    full = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels,
        "mm_token_type_ids": F.pad(kinds, (0, case.rollout)),
    }  # fmt: skip

    def logp(model: Any) -> Tensor:
        logits = model(**full, use_cache=False).logits[:, case.prompt - 1 : -1].float()
        return logits.log_softmax(-1).gather(2, s.samples[..., None])[..., 0]

    with torch.no_grad():
        ref_logp = logp(s.stock_reference)
        hidden = s.stock.model(**full, use_cache=False).last_hidden_state
        gen = F.normalize(hidden[:, -1].float(), dim=-1)
        disc = F.normalize(hidden[:, int(s.batch["disc_index"])].float(), dim=-1)
    advantages = _python_advantages(s, gen, disc)
    new_logp = logp(s.stock)
    ratio = torch.exp(new_logp - new_logp.detach())
    gained = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.28) * advantages[:, None])
    difference = ref_logp - new_logp
    kl = difference.exp() - difference - 1
    loss = ((-gained + BETA * kl).sum(1) / case.rollout).mean()
    return _update(s.optimizers[1], loss)


def _python_advantages(s: Setting, gen: Tensor, disc: Tensor) -> Tensor:
    """Rewards rollout by rollout, as reward functions of a list of completions do."""
    rewards = []
    for g in range(len(gen)):
        similarity = [float(gen[g] @ anchor) for anchor in s.anchors]
        own, others = similarity[0], similarity[1:]
        rank = 1 + sum(x > own for x in others) + 0.5 * sum(x == own for x in others)
        score = (own - sum(others) / len(others)) / torch.log2(torch.tensor(1 + rank)).item()
        rewards.append(float(s.format_ok[g]) + score + own - float(disc[g] @ s.anchors[0]))
    found = torch.tensor(rewards, device=gen.device)
    return (found - found.mean()) / (found.std() + s.weights.eps)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.fixture
def rounds(tiny: bool) -> int:
    return 1 if tiny else 3


def test_refine_step(results: Results, device: str, tiny: bool, rounds: int) -> None:
    case = SMALL if tiny else FULL
    setting = Setting(case, device)
    found, expected = ours(setting), plain(setting)
    gradients = [
        torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (setting.policy, setting.stock)
    ]
    assert abs(float(found) - float(expected)) < 1e-5 * abs(float(expected))
    error = relative_error(gradients[0], gradients[1])
    assert error < 1e-3  # advantages divide reward gaps of 1e-3 by their spread
    ideal = case.prompt + case.group * case.rollout
    tokens = {
        "parameters": sum(p.numel() for p in setting.policy.parameters()),
        "prompt": case.prompt, "rollout": case.rollout, "group": case.group, "tokens_ideal": ideal,
        "tokens_ours": ideal + case.group - 1, "tokens_plain": case.group * (case.prompt + case.rollout),
    }  # fmt: skip
    impls = {"ours": lambda: ours(setting), "plain (stock parts)": lambda: plain(setting)}
    rows = compare("refine_step", f"P {case.prompt} R {case.rollout} G {case.group}", impls, shape=tokens,
                   device=device, rounds=rounds, errors={"ours": error}, results=results)  # fmt: skip
    ratio = rows["plain (stock parts)"].median_ms / rows["ours"].median_ms
    rows["ours"].note = f"{ratio:.2f}x; per forward {tokens['tokens_ours']} tokens, ideal {ideal}"
    print(f"refine step: {ratio:.2f}x the plain recipe; tokens a forward: ours {tokens['tokens_ours']}, "
          f"plain {tokens['tokens_plain']}, ideal {ideal}")  # fmt: skip
