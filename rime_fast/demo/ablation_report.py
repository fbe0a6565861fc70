"""From the ablation's cells to one report: means, deviations, and the claims they are there to test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Cells = Mapping[tuple[str, int], Any]

# Report key -> (cell, phase of the cell).
PHASES = {
    "sft": ("full", "sft"),
    "refine": ("full", "refine"),
    "no_cma": ("no_cma", "sft"),
    "cot": ("cot", "sft"),
    "control": ("control", "sft"),
}
# Equal accuracy, for the claim about length: a loss of at most this much hit@1.
_EQUAL = 0.01


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, deviation of a sample (0 for one value) and the values themselves."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "values": list(values)}


def summarise(cells: Cells, seeds: Sequence[int], n_test: int) -> dict[str, Any]:
    """The report of ``run_ablation`` without its settings and environment. cells: (name, seed) -> a cell's JSON."""
    report: dict[str, Any] = {}
    for key, (name, phase) in PHASES.items():
        found = [cells[name, seed][phase] for seed in seeds]
        report[key] = {pair: summary([one["hit@1"][pair] for one in found]) for pair in found[0]["hit@1"]}
    report["rewrite_tokens"] = {
        key: summary([cells[name, seed][phase]["query_tokens"] for seed in seeds])
        for key, (name, phase) in PHASES.items()
    }
    report["format_errors"] = {
        key: [cells[name, seed][phase]["format_errors"]["query"] for seed in seeds]
        for key, (name, phase) in PHASES.items()
    }
    report["seconds"] = {
        name: {phase: summary([cells[name, seed]["seconds"][phase] for seed in seeds]) for phase in one["seconds"]}
        for (name, seed), one in cells.items()
        if seed == seeds[0]
    }
    return report | {"claims": claims(report), "seeds": list(seeds), "n_test": n_test}


def claims(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each claim with its measured value (a difference or a ratio of means over seeds), what it needs, and whether
    it holds."""

    def hit(key: str, pair: str = "gen-gen") -> float:
        return report[key][pair]["mean"]

    tokens = {key: one["mean"] for key, one in report["rewrite_tokens"].items()}
    gained = hit("refine") - hit("sft")
    kept = tokens["refine"] / tokens["sft"]
    rows = [
        ("a. a rewrite helps: sft gen-gen - disc-disc", hit("sft") - hit("sft", "disc-disc"), ">=", 0.30),
        ("a. and not its tokens alone: sft gen-gen - control gen-gen", hit("sft") - hit("control"), ">=", 0.30),
        ("b. modes are interchangeable: sft gen-disc - gen-gen", hit("sft", "gen-disc") - hit("sft"), ">=", -0.05),
        ("b. by CMA: no_cma gen-disc - gen-gen", hit("no_cma", "gen-disc") - hit("no_cma"), "<=", -0.20),
        ("b. by CMA: sft gen-disc - no_cma gen-disc", hit("sft", "gen-disc") - hit("no_cma", "gen-disc"), ">=", 0.20),
        ("d. rewrites are cheap: cot tokens / sft rewrite tokens", tokens["cot"] / tokens["sft"], ">=", 2.0),
        ("d. and as good: sft gen-gen - cot gen-gen", hit("sft") - hit("cot"), ">=", -0.02),
    ]
    found = [
        {
            "claim": text,
            "value": value,
            "needs": f"{sign} {bound:.2f}",
            "holds": value >= bound if sign == ">=" else value <= bound,
        }
        for text, value, sign, bound in rows
    ]
    found += [
        {
            "claim": "c. Refine-RL helps: gain of gen-gen (or shorter at equal accuracy, next line)",
            "value": gained,
            "needs": f">= 0.03, or >= -{_EQUAL} with tokens at most 0.8 of sft's",
            "holds": gained >= 0.03 or (gained >= -_EQUAL and kept <= 0.8),
        },
        {
            "claim": "c. tokens of a refined rewrite / of sft's",
            "value": kept,
            "needs": f"<= 0.80 with gen-gen within {_EQUAL}, or a gain >= 0.03",
            "holds": gained >= 0.03 or (gained >= -_EQUAL and kept <= 0.8),
        },
    ]
    return sorted(found, key=lambda claim: claim["claim"])
