"""From the ablation's cells to one report: means, deviations, and the claims they are there to test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Cells = Mapping[tuple[str, int], Any]

# Report key -> cell, in the order of the tables.
ROWS = {
    "sft": "noisy",
    "refine": "refine",
    "anchors_policy": "anchors_policy",
    "ume_r1": "ume_r1",
    "random": "random",
    "format_only": "format_only",
    "length_only": "length_only",
    "more_sft": "more_sft",
    "best_of_8": "best_of_8",
    "whole": "whole",
    "clean": "clean",
    "no_cma": "no_cma",
    "cot": "cot",
    "control": "control",
}
CONTROLS = ("random", "format_only", "length_only", "more_sft")


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Sum values over seeds up: their mean, deviation of a sample (0 for one value) and the values themselves."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "values": list(values)}


def summarise(cells: Cells, seeds: Sequence[int], n_test: int) -> dict[str, Any]:
    """Make the report of ``run_ablation`` without its settings and environment. cells: (name, seed)
    -> a cell's JSON."""
    report: dict[str, Any] = {}
    for key, name in ROWS.items():
        found = [cells[name, seed] for seed in seeds]
        report[key] = {pair: summary([one["hit@1"][pair] for one in found]) for pair in found[0]["hit@1"]}
    report["rewrite_tokens"] = {
        key: summary([cells[name, seed]["query_tokens"] for seed in seeds]) for key, name in ROWS.items()
    }
    report["format_errors"] = {
        key: [cells[name, seed]["format_errors"] for seed in seeds] for key, name in ROWS.items()
    }
    report["seconds"] = {
        key: {phase: summary([cells[name, seed]["seconds"][phase] for seed in seeds]) for phase in one["seconds"]}
        for key, name in ROWS.items()
        for one in [cells[name, seeds[0]]]
    }
    return report | {"claims": claims(report), "seeds": list(seeds), "n_test": n_test}


def claims(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each claim with its measured value (a difference or a ratio of means over seeds), what it needs, and whether
    it holds."""

    def hit(key: str, pair: str = "gen-gen") -> float:
        return report[key][pair]["mean"]

    tokens = {key: one["mean"] for key, one in report["rewrite_tokens"].items()}
    rows = [
        ("a. a rewrite helps: clean gen-gen - disc-disc", hit("clean") - hit("clean", "disc-disc"), ">=", 0.30),
        ("a. and not its tokens alone: clean gen-gen - control gen-gen", hit("clean") - hit("control"), ">=", 0.30),
        (
            "b. modes are interchangeable: clean gen-disc - gen-gen",
            hit("clean", "gen-disc") - hit("clean"),
            ">=",
            -0.05,
        ),
        ("b. by CMA: no_cma gen-disc - gen-gen", hit("no_cma", "gen-disc") - hit("no_cma"), "<=", -0.20),
        (
            "b. by CMA: clean gen-disc - no_cma gen-disc",
            hit("clean", "gen-disc") - hit("no_cma", "gen-disc"),
            ">=",
            0.20,
        ),
        ("c. Refine-RL teaches what retrieves: refine gen-gen - sft gen-gen", hit("refine") - hit("sft"), ">=", 0.50),
        *(
            (
                f"c. and not by its compute or form: refine gen-gen - {name} gen-gen",
                hit("refine") - hit(name),
                ">=",
                0.30,
            )
            for name in CONTROLS
        ),
        (
            "c. disc is left alone: |refine disc-disc - sft disc-disc|",
            abs(hit("refine", "disc-disc") - hit("sft", "disc-disc")),
            "<=",
            2 * max(report[key]["disc-disc"]["std"] for key in ("sft", "refine")),
        ),
        ("d. rewrites are cheap: cot tokens / clean rewrite tokens", tokens["cot"] / tokens["clean"], ">=", 2.0),
        ("d. and as good: clean gen-gen - cot gen-gen", hit("clean") - hit("cot"), ">=", -0.02),
    ]
    return [
        {
            "claim": text,
            "value": value,
            "needs": f"{sign} {bound:.2f}",
            "holds": value >= bound if sign == ">=" else value <= bound,
        }
        for text, value, sign, bound in rows
    ]
