"""The questions the scale model is there for, as curves: plain numbers, ready for JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.scale.hardware import Assumptions, Hardware
from benchmarks.scale.joint import Plan, Side, joint_step
from benchmarks.scale.network import Cluster
from benchmarks.scale.refine import RefinePlan, refine_step
from benchmarks.scale.shapes import ModelShape

GPUS = (8, 16, 32, 64, 128, 256, 512)
BEGINS = 0.05  # of the step: from here on a part counts as a cost
SHORT = Side(text=64, pixels=0, rewrite=0)  # a caption or a question without image and rewrite


def line(label: str, xs: Sequence[float], ys: Sequence[float], dashed: bool = False) -> dict[str, Any]:
    return {"label": label, "x": list(xs), "y": list(ys), "dashed": dashed}


def throughput(shape: ModelShape, make: Callable[[int], Cluster], plan: Plan, own: int) -> list[dict[str, Any]]:
    """Pairs a second and GPU against GPUs, ``own`` pairs a GPU; micro-batches of the plan and of an eighth of it."""
    lines = []
    for strategy in ("ddp", "fsdp2", "zero3"):
        for micro, dashed in ((plan.micro_tokens, False), (max(1, plan.micro_tokens // 8), True)):
            rates = []
            for gpus in GPUS:
                step = joint_step(
                    shape, make(gpus), replace(plan, pairs=own * gpus, strategy=strategy, micro_tokens=micro)
                )
                rates.append(step.samples / step.seconds / gpus)
            lines.append(line(f"{strategy}, {micro} tokens a micro-batch", GPUS, rates, dashed))
    return lines


def contrast_share(shape: ModelShape, make: Callable[[int], Cluster], plan: Plan) -> list[dict[str, Any]]:
    """Share of the step that contrast and exchange take, against GPUs: the plan's pairs, and short texts."""
    lines = []
    for name, query, target in (("image + rewrite", plan.query, plan.target), ("64 text tokens", SHORT, SHORT)):
        for own in (64, 512, 4096):
            shares = []
            for gpus in GPUS:
                given = replace(plan, pairs=own * gpus, query=query, target=target)
                shares.append(joint_step(shape, make(gpus), given).share("contrast", "contrast exchange"))
            lines.append(line(f"{name}, {own} pairs a GPU", GPUS, shares, name != "image + rewrite"))
    return lines


def contrast_begins(shape: ModelShape, make: Callable[[int], Cluster], plan: Plan, gpus: int) -> int | None:
    """Fewest pairs (all ranks, a power of two a GPU) whose contrast and exchange take ``BEGINS``; None up to 2^24."""
    own = 1
    while own * gpus <= 2**24:
        step = joint_step(shape, make(gpus), replace(plan, pairs=own * gpus))
        if step.share("contrast", "contrast exchange") >= BEGINS:
            return own * gpus
        own *= 2
    return None


def decode_share(shape: ModelShape, cluster: Cluster, plan: RefinePlan) -> list[dict[str, Any]]:
    """Share of a Refine-RL step spent decoding, against the length of a rewrite."""
    lengths = (16, 32, 64, 128, 256, 512, 1024, 2048)
    lines = []
    for own in (1, 4, 16):
        for graphs in (False, True):
            shares = []
            for length in lengths:
                sides = {name: replace(getattr(plan, name), rewrite=length) for name in ("query", "target")}
                given = replace(plan, pairs=own * cluster.gpus, cuda_graphs=graphs, **sides)
                shares.append(refine_step(shape, cluster, given).share("decode"))
            label = f"{own} pairs a GPU" + (", CUDA graphs" if graphs else "")
            lines.append(line(label, lengths, shares, graphs))
    return lines


def kept_graphs(shape: ModelShape, cluster: Cluster, plan: Plan) -> list[dict[str, Any]]:
    """Seconds of a step against the GiB of a rank as more graphs are kept, with and without checkpointing."""
    lines = []
    for checkpointing in (False, True):
        xs, ys = [], []
        for tenth in range(11):
            step = joint_step(shape, cluster, replace(plan, kept=tenth / 10, checkpointing=checkpointing))
            xs.append(step.peak / 2**30)
            ys.append(step.seconds)
        lines.append(line("checkpointing" if checkpointing else "whole graphs", xs, ys, checkpointing))
    return lines


def all_curves(
    shape: ModelShape, hardware: Hardware, assume: Assumptions, plan: Plan, refine: RefinePlan, own: int
) -> dict[str, Any]:
    """Every curve of the page, with the points where a part begins to cost. own: pairs a GPU of joint training."""

    def make(gpus: int) -> Cluster:
        return Cluster(gpus, hardware, assume)

    begins = [
        {"pairs": name, "gpus": gpus, "from": contrast_begins(shape, make, replace(plan, query=q, target=t), gpus)}
        for name, q, t in (("image + rewrite", plan.query, plan.target), ("64 text tokens", SHORT, SHORT))
        for gpus in (8, 64, 512)
    ]
    return {
        "throughput": throughput(shape, make, plan, own),
        "contrast_share": contrast_share(shape, make, plan),
        "contrast_begins": {"share": BEGINS, "points": begins},
        "decode_share": decode_share(shape, make(64), refine),
        "kept_graphs": kept_graphs(shape, make(64), replace(plan, pairs=own * 64)),
        "hbm_gib": hardware.memory / 2**30,
    }
