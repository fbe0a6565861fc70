"""One whole Refine-RL step, rollout to optimizer, against the plain recipe written with stock parts.

Both sides hold the SAME parameters and get the same prompts, anchors and sampled tokens (the rollout is timed, then
replaced by fixed samples, since two samplers draw differently), and must reach the same loss and the same gradient.
"ours" is what RefineRLTrainer runs. The plain recipe is what a careful script on transformers does: generate (with its
cache) on every prompt repeated G times, a reference and a policy forward over B G whole sequences with full logits, a
forward of the backbone alone for the embeddings, rewards row by row in Python.

The learning rate is 0: the optimizer does its whole work, and every round is the same step (on a GPU one of VARIANTS
batches, whose prompts differ in length, for all in turn).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.joint_step import MODELS, VARIANTS, gradient_difference, stock_model
from benchmarks.lib.parts import PartClock, breakdown
from rime_fast.bench.harness import Results, Row, add_parts, compare, dtype_name
from rime_fast.engine.rollout import generate_rollouts
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.ops.reward import RewardWeights, score_rewrites_
from rime_fast.recipe.refine import policy_loss
from rime_fast.trainers.policy import shared_policy_batch

BENCH = "refine_step"
PLAIN = "plain (stock parts)"
BETA, ANCHORS = 0.04, 256
MODELS |= {
    "tiny-sharp": {"vocab_size": 256, "hidden": 64, "layers": 2, "init_std": 0.2},
    "30M": {
        "vocab_size": 32_000,
        "hidden": 512,
        "layers": 8,
        "heads": 8,
        "kv_heads": 2,
        "intermediate": 1024,
        "init_std": 0.06,
    },
}


@dataclass(frozen=True)
class Shape:
    """One model and one batch of rollouts; every prompt has one image."""

    model: str = field(default="qwen2-vl-2b", metadata={"help": "A key of MODELS; random weights."})
    prompts: int = field(default=4, metadata={"help": "B, prompts of the step."})
    prompt: int = field(default=1024, metadata={"help": "P, tokens of a prompt, its image's among them."})
    rollout: int = field(default=64, metadata={"help": "R, sampled tokens of a rollout."})
    group: int = field(default=8, metadata={"help": "G, rollouts of a prompt."})
    image: tuple[int, int] = (48, 64)  # in patches, four to a token

    def __str__(self) -> str:
        return f"{self.model}-B{self.prompts}-P{self.prompt}-R{self.rollout}-G{self.group}"

    @property
    def tokens_ideal(self) -> int:
        """B (P + G R): every token once a forward."""
        return self.prompts * (self.prompt + self.group * self.rollout)


SHAPES = {
    "tiny": [Shape("tiny-sharp", 1, 32, 6, 3, (8, 8)), Shape("tiny-sharp", 2, 32, 6, 3, (8, 8))],
    "cpu": [Shape("30M", 1, 512, 48, 8, (32, 40))],
    # Of the last two plain needs more than 140 GB: it encodes each prompt's image for every rollout.
    "cuda": [Shape(prompts=2, prompt=512, image=(24, 32)), Shape(prompts=2), Shape(prompts=2, rollout=256)],
}


class Setting:
    """Policy and reference of both sides over one set of parameters each, and everything a step begins with."""

    batch: dict[str, Any]
    prompt: int  # tokens of each of the batch's prompts
    offsets: Tensor  # where they begin

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape, self.clock = shape, PartClock(device)
        self.stock = stock_model(shape.model, device, dtype).eval()
        self.stock_reference = copy.deepcopy(self.stock)
        draw = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            for p in self.stock_reference.parameters():
                p += p.std(correction=0) * torch.randn(p.shape, device=device, generator=draw).to(p.dtype)
        self.policy, self.reference = (_dual(model) for model in (self.stock, self.stock_reference))
        cells = shape.image[0] * shape.image[1] // 4
        if shape.prompt < cells + 8:
            raise ValueError(f"prompt is {shape.prompt}; expected at least {cells + 8} with an image of {shape.image}")
        # P first, then up to a quarter less
        step = max(1, (shape.prompt - cells - 8) // (4 * VARIANTS))
        self.variants = [
            self._batch(shape.prompt - step * i, cells, device, dtype)
            for i in range(VARIANTS if device == "cuda" else 1)
        ]
        self.use(0)
        width, vocab = self.stock.config.text_config.hidden_size, self.stock.config.text_config.vocab_size
        count = shape.prompts * shape.group
        self.vocab = vocab
        self.samples = torch.randint(9, vocab, (count, shape.rollout), device=device, generator=draw)
        self.anchors = F.normalize(torch.randn(ANCHORS, width, device=device, generator=draw), dim=1)
        self.positive = torch.arange(shape.prompts, device=device)
        self.format_ok = (torch.arange(count, device=device) % 3 > 0).view(shape.prompts, shape.group)
        self.weights = RewardWeights()
        self.optimizer = torch.optim.AdamW(self.stock.parameters(), lr=0.0, weight_decay=0.0, fused=device == "cuda")

    def _batch(self, prompt: int, cells: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """Prompts of that length: what ``use`` sets."""
        count, image = self.shape.prompts, self.shape.image
        made = tiny_batch(self.stock.config, [[4, ("image", *image), prompt - cells - 6]] * count, seed=2)
        made = {k: v for k, v in made.items() if k not in ("targets", "gen_index")}
        batch = {
            k: (v.to(device, dtype) if v.is_floating_point() else v.to(device)) if isinstance(v, Tensor) else v
            for k, v in made.items()
        }
        batch["image_grids"] = made["image_grid_thw"].tolist()
        return {"batch": batch, "prompt": prompt, "offsets": torch.arange(count, device=device) * prompt}

    def use(self, turn: int) -> None:
        """Take the batch of this turn: on a GPU lengths are new in every step, as in training."""
        vars(self).update(self.variants[turn % len(self.variants)])

    def modules(self, model: Any) -> dict[str, Any]:
        """What the clock watches in a policy forward."""
        return {"vision": model.model.visual, "LLM forward": model.model.language_model, "head": model.lm_head}

    def update(self, loss: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with self.clock.part("backward"):
            loss.backward()
        with self.clock.part("optimiser"):
            self.optimizer.step()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Copies of all gradients, where they are."""
        return [p.grad.clone() for p in self.stock.parameters() if p.grad is not None]


def _dual(stock: Any) -> Any:
    """Our class over the parameters of a stock model."""
    return DualModeModel.from_model(copy.deepcopy(stock, {id(p): p for p in stock.parameters()}))


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(s: Setting) -> Tensor:
    """The step as RefineRLTrainer runs it; returns the loss."""
    shape = s.shape
    with s.clock.part("decode"):
        generate_rollouts(
            s.policy,
            s.batch,
            gen_id=s.vocab,
            max_new_tokens=shape.rollout,
            group_size=shape.group,
            temperature=1.0,
            stop_ids=[],
        )
    batch = shared_policy_batch(s.batch, s.samples.tolist())
    with s.clock.part("reference"), torch.no_grad():
        ref_logp = batch.by_rollout(s.reference(**batch.inputs, pools={}).logp)
    with s.clock.watching(s.modules(s.policy)):
        out = s.policy(**batch.inputs, pools=batch.pools)
    with s.clock.part("reward"):
        gen, disc = (out.embeddings[name].detach() for name in ("gen", "disc"))
        rewards = torch.empty(shape.prompts, shape.group, device=gen.device)
        advantages = torch.empty_like(rewards)
        score_rewrites_(
            rewards,
            advantages,
            gen=gen.view(shape.prompts, shape.group, -1),
            anchors=s.anchors,
            positive=s.positive,
            format_ok=s.format_ok,
            lengths=torch.full_like(rewards, shape.rollout),
            disc_similarity=(disc * s.anchors[s.positive]).sum(1),
            weights=s.weights,
        )
    loss, _ = policy_loss(
        batch.by_rollout(out.logp),
        None,
        ref_logp,
        advantages.view(-1),
        batch.mask,
        beta=BETA,
        max_completion_length=shape.rollout,
    )
    return s.update(loss)


# --- the plain recipe ------------------------------------------------------------------------------------------------


def plain(s: Setting) -> Tensor:
    """The same step with transformers' generate, full logits and Python; returns the loss."""
    shape, group = s.shape, s.shape.group

    def repeated(rows: Tensor) -> Tensor:
        return rows.view(shape.prompts, -1, *rows.shape[1:]).repeat_interleave(group, 0)

    prompt, kinds = repeated(s.batch["input_ids"]), repeated(s.batch["mm_token_type_ids"])
    pixels = {
        "pixel_values": repeated(s.batch["pixel_values"]).flatten(0, 1),
        "image_grid_thw": s.batch["image_grid_thw"].repeat_interleave(group, 0),
    }
    with s.clock.part("decode"), torch.inference_mode():
        s.stock.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            mm_token_type_ids=kinds,
            **pixels,
            do_sample=True,
            top_k=0,
            max_new_tokens=shape.rollout,
            min_new_tokens=shape.rollout,
            pad_token_id=0,
        )
    ids = torch.cat([prompt, s.samples], dim=1)
    full = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **pixels,
        "mm_token_type_ids": F.pad(kinds, (0, shape.rollout)),
    }

    def logp(model: Any) -> Tensor:
        logits = model(**full, use_cache=False).logits[:, s.prompt - 1 : -1].float()
        return logits.log_softmax(-1).gather(2, s.samples[..., None])[..., 0]

    with s.clock.part("reference"), torch.no_grad():
        ref_logp = logp(s.stock_reference)
    with s.clock.part("scoring"), torch.no_grad():
        hidden = s.stock.model(**full, use_cache=False).last_hidden_state
        gen = F.normalize(hidden[:, -1].float(), dim=-1)
        within = (s.batch["disc_index"] - s.offsets).repeat_interleave(group)
        disc = F.normalize(hidden[torch.arange(len(hidden), device=hidden.device), within].float(), dim=-1)
    with s.clock.part("reward"):
        advantages = _python_advantages(s, gen, disc)
    with s.clock.watching(s.modules(s.stock)):
        new_logp = logp(s.stock)
    ratio = torch.exp(new_logp - new_logp.detach())
    gained = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.28) * advantages[:, None])
    difference = ref_logp - new_logp
    kl = difference.exp() - difference - 1
    return s.update(((-gained + BETA * kl).sum(1) / shape.rollout).mean())


def _python_advantages(s: Setting, gen: Tensor, disc: Tensor) -> Tensor:
    """Rewards rollout by rollout, as reward functions of a list of completions do; [B G] advantages."""
    rewards = []
    for i, (row, ok) in enumerate(zip(gen, s.format_ok.flatten().tolist(), strict=True)):
        item = i // s.shape.group
        similarity = (s.anchors @ row).tolist()
        own = similarity.pop(item)
        rank = 1 + sum(x > own for x in similarity) + 0.5 * sum(x == own for x in similarity)
        score = (own - sum(similarity) / len(similarity)) / torch.log2(torch.tensor(1 + rank)).item()
        rewards.append(float(ok) + score + own - float(disc[i] @ s.anchors[item]))
    found = torch.tensor(rewards, device=gen.device).view(s.shape.prompts, s.shape.group)
    spread = found.std(1, keepdim=True) + s.weights.eps
    return ((found - found.mean(1, keepdim=True)) / spread).view(-1)


# --- the measurement -------------------------------------------------------------------------------------------------


def measure(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 2,
) -> dict[str, Row]:
    """Rows of both recipes, with the tokens of a forward beside the ideal in their notes; the parts of a step go to
    ``results``.

    error_fp64 of ours is the relative difference of its whole gradient from the plain recipe's, in the same dtype.
    Raises AssertionError when the two losses differ.
    """
    s = Setting(shape, device, dtype)
    found: dict[str, tuple[float, list[Tensor]]] = {}
    turns: Counter[str] = Counter()

    def checked(name: str, step: Callable[[Setting], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            s.use(turns[name])
            turns[name] += 1
            loss = step(s)
            if name not in found:
                found[name] = float(loss), s.gradients()
            return loss

        return call

    steps = {"ours": checked("ours", ours), PLAIN: checked(PLAIN, plain)}
    tokens = {
        "ours": shape.tokens_ideal + shape.prompts * (shape.group - 1),
        PLAIN: shape.prompts * shape.group * (shape.prompt + shape.rollout),
    }
    sizes = {
        "parameters": sum(p.numel() for p in s.stock.parameters()),
        "prompts": shape.prompts,
        "prompt": shape.prompt,
        "rollout": shape.rollout,
        "group": shape.group,
        "tokens_ideal": shape.tokens_ideal,
        "tokens_ours": tokens["ours"],
        "tokens_plain": tokens[PLAIN],
        "dtype": dtype_name(dtype),
    }
    rows = compare(BENCH, str(shape), steps, shape=sizes, device=device, rounds=rounds, results=results, step=True)
    if PLAIN in rows:  # it may not fit the memory
        (loss, gradients), (expected, wanted) = found["ours"], found[PLAIN]
        bound = (1e-5 if dtype == torch.float32 else 2e-2) * abs(expected)
        assert abs(loss - expected) < bound, (loss, expected)
        rows["ours"].error_fp64 = gradient_difference(gradients, wanted)
    for name, row in rows.items():
        faster = f"{rows[PLAIN].median_ms / row.median_ms:.2f}x; " if PLAIN in rows else ""
        row.note = f"{faster}{tokens[name]} tokens a forward, the ideal is {shape.tokens_ideal}"
    if results is not None:
        for name in rows:
            add_parts(results, BENCH, str(shape), name, breakdown(s.clock, {}, steps[name], 1), sizes)
    return rows
