"""What every GPU row should take, from FLOP, bytes and launches, beside what was measured: docs/gpu_model.md.

    python -m benchmarks.gpu_model [--write] [RESULTS.json ...]

A row's time is what the card does: FLOP over the rate of its matrix products, the bytes that no product hides over its
bandwidth, and a gap a kernel. A whole step takes as long as its host where that is longer. Nothing is fitted to a row:
one far from its prediction is a question. The formulas stand beside each operator; shapes are the benchmarks' own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bench_attention, bench_contrastive, bench_logprob_pool, bench_reward
from benchmarks.lib import decode_step, joint_step, refine_step
from benchmarks.lib.joint_step import MODELS
from benchmarks.lib.stored import load
from rime_fast.bench import contrastive, logprob, reward
from rime_fast.bench.harness import FLOOR
from rime_fast.ops.contrastive.cuda import TILE
from rime_fast.ops.contrastive.op import KEEP_SHARE
from rime_fast.ops.logprob_pool.cuda import ROWS, TILED_ROWS, plan, whole_rows
from rime_fast.ops.logprob_pool.problem import WORKSPACE_SHARE

RESULTS = Path(__file__).parent / "results"
STORED = [RESULTS / card / name for card in ("h100", "h200") for name in ("bench.json", "kernels.json")]
PAGE = Path(__file__).parent.parent / "docs" / "gpu_model.md"
BEGIN, END = "<!-- table: python -m benchmarks.gpu_model --write -->", "<!-- end of table -->"
LAUNCH, GAP = 10e-6, 2e-6  # seconds: a launch from Python; between kernels where the host is ahead, or in a graph
MEMORY = 79 << 30  # bytes that an H100 says it has
FLASH = 350e12  # FLOP/s of FlashAttention-2
# Of the library's rate, without multicast: three of four products have 85 FLOP for a byte out of L2, dX 64.
TRITON = 0.8


@dataclass(frozen=True)
class Card:
    """matrix: bf16 FLOP/s of a large product; memory: bytes/s of a copy, read and written."""

    matrix: float
    memory: float


CARDS = {"NVIDIA H100 80GB HBM3": Card(790e12, 3.0e12), "NVIDIA H200": Card(790e12, 4.3e12)}


@dataclass(frozen=True)
class Work:
    """One row: FLOP of matrix products, bytes beside them, launches; ahead: issued by the host, or by a graph."""

    flops: float
    nbytes: float
    launches: int
    rate: float = 1.0  # of Card.matrix
    ahead: bool = True

    def ms(self, card: Card) -> float:
        device = self.flops / (self.rate * card.matrix) + self.nbytes / card.memory
        device += GAP * self.launches
        return 1e3 * (device if self.ahead else max(device, LAUNCH * self.launches))


Row = tuple[str, str, str, Work]  # bench, case, impl


def head(shape: logprob.Shape) -> Iterator[Row]:
    """The head: 2MHV FLOP a product; two row kernels move 2 + 2 + 2 bytes a bf16 logit, on fp32 panels 4 + 4 + 2."""
    m, h, v = round(shape.tokens * (1 - shape.ignored)), shape.hidden, shape.vocab
    one, name = 2.0 * m * h * v, str(shape)
    yield "logprob_pool", name, FLOOR, Work(3 * one, 0, 3)
    least = max(256 << 20, 2 * v * h)
    limit = max(least, MEMORY // WORKSPACE_SHARE)
    for impl, room in (("ours_forward", limit), ("ours_in_chunks", least)):
        rows = whole_rows(m, v, 2, room)
        if rows:
            chunks = -(-m // rows)
            head_fp32 = v * h * (4 + 8 * (chunks - 1) + 6) if chunks > 1 else 0  # written, added to, cast
            yield "logprob_pool", name, impl, Work(3 * one, 6.0 * m * v + head_fp32, 19 + 6 * chunks + -(-m // ROWS))
    tiled = m >= TILED_ROWS  # the panels' gradient by Triton's tiles, as the statistics are at any size
    panels = -(-v // plan(m, h, v, 2, limit, 2 if tiled else 4).columns)
    moved = (2.0 if tiled else 6.0) * m * v + 8.0 * m * h * panels
    rate = 4 / (2 / TRITON + 2) if tiled else 4 / (1 / TRITON + 3)
    yield "logprob_pool", name, "ours_recompute", Work(4 * one, moved, 25 + 4 * panels, rate=rate)
    yield "logprob_pool", name, "ours_triton", Work(4 * one, 4.0 * m * v, 80, rate=TRITON)


def contrast(shape: contrastive.Shape) -> Iterator[Row]:
    """A term: 8 N^2 D FLOP, 6 where the similarities are kept; the row kernels read 4 + 4 bytes and write 2 for each;
    dq and dk in fp32 are read and written once a tile."""
    n, d, terms = shape.pairs, shape.width, shape.terms
    kept = 4 * terms * n * n <= MEMORY // KEEP_SHARE
    side = n if kept else min(n, TILE[0])
    tiles, modes = terms * math.ceil(n / side) ** 2, 2 if terms == 1 else 4
    moved = 10.0 * terms * n * n + 16.0 * side * d * tiles + 14.0 * modes * n * d
    yield "contrastive", str(shape), FLOOR, Work(8.0 * terms * n * n * d, 0, 4 * terms)
    flops = (6.0 if kept else 8.0) * terms * n * n * d
    yield "contrastive", str(shape), "ours", Work(flops, moved, 30 + tiles * (6 if kept else 7))


def rewards(shape: reward.Shape, dtype: str) -> Iterator[Row]:
    """One product (in fp32 six of bf16 parts) and its similarities read once; the bank's norms are kept with it."""
    half = dtype == "bfloat16"
    case = f"{shape}-bfloat16" if half else str(shape)
    flops = 2.0 * shape.rows * shape.anchors * shape.width
    split = 0 if half else 18.0 * shape.anchors * shape.width  # into three parts
    yield "reward", case, FLOOR, Work(flops, 0, 1, rate=1.0 if half else 0.065)
    similarities = 4.0 * shape.rows * shape.anchors
    yield "reward", case, "ours_mean", Work(flops * (1 if half else 6), split + similarities, 5 if half else 25)


def attention(shape: bench_attention.Shape) -> Iterator[Row]:
    mean = (shape.longest**3 - shape.shortest**3) / 3 / (shape.longest - shape.shortest)
    flops = 3.5 * 2.0 * shape.sequences * mean * shape.heads * shape.width
    yield "attention", str(shape), "ours", Work(flops, 0, 25, rate=FLASH / CARDS["NVIDIA H200"].matrix)


def decode(shape: decode_step.Shape) -> Iterator[Row]:
    """The weights and the cache are read once; 13 launches a layer, replayed."""
    m = MODELS[shape.model]
    h, layers, wide, kv = m["hidden"], m["layers"], m["intermediate"], m["kv_heads"] * m["hidden"] // m["heads"]
    weights = layers * h * (2 * h + 2 * kv + 3 * wide) + h * m["vocab_size"]
    n = shape.prompts * shape.group
    cache = 4.0 * layers * kv * (shape.prompts * shape.prompt + n * shape.own)
    yield "decode_step", str(shape), FLOOR, Work(2.0 * n * weights, 2.0 * weights, 7 * layers + 1)
    yield "decode_step", str(shape), "ours", Work(2.0 * n * weights, 2.0 * weights + cache, 13 * layers)


def _weights(model: str) -> tuple[float, float]:
    """Weights of the text model with its head, and of the vision tower."""
    m = MODELS[model]
    h, wide, kv = m["hidden"], m["intermediate"], m["kv_heads"] * m["hidden"] // m["heads"]
    v = m["vision_hidden"]
    text = m["layers"] * h * (2 * h + 2 * kv + 3 * wide) + h * m["vocab_size"]
    return float(text), m["vision_layers"] * v * v * (4.0 + 2 * m["mlp_ratio"])


OPTIMIZER = 14.0  # bytes a weight: it and both moments read and written, its gradient read, all bf16


def joint(shape: joint_step.Shape) -> Iterator[Row]:
    """6 FLOP a weight and token, 2 a weight of the frozen tower and patch; twice the forward with a gradient cache."""
    text, vision = _weights(shape.model)
    patches = shape.pairs * sum(h * w for h, w in shape.images) / len(shape.images)
    tokens = patches / 4 + 2 * shape.pairs * (shape.prompt + shape.rewrite + 6)
    again = 2 if shape.micro else 1
    flops = (4 + 2 * again) * text * tokens + 2 * again * vision * patches
    yield "joint_step", str(shape), "ours", Work(flops, OPTIMIZER * text, 6240 * again, ahead=False)


def refine(shape: refine_step.Shape) -> Iterator[Row]:
    """Prompts once for decoding, all tokens for the reference (2 FLOP) and the policy (6); vision likewise, trained."""
    text, vision = _weights(shape.model)
    rows = shape.prompts * shape.group
    patches = shape.prompts * shape.image[0] * shape.image[1]
    prompts, tokens = shape.prompts * shape.prompt, shape.prompts * shape.prompt + rows * shape.rollout
    one = next(
        w for _, _, impl, w in decode(decode_step.Shape(shape.model, shape.prompts, shape.group, shape.prompt, 32))
    )
    flops = text * (2 * prompts + 8 * tokens) + vision * 10 * patches + shape.rollout * one.flops
    nbytes = OPTIMIZER * (text + vision) + shape.rollout * one.nbytes
    yield "refine_step", str(shape), "ours", Work(flops, nbytes, 10_000 + 40 * shape.rollout, ahead=False)


def predictions() -> list[Row]:
    """Every row of ours, and every floor, that the GPU benchmarks have."""
    rows = [
        row for shape in bench_logprob_pool.SHAPES["cuda"] if not (shape.frozen or shape.entropy) for row in head(shape)
    ]
    rows += [row for shape in bench_contrastive.SHAPES["cuda"] for row in contrast(shape)]
    rows += [row for shape in bench_reward.SHAPES["cuda"] for d in ("bfloat16", "float32") for row in rewards(shape, d)]
    rows += [row for shape in bench_attention.SHAPES["cuda"] for row in attention(shape)]
    rows += [row for shape in decode_step.SHAPES["cuda"] for row in decode(shape)]
    rows += [row for shape in joint_step.SHAPES["cuda"] for row in joint(shape)]
    return rows + [row for shape in refine_step.SHAPES["cuda"] for row in refine(shape)]


def measured(paths: list[Path]) -> dict[tuple[str, str, str, str], float]:
    """(device, bench, case, impl) -> ms, of all files, a later one's where several have a row."""
    found = {}
    for path in paths:
        stored = load(path)
        device = stored.environment["device"]
        found |= {(device, row.bench, row.case, row.impl): row.median_ms for row in stored.rows}
    return found


def table(paths: list[Path]) -> str:
    """The page's table; rows of one case together, a measured time where there is one."""
    known = measured(paths)
    cards = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}
    heads = " | ".join(f"{name} | measured | ratio" for name in cards.values())
    lines = [f"| case | row | GFLOP | MB beside | launches | {heads} |", "|---" * (5 + 3 * len(cards)) + "|"]
    for bench, case, impl, work in predictions():
        cells = f"{work.flops / 1e9:.0f} | {work.nbytes / 1e6:.0f} | {work.launches}"
        for device in cards:
            wanted, found = work.ms(CARDS[device]), known.get((device, bench, case, impl))
            last = "owed | " if found is None else f"{found:.2f} | {found / wanted:.2f}"
            cells += f" | {wanted:.2f} | {last}"
        lines.append(f"| {bench} {case} | {impl} | {cells} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="measured rows (default: those of benchmarks/results)")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args(words)
    made = table(arguments.results or STORED)
    if not arguments.write:
        print(made)
        return
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
