"""``python -m benchmarks.scale``: the tables of the scale model, its JSON and its curves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scale.curves import GPUS, all_curves
from benchmarks.scale.hardware import H100, Assumptions
from benchmarks.scale.joint import Plan, Side, Step, joint_step
from benchmarks.scale.network import Cluster
from benchmarks.scale.refine import RefinePlan, refine_step
from benchmarks.scale.shapes import ModelShape, checkpoint_shape

SCHEMA = 1
NOTE = "MODELLED, NOT MEASURED: counted FLOP and bytes divided by assumed rates"


@dataclass
class ScaleOptions:
    """Options of ``python -m benchmarks.scale``."""

    model: str = field(
        default="qwen2-vl-2b",
        metadata={"help": "qwen2-vl-2b, qwen2-vl-7b, qwen2.5-vl-3b, qwen2.5-vl-7b, qwen3-vl-2b or qwen3-vl-8b."},
    )
    strategy: str = field(default="zero3", metadata={"help": "ddp, fsdp2, zero1, zero2 or zero3."})
    gpus: list[int] = field(default_factory=lambda: list(GPUS), metadata={"help": "Numbers of GPUs: whole nodes."})
    pairs_per_gpu: int = field(default=128, metadata={"help": "Pairs a GPU in a joint-training step."})
    micro_batch_tokens: int = field(default=16_384, metadata={"help": "Tokens of a micro-batch, of both steps."})
    kept: float = field(default=0.0, metadata={"help": "Share of the micro-batches whose graphs are kept, 0 to 1."})
    checkpointing: bool = field(default=True, metadata={"help": "Activation checkpointing."})
    text_tokens: int = field(default=48, metadata={"help": "Text tokens of a prompt."})
    pixels: int = field(default=200_704, metadata={"help": "Pixels of a side's image (448 x 448); 0: none."})
    rewrite_tokens: int = field(default=64, metadata={"help": "Tokens of a rewrite."})
    refine_pairs_per_gpu: int = field(default=8, metadata={"help": "Pairs a GPU in a Refine-RL step."})
    rollouts: int = field(default=8, metadata={"help": "G, rewrites sampled for each prompt."})
    matmul: float = field(default=0.6, metadata={"help": "ASSUMED share of the peak FLOP/s in matrix products."})
    attention: float = field(default=0.4, metadata={"help": "ASSUMED share of the peak FLOP/s in attention."})
    network: float = field(default=0.75, metadata={"help": "ASSUMED share of NVLink and InfiniBand bandwidth."})
    hbm: float = field(default=0.8, metadata={"help": "ASSUMED share of the memory bandwidth."})
    overlap: float = field(default=1.0, metadata={"help": "ASSUMED share of the communication that can hide and does."})
    output: str | None = field(
        default=None, metadata={"help": "Folder for scale-MODEL.json and, drawn from it, scale-MODEL.svg."}
    )


def report(options: ScaleOptions) -> int:
    """Print both tables; with ``output`` also write JSON and curves. Raises ValueError for options that do not fit."""
    made = make_report(options)
    print_report(made)
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"scale-{options.model}.json"
        path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        from benchmarks.scale.plots import plot_scale

        print(f"{path}\n{plot_scale(path)}")
    return 0


def make_report(options: ScaleOptions) -> dict[str, Any]:
    """All tables and curves of the options as plain data (schema 1)."""
    if not options.gpus:
        raise ValueError("gpus is empty; expected at least one number of GPUs")
    shape = checkpoint_shape(options.model)
    assume = Assumptions(
        matmul=options.matmul,
        attention=options.attention,
        network=options.network,
        hbm=options.hbm,
        overlap=options.overlap,
    )
    side = Side(options.text_tokens, options.pixels, options.rewrite_tokens)
    own, refine_own = options.pairs_per_gpu, options.refine_pairs_per_gpu

    def joint_plan(gpus: int) -> Plan:
        return Plan(
            own * gpus,
            side,
            side,
            options.strategy,
            options.micro_batch_tokens,
            kept=options.kept,
            checkpointing=options.checkpointing,
        )

    def refine_plan(gpus: int) -> RefinePlan:
        return RefinePlan(
            refine_own * gpus,
            side,
            side,
            options.rollouts,
            strategy=options.strategy,
            checkpointing=options.checkpointing,
            micro_tokens=options.micro_batch_tokens,
        )

    clusters = [Cluster(gpus, H100, assume) for gpus in options.gpus]
    return {
        "schema": SCHEMA,
        "note": NOTE,
        "options": asdict(options),
        "hardware": asdict(H100),
        "assumptions": asdict(assume),
        "model": describe(shape),
        "joint": [row(cluster, joint_step(shape, cluster, joint_plan(cluster.gpus))) for cluster in clusters],
        "refine": [row(cluster, refine_step(shape, cluster, refine_plan(cluster.gpus))) for cluster in clusters],
        "curves": all_curves(shape, H100, assume, joint_plan(1), refine_plan(1), own),
    }


def describe(shape: ModelShape) -> dict[str, Any]:
    """The parameter counts."""
    vision = shape.vision.trunk + shape.vision.merging
    return {"name": shape.name, "parameters": shape.parameters, "vision": vision, "trained": shape.trained()}


def row(cluster: Cluster, step: Step) -> dict[str, Any]:
    """One step as plain data: seconds, bytes sent and FLOP of each part of one rank, memory by use."""
    return {
        "gpus": cluster.gpus,
        "seconds": step.seconds,
        "samples": step.samples,
        "tokens": step.tokens,
        "micro_batches": step.micro_batches,
        "fits": step.peak <= cluster.hardware.memory,
        "parts": {part.name: asdict(part) for part in step.parts},
        "memory": step.memory,
    }


def print_report(report: dict[str, Any]) -> None:
    """Both tables, for people."""
    model, hardware = report["model"], report["hardware"]
    print(f"{report['note']}.")
    print(
        f"{hardware['name']}, {hardware['gpus_per_node']} a node ({hardware['source']}); assumed: "
        + ", ".join(f"{name} {value:g}" for name, value in report["assumptions"].items())
    )
    print(
        f"{model['name']}: {model['parameters'] / 1e9:.2f} billion parameters, {model['vision'] / 1e9:.2f} of them "
        f"vision, {model['trained'] / 1e9:.2f} trained"
    )
    options = report["options"]
    print(f"\njoint training, {options['strategy']}, {options['pairs_per_gpu']} pairs a GPU: milliseconds of a step")
    print_table(report["joint"], "pairs")
    print(
        f"\nRefine-RL, {options['strategy']}, {options['refine_pairs_per_gpu']} pairs a GPU x 2 sides x "
        f"{options['rollouts']} rollouts: milliseconds of a step"
    )
    print_table(report["refine"], "rollouts")
    begins = report["curves"]["contrast_begins"]
    print(f"\ncontrast and its exchange reach {begins['share']:.0%} of a joint step at")
    for point in begins["points"]:
        found = f"{point['from']:,} pairs" if point["from"] else "no batch up to 16 million pairs"
        print(f"  {point['gpus']:>4} GPUs, {point['pairs']}: {found}")


def print_table(rows: list[dict[str, Any]], unit: str) -> None:
    """One column a number of GPUs."""
    names = list(rows[0]["parts"])
    print(f"{'GPUs':<28}" + "".join(f"{one['gpus']:>10}" for one in rows))
    for name in names:
        print(f"{name:<28}" + "".join(f"{1e3 * one['parts'][name]['seconds']:>10.1f}" for one in rows))
    print(f"{'step':<28}" + "".join(f"{1e3 * one['seconds']:>10.1f}" for one in rows))
    print(f"{unit + ' a second':<28}" + "".join(f"{one['samples'] / one['seconds']:>10.0f}" for one in rows))
    sent = [sum(part["sent"] for part in one["parts"].values()) for one in rows]
    print(f"{'GB sent by a GPU':<28}" + "".join(f"{one / 1e9:>10.2f}" for one in sent))
    peaks = [sum(one["memory"].values()) / 2**30 for one in rows]
    marks = [" " if one["fits"] else "!" for one in rows]
    cells = "".join(f"{peak:>9.1f}{mark}" for peak, mark in zip(peaks, marks, strict=True))
    print(f"{'GiB of a GPU (!: too many)':<28}{cells}")
