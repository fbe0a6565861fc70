"""One joint-training step, forward to optimizer, against the plain recipe written with stock parts.

Both sides hold the SAME parameters and get the same batch: n pairs, an image of one of two resolutions and a question
on one side, text on the other, rewrites on both. Both must reach the same loss and the same gradient. "ours" is what
RimeTrainer runs: packed rows, the fused head, the contrastive operator, and the gradient cache where the batch is
larger than a micro-batch ("ours_kept": with every graph of its first pass kept). The plain recipe is what a script on
transformers does: right-padded batches a side, ``output_hidden_states``, full logits, InfoNCE over whole matrices, and
GradCache's two passes as its paper describes them (arXiv 2101.06983), the cross-entropy joining in the second.
"plain, lean first pass" is the same without logits and hidden states in the first pass, which more careful scripts do.

The vision tower's trunk is frozen and its merger trained, as in UME-R1. The learning rate is 0: the optimizer does its
whole work, and every round is the same step (on a GPU one of VARIANTS batches, whose lengths differ, for all in turn).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.lib.parts import PartClock, breakdown
from rime_fast.bench.harness import Results, Row, add_parts, compare, dtype_name
from rime_fast.engine.grad_cache import GradCache
from rime_fast.engine.packed_batch import PackedEncoder, part_tokens
from rime_fast.engine.wrappers import GradSync
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.liger import apply_liger
from rime_fast.model.tiny import tiny_config
from rime_fast.model.tiny_batch import tiny_batch
from rime_fast.recipe.joint import JointWeights, joint_loss, scored_tokens, token_weights

TAU = 0.02
VARIANTS = 5  # batches that take turns on a GPU
BATCH = ("batch", "tokens", "n", "query_rows", "chunks", "padded_tokens", "micro_tokens")  # what differs between them
BENCH = "joint_step"
PLAIN = "plain (stock parts)"
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 256, "hidden": 64, "layers": 2},
    # the head has a sixth of the parameters of the text layers, as in Qwen2-VL-2B
    "14M": {
        "vocab_size": 8192,
        "hidden": 256,
        "layers": 12,
        "heads": 4,
        "kv_heads": 2,
        "intermediate": 1024,
        "vision_hidden": 128,
        "vision_layers": 4,
        "vision_heads": 4,
    },
    "qwen2-vl-2b": {
        "vocab_size": 151_936,
        "hidden": 1536,
        "layers": 28,
        "heads": 12,
        "kv_heads": 2,
        "intermediate": 8960,
        "vision_hidden": 1280,
        "vision_layers": 32,
        "vision_heads": 16,
        "patch_size": 14,
        "max_positions": 32_768,
        "mlp_ratio": 4,
    },
}


@dataclass(frozen=True)
class Shape:
    """One model and one batch. Lengths vary by a quarter around the means."""

    model: str = field(default="qwen2-vl-2b", metadata={"help": "A key of MODELS; random weights."})
    pairs: int = field(default=32, metadata={"help": "Pairs in the step's one contrast."})
    micro: int = field(default=8, metadata={"help": "Sequences a forward of the plain recipe takes; 0: all of a side."})
    prompt: int = field(default=48, metadata={"help": "Mean text tokens of a prompt."})
    rewrite: int = field(default=64, metadata={"help": "Mean tokens of a rewrite."})
    images: tuple[tuple[int, int], ...] = ((32, 32), (32, 48))  # in patches
    liger: bool = False  # ours with Liger's norms, rotation and gated product; its rotation reaches the plain recipe

    def __str__(self) -> str:
        micro = f"-micro{self.micro}" if self.micro else ""
        return f"{self.model}-n{self.pairs}{micro}-rewrite{self.rewrite}" + ("-liger" if self.liger else "")


SHAPES = {
    "tiny": [Shape("tiny", 4, 2, 8, 8, ((4, 4), (4, 8))), Shape("tiny", 3, 0, 8, 8, ((4, 4), (4, 8)))],
    "cpu": [Shape("14M", 6, 3, 24, 64, ((16, 16), (16, 24)))],
    "cuda": [
        Shape(pairs=8, micro=0),
        Shape(pairs=8, micro=0, liger=True),
        Shape(),
        Shape(pairs=16, micro=4, rewrite=480),
    ],
}


def stock_model(name: str, device: str, dtype: torch.dtype) -> Any:
    """transformers' Qwen2-VL of these sizes, random weights, in training mode."""
    sizes = dict(MODELS[name])
    mlp_ratio = sizes.pop("mlp_ratio", 2)
    config: Any = tiny_config("qwen2_vl", **sizes)
    config.vision_config.mlp_ratio = mlp_ratio
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.train()


class Setting:
    """Both models over one set of parameters, the batch in both layouts, the optimizer."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device = shape, device
        self.stock = stock_model(shape.model, device, dtype)
        for name, parameter in self.stock.model.visual.named_parameters():
            parameter.requires_grad_("merger" in name)
        shared = {id(parameter): parameter for parameter in self.stock.parameters()}
        self.model: Any = DualModeModel.from_model(copy.deepcopy(self.stock, shared))
        if shape.liger:
            apply_liger(self.model)
        trained = [p for p in self.stock.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=device == "cuda")
        self.weights = JointWeights()
        self.clock = PartClock(device)
        self.variants: list[dict[str, Any]] = []
        for seed in range(1, 1 + (VARIANTS if device == "cuda" else 1)):
            self._make_batch(dtype, seed)
            self.variants.append({name: getattr(self, name) for name in BATCH})
        self.use(0)

    def use(self, number: int) -> None:
        """Take the batch of this turn: on a GPU lengths are new in every step, as in training."""
        vars(self).update(self.variants[number % len(self.variants)])

    def _make_batch(self, dtype: torch.dtype, seed: int) -> None:
        """The packed batch, and the plain recipe's padded micro-batches of the same sequences."""
        shape, draw = self.shape, torch.Generator().manual_seed(seed)

        def about(mean: int) -> int:
            return int(torch.randint(math.ceil(0.75 * mean), math.floor(1.25 * mean) + 1, (1,), generator=draw))

        n, rewrites = shape.pairs, []
        sequences: list[list[Any]] = []
        for i in range(2 * n):
            rewrites.append(about(shape.rewrite) + 2)  # with <disc_emb> before and <gen_emb> after it
            image = [("image", *shape.images[i % len(shape.images)])] if i < n else []
            sequences.append([4, *image, about(shape.prompt) + rewrites[-1]])
        batch = tiny_batch(self.stock.config, sequences, scored=1.0)
        last = batch["gen_index"]
        batch["disc_index"] = last - torch.tensor(rewrites) + 1
        row = torch.arange(len(batch["targets"]))
        owner = torch.repeat_interleave(torch.arange(2 * n), torch.tensor(batch["lengths"]))
        batch["targets"] = batch["targets"].where(row >= batch["disc_index"][owner], -100)
        self.batch = {
            key: (x.to(self.device, dtype) if x.is_floating_point() else x.to(self.device))
            if isinstance(x, Tensor)
            else x
            for key, x in batch.items()
        }
        self.batch["image_grids"] = batch["image_grid_thw"].tolist()
        self.batch["image_counts"] = [1] * n + [0] * n
        self.tokens, self.n = int(owner.numel()), n
        self.query_rows = sum(batch["lengths"][:n])
        size = shape.micro or n
        firsts = [*range(0, n, size), *range(n, 2 * n, size)]
        self.chunks = [self._padded(first, min(first + size, n if first < n else 2 * n)) for first in firsts]
        self.padded_tokens = sum(chunk["inputs"]["input_ids"].numel() for chunk in self.chunks)
        self.micro_tokens = max(chunk["inputs"]["input_ids"].numel() for chunk in self.chunks)

    def _padded(self, first: int, last: int) -> dict[str, Any]:
        """Sequences first..last-1 right-padded, as a stock collator makes them."""
        batch, ends = self.batch, torch.tensor(self.batch["lengths"]).cumsum(0).tolist()
        starts = [0, *ends]

        def rows(key: str, value: int) -> Tensor:
            parts = [batch[key][starts[i] : starts[i + 1]] for i in range(first, last)]
            return pad_sequence(parts, batch_first=True, padding_value=value)

        offset = torch.tensor(starts[first:last], device=self.device)
        inputs: dict[str, Any] = {
            "input_ids": rows("input_ids", 0),
            "mm_token_type_ids": rows("mm_token_type_ids", 0),
            "attention_mask": pad_sequence(
                [torch.ones(n, dtype=torch.int64, device=self.device) for n in batch["lengths"][first:last]],
                batch_first=True,
            ),
        }
        if first < self.shape.pairs:
            patches = [h * w for _, h, w in batch["image_grids"]]
            inputs["pixel_values"] = batch["pixel_values"][sum(patches[:first]) : sum(patches[:last])]
            inputs["image_grid_thw"] = batch["image_grid_thw"][first:last]
        return {
            "inputs": inputs,
            "targets": rows("targets", -100),
            "query": first < self.shape.pairs,
            "disc": batch["disc_index"][first:last] - offset,
            "gen": batch["gen_index"][first:last] - offset,
        }

    def modules(self, model: Any) -> dict[str, Any]:
        """What the clock watches in either model."""
        return {"vision": model.model.visual, "LLM forward": model.model.language_model, "head": model.lm_head}

    def update(self) -> None:
        with self.clock.part("optimiser"):
            self.optimizer.step()

    def gradients(self) -> list[Tensor]:
        """Copies of all gradients, where they are."""
        return [p.grad.clone() for p in self.stock.parameters() if p.grad is not None]


def gradient_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """||found - wanted|| / ||wanted|| over all parameters, one at a time: a 2B model's gradient is 6 GB in fp32."""
    pairs = list(zip(found, wanted, strict=True))
    difference = sum(float((a.float() - b.to(a.device).float()).norm().double() ** 2) for a, b in pairs)
    return math.sqrt(difference / sum(float(b.float().norm().double() ** 2) for _, b in pairs))


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(s: Setting, keep_bytes: float = 0.0) -> Tensor:
    """The step as RimeTrainer runs it; returns the loss."""
    s.optimizer.zero_grad()
    counts = scored_tokens(s.batch["targets"], s.query_rows)
    weight = token_weights(s.batch["targets"], s.query_rows, counts, s.weights)
    batch = s.batch | {"token_weight": weight}

    def contrast(ce: Tensor, rows: dict[str, Tensor]) -> Tensor:
        s.clock.mark("contrast")  # until the next mark: the cache runs this loss's backward itself
        sides = [{mode: x[part] for mode, x in rows.items()} for part in (slice(s.n), slice(s.n, None))]
        return joint_loss(ce, *sides, weights=s.weights, temperature=TAU).total

    def backward(loss: Tensor) -> None:
        with s.clock.part("backward"):
            loss.backward()

    if not s.shape.micro:
        out = s.model(**batch)
        loss = contrast(out.loss, out.embeddings)
        backward(loss)
        s.update()
        return loss.detach()
    encoder = PackedEncoder(s.model, batch, s.micro_tokens)
    cache = GradCache(sync=GradSync(s.model, backward=backward), keep_bytes=keep_bytes, cost=part_tokens)
    nothing = torch.zeros((), device=s.device)
    done = cache.step(encoder.parts, encode=encoder, loss=lambda rows: contrast(nothing, encoder.in_order(rows)))
    s.update()
    return done.loss


# --- the plain recipe ------------------------------------------------------------------------------------------------


def plain(s: Setting, lean: bool = False) -> Tensor:
    """The same step with stock parts; returns the loss."""
    s.optimizer.zero_grad()
    rows: list[dict[str, Tensor]] = []
    total = torch.zeros((), device=s.device)
    scored = [sum(int((c["targets"] >= 0).sum()) for c in s.chunks if c["query"] is side) for side in (True, False)]

    def cross_entropy(chunk: dict[str, Any], logits: Tensor) -> Tensor:
        with s.clock.part("head"):
            loss = F.cross_entropy(logits.flatten(0, 1).float(), chunk["targets"].flatten(), reduction="sum")
            return loss / scored[0 if chunk["query"] else 1]

    if not s.shape.micro:
        for chunk in s.chunks:
            out, found = _forward(s, chunk)
            total = total + cross_entropy(chunk, out.logits)
            rows.append(found)
            del out
        with s.clock.part("contrast"):
            total = total + info_nce(s, {mode: torch.cat([one[mode] for one in rows]) for mode in rows[0]})
        with s.clock.part("backward"):
            total.backward()
        s.update()
        return total.detach()
    for chunk in s.chunks:
        with torch.no_grad():
            rows.append(_lean_forward(s, chunk) if lean else _forward(s, chunk)[1])
    leaves = {mode: torch.cat([one[mode] for one in rows]).requires_grad_() for mode in rows[0]}
    with s.clock.part("contrast"):
        value = info_nce(s, leaves)
        value.backward()
    cached = {mode: leaf.grad.split([len(one[mode]) for one in rows]) for mode, leaf in leaves.items()}  # type: ignore[union-attr]
    for i, chunk in enumerate(s.chunks):
        out, found = _forward(s, chunk)
        own = cross_entropy(chunk, out.logits)
        del out
        surrogate = own + sum(torch.dot(found[mode].flatten(), cached[mode][i].flatten()) for mode in found)
        with s.clock.part("backward"):
            surrogate.backward()
        total = total + own.detach()
    s.update()
    return total + value.detach()


def _forward(s: Setting, chunk: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The stock forward, and both embeddings out of its last hidden states."""
    out = s.stock(**chunk["inputs"], output_hidden_states=True, use_cache=False)
    found = _read_out(chunk, out.hidden_states[-1])
    out.hidden_states = None
    return out, found


def _lean_forward(s: Setting, chunk: dict[str, Any]) -> dict[str, Tensor]:
    return _read_out(chunk, s.stock.model(**chunk["inputs"], use_cache=False).last_hidden_state)


def _read_out(chunk: dict[str, Any], hidden: Tensor) -> dict[str, Tensor]:
    each = torch.arange(hidden.shape[0], device=hidden.device)
    return {mode: F.normalize(hidden[each, chunk[mode]].float(), dim=-1) for mode in ("disc", "gen")}


def info_nce(s: Setting, rows: dict[str, Tensor]) -> Tensor:
    """The four terms over whole matrices, both directions each."""
    own = torch.arange(s.n, device=s.device)
    total = torch.zeros((), device=s.device)
    for query, key, weight in s.weights.pair_terms():
        logits = rows[query][: s.n] @ rows[key][s.n :].T / TAU
        total = total + weight * 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    return total


# --- the measurement -------------------------------------------------------------------------------------------------


def measure(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 3,
) -> dict[str, Row]:
    """Rows of both recipes, with samples and tokens a second in their notes; the parts of a step go to ``results``.

    error_fp64 of ours is the relative difference of its whole gradient from the plain recipe's, in the same dtype.
    Raises AssertionError when the two losses differ.
    """
    s = Setting(shape, device, dtype)
    first: dict[str, tuple[float, list[Tensor]]] = {}
    turns: Counter[str] = Counter()

    def checked(name: str, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            s.use(turns[name])
            turns[name] += 1
            loss = step()
            if name not in first:
                first[name] = float(loss), s.gradients()
            return loss

        return call

    steps: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours(s)}
    if shape.micro:
        steps["ours_kept"] = lambda: ours(s, math.inf)
    steps[PLAIN] = lambda: plain(s)
    if shape.micro:
        steps["plain, lean first pass"] = lambda: plain(s, lean=True)
    steps = {name: checked(name, step) for name, step in steps.items()}
    sizes = {
        "parameters": sum(p.numel() for p in s.stock.parameters()),
        "pairs": shape.pairs,
        "tokens": s.tokens,
        "tokens_padded": s.padded_tokens,
        "scored": int((s.batch["targets"] >= 0).sum()),
        "micro": shape.micro,
        "dtype": dtype_name(dtype),
    }
    rows = compare(BENCH, str(shape), steps, shape=sizes, device=device, rounds=rounds, results=results, step=True)
    expected, wanted = first.pop(PLAIN)
    bound = (1e-5 if dtype == torch.float32 else 2e-2) * abs(expected)
    for name, (loss, gradients) in first.items():
        assert abs(loss - expected) < bound, (name, loss, expected)
        rows[name].error_fp64 = gradient_difference(gradients, wanted)
    first[PLAIN] = expected, []
    base = rows[PLAIN].median_ms
    for row in rows.values():
        rate = 1e3 / row.median_ms
        row.note = f"{shape.pairs * rate:.2f} pairs/s, {s.tokens * rate:.0f} tokens/s, {base / row.median_ms:.2f}x"
    if results is not None:
        for name in ("ours", PLAIN):
            step, model = steps[name], s.model if name == "ours" else s.stock
            parts = breakdown(s.clock, s.modules(model), step, min(rounds, 2))
            add_parts(results, BENCH, str(shape), name, parts, sizes)
    return rows
