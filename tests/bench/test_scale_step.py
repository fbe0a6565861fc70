"""The whole-step models: FLOP of real steps, hand-made cases, and the times of the committed CPU run."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.lib import joint_step as measured
from benchmarks.scale import work
from benchmarks.scale.hardware import H100, Assumptions
from benchmarks.scale.joint import Load, Plan, Side, Step, joint_step
from benchmarks.scale.network import Cluster
from benchmarks.scale.refine import RefinePlan, decode, refine_step
from benchmarks.scale.shapes import ModelShape, checkpoint_shape, shape_of

TWO_B = checkpoint_shape("qwen2-vl-2b")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu"
ONE = Cluster(1, H100, Assumptions())


def cluster(gpus: int, **assume: float) -> Cluster:
    return Cluster(gpus, H100, Assumptions(**assume))  # type: ignore[arg-type]


def batch_load(s: measured.Setting) -> Load:
    """What the model needs to know of a batch at hand."""
    patches = Counter(h * w for _, h, w in s.batch["image_grids"])
    lengths = {length: float(n) for length, n in Counter(s.batch["lengths"]).items()}
    scored = float((s.batch["targets"] >= 0).sum())
    return Load(lengths, {size: float(n) for size, n in patches.items()}, scored)


def modelled(s: measured.Setting, kept: float, on: Cluster = ONE) -> tuple[ModelShape, Load, Step]:
    shape, load = shape_of(s.stock.config), batch_load(s)
    plan = Plan(pairs=s.n, micro_tokens=s.micro_tokens, cached=bool(s.shape.micro), kept=kept)
    return shape, load, joint_step(shape, on, plan, load)


def products(call: Any) -> float:
    """FLOP of every matrix product, those of attention and inside our operators too; convolutions are not counted."""
    names = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2), "aten::bmm": (0, 1)}
    names["mkldnn::_linear_pointwise"] = (0, 1)  # its second operand is transposed
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with sdpa_kernel(SDPBackend.MATH), torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        call()
    total = 0.0
    for event in profile.events():
        if event.name in names:
            first, second = (event.input_shapes[i] for i in names[event.name])
            total += 2.0 * math.prod(first) * second[0 if event.name.startswith("mkldnn") else -1]
    return total


@pytest.mark.parametrize("kept", [math.inf, 0.0])
def test_flops_of_a_joint_training_step(kept: float) -> None:
    """A real step of Qwen2-VL through the gradient cache, head and contrast included; within 2 % with every graph kept:
    the head pads its rows to 16, attention pads neighbours to one length, and a tiny batch has little of either.
    Otherwise within 5 %: the share that is encoded again comes in whole micro-batches."""
    s = measured.Setting(measured.SHAPES["tiny"][0], "cpu", torch.float32)
    shape, load, step = modelled(s, kept=1.0 if kept else 0.0)
    want = sum(part.flops for part in step.parts)
    want -= 2.0 * load.patches * shape.vision.width * shape.vision.volume  # the convolution that makes the patches
    # plain attention computes whole squares, in every pass
    passes = next(p.flops for p in step.parts if p.name == "forward again") / work_of(step, "forward") + 3
    squares = sum(n * n * count for n, count in load.lengths.items())
    want += passes * work.text_attention(shape.text, squares - load.scores)
    found = products(lambda: measured.ours(s, kept))
    assert found == pytest.approx(want, rel=0.02 if kept else 0.05)


def work_of(step: Step, name: str) -> float:
    return next(part.flops for part in step.parts if part.name == name)


def test_decoding_sums_its_steps() -> None:
    """The bytes of all steps one by one: weights, the prompts once a prompt, each rollout's own tokens."""
    plan = RefinePlan(pairs=16, query=Side(rewrite=5), target=Side(text=20, pixels=0, rewrite=9), rollouts=4)
    text, want = TWO_B.text, 0.0
    token = 2 * 2 * text.layers * text.key
    image = TWO_B.patches(448 * 448) // 4
    for t in range(1, 10):
        want += 2 * (text.layers * text.layer_matrix + text.table)
        want += token * 2 * ((48 + image if t <= 5 else 0) + 20 + 4 * t * (2 if t <= 5 else 1))
    assert decode(TWO_B, cluster(8), plan).nbytes == pytest.approx(want)


def test_decoding_is_as_slow_as_its_slowest_cause() -> None:
    plan = RefinePlan(pairs=64)
    by_launches = decode(TWO_B, cluster(64), plan).seconds
    assert by_launches == pytest.approx(64 * 28 * 20 * 4e-6)
    graphs = decode(TWO_B, cluster(64), replace(plan, cuda_graphs=True))
    assert graphs.seconds == pytest.approx(graphs.nbytes / (3.35e12 * 0.8))
    crowd = decode(TWO_B, cluster(64), replace(plan, pairs=64 * 64, cuda_graphs=True))
    assert crowd.seconds > crowd.nbytes / (3.35e12 * 0.8)


def test_kept_graphs_save_the_second_encoding_and_cost_memory() -> None:
    plan = Plan(pairs=8192)
    steps = [joint_step(TWO_B, cluster(64), replace(plan, kept=kept)) for kept in (0.0, 0.5, 1.0)]
    again = [work_of(step, "forward again") for step in steps]
    assert again[0] > again[1] > again[2] == 0
    assert again[0] == pytest.approx(work_of(steps[0], "forward") * (1 - 1 / steps[0].micro_batches))
    assert steps[0].memory["graphs"] < steps[1].memory["graphs"] < steps[2].memory["graphs"]
    plain = joint_step(TWO_B, cluster(64), replace(plan, cached=False))
    assert work_of(plain, "forward again") == 0
    assert plain.memory["graphs"] == pytest.approx(steps[2].memory["graphs"])


def test_checkpointing_encodes_once_more_for_less_memory() -> None:
    plan = Plan(pairs=8192, kept=1.0)
    whole, slim = (joint_step(TWO_B, cluster(64), replace(plan, checkpointing=c)) for c in (False, True))
    assert work_of(slim, "forward again") == work_of(slim, "forward")
    assert slim.memory["graphs"] < 0.1 * whole.memory["graphs"]


def test_communication_hides_behind_computation_until_it_is_longer() -> None:
    """Small micro-batches leave no room for the gathers of ZeRO-3; nothing hides where nothing may."""
    plan = Plan(pairs=64 * 64, strategy="zero3")
    large = joint_step(TWO_B, cluster(64), plan)
    small = joint_step(TWO_B, cluster(64), replace(plan, micro_tokens=1024))
    bare = joint_step(TWO_B, cluster(64, overlap=0.0), plan)

    def gathers(step: Step) -> Any:
        return next(part for part in step.parts if part.name == "parameter gathers")

    assert gathers(large).seconds == 0 < gathers(large).alone
    assert 0 < gathers(small).seconds < gathers(small).alone
    assert gathers(bare).seconds == pytest.approx(gathers(bare).alone)


def test_the_contrast_grows_with_the_ranks_and_the_rest_does_not() -> None:
    steps = {gpus: joint_step(TWO_B, cluster(gpus), Plan(pairs=256 * gpus)) for gpus in (64, 512)}
    assert work_of(steps[512], "contrast") == pytest.approx(8 * work_of(steps[64], "contrast"))
    assert work_of(steps[512], "backward") == work_of(steps[64], "backward")
    exchange = {gpus: step.share("contrast exchange") for gpus, step in steps.items()}
    assert exchange[512] > 6 * exchange[64]


def test_a_ring_takes_over_where_gathered_keys_would_not_fit() -> None:
    few = joint_step(TWO_B, cluster(64), Plan(pairs=2**16))
    many = joint_step(TWO_B, cluster(64), Plan(pairs=2**21))
    keys = 2 * 1536 * 4 * 2**21
    assert many.memory["head or contrast"] < keys < 2**21 / 2**16 * few.memory["head or contrast"]


def test_a_shared_prefix_saves_the_repeated_prompts() -> None:
    plan = RefinePlan(pairs=512)
    shared = refine_step(TWO_B, cluster(64), plan)
    repeated = refine_step(TWO_B, cluster(64), replace(plan, shared_prefix=False))
    assert shared.tokens == 2 * 512 * (48 + 256 - 1 + 8 * 65)
    assert repeated.tokens == 2 * 512 * 8 * (48 + 256 + 64)
    assert shared.seconds < repeated.seconds
    # the frozen tower runs once; on its own for prefill and for every rollout's reference and policy otherwise
    trunk = work.vision_linear(TWO_B.vision, 16 * 1024) + work.vision_attention(TWO_B.vision, [1024] * 16)
    merging = work.merging(TWO_B.vision, 16 * 1024)
    assert work_of(shared, "vision") == pytest.approx(trunk + 5 * merging)
    assert work_of(repeated, "vision") == pytest.approx(17 * trunk + (1 + 4 * 8) * merging)
    sharded = refine_step(TWO_B, cluster(64), replace(plan, strategy="fsdp2"))
    assert work_of(sharded, "vision") == pytest.approx(2 * trunk + 5 * merging)


def test_refine_micro_batches_hold_less_and_gather_more() -> None:
    plan = RefinePlan(pairs=512, strategy="zero3")
    whole, parts = (refine_step(TWO_B, cluster(64), replace(plan, micro_tokens=m)) for m in (None, 4096))
    assert whole.micro_batches == 1
    assert parts.micro_batches == math.ceil(2 * 8 * (48 + 256 - 1 + 8 * 65) / 4096)
    assert parts.memory["cache or graph"] < 0.5 * whole.memory["cache or graph"]
    sent = [next(p.sent for p in step.parts if p.name == "parameter gathers") for step in (whole, parts)]
    assert sent[1] == pytest.approx(parts.micro_batches * sent[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: joint_step(TWO_B, cluster(64), Plan(pairs=32)), "pairs is 32; expected at least one for each"),
        (lambda: refine_step(TWO_B, cluster(64), RefinePlan(pairs=32)), "pairs is 32; expected at least one for each"),
        (lambda: Plan(kept=1.5), "kept is 1.5"),
        (lambda: Plan(pairs=0), "pairs is 0"),
        (lambda: Plan(micro_tokens=0), "micro_tokens is 0"),
        (lambda: RefinePlan(rollouts=1), "rollouts is 1"),
        (lambda: RefinePlan(micro_tokens=0), "micro_tokens is 0"),
        (lambda: Assumptions(matmul=0.0), "matmul is 0.0"),
        (lambda: Assumptions(overlap=1.1), "overlap is 1.1"),
    ],
)
def test_bad_plans_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_times_of_the_committed_cpu_run() -> None:
    """From the matrix rate that the same run measured, a real step takes 1 to 3 times what the model says: the rest is
    norms, activations, the optimizer and the launches of small products, which the model leaves out."""
    rows = [row for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text())["rows"]]
    rates = [row["tflops"] for row in rows if row["bench"] == "ceiling" and row["tflops"]]
    steps = [row for row in rows if row["bench"] == "joint_step" and row["impl"] in ("ours", "ours_kept")]
    assert rates, f"no ceiling rows in {RESULTS} (make bench writes them)"
    assert steps, f"no joint_step rows in {RESULTS} (make bench writes them)"
    cpu = replace(H100, flops=max(rates) * 1e12, hbm=50e9)
    on = Cluster(1, cpu, Assumptions(matmul=1.0, attention=1.0, hbm=1.0))
    for row in steps:
        given = next(shape for shape in measured.SHAPES["cpu"] if str(shape) == row["case"])
        s = measured.Setting(given, "cpu", torch.float32)
        step = modelled(s, kept=1.0 if row["impl"] == "ours_kept" else 0.0, on=on)[2]
        ratio = row["median_ms"] / 1e3 / step.seconds
        assert 1.0 < ratio < 3.0, f"{row['case']} {row['impl']}: {ratio:.2f} times the model"
