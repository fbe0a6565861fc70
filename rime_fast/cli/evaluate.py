"""``rime-fast eval``: mutual retrieval on a retrieval set, as a table, JSON and HTML."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rime_fast.cli.command import Command, model_exists, required
from rime_fast.cli.eval_options import EvalOptions, split
from rime_fast.cli.loading import EmbedderOptions, load_embedder
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build

if TYPE_CHECKING:
    from rime_fast.data.retrieval import RetrievalSet
    from rime_fast.eval.mutual import MutualResult


def run(values: dict[str, Any]) -> int:
    """Evaluate each model; write the report."""
    if values.get("suite"):
        from rime_fast.cli.eval_suites import run_suite

        if "int8" in split(values.get("dims") or []):
            raise UsageError("--dims int8 goes with --data")
        return run_suite(values)
    if values.get("mteb"):
        from rime_fast.cli.eval_mteb import run_mteb
        from rime_fast.cli.eval_suites import SuiteOptions

        if values.get("dims"):
            raise UsageError("--dims goes with --data or --suite")
        modes = split(values.get("modes") or []) or ["disc", "gen"]
        return run_mteb(values, split(values["mteb"]), modes, build(SuiteOptions, values).download)
    if stray := sorted(set(Group("", "rime_fast.cli.eval_suites", "SuiteOptions").options()) & values.keys()):
        raise UsageError(f"--{stray[0]} goes with --suite")
    required(values, "model", "data")
    options, loading = build(EvalOptions, values), build(EmbedderOptions, values)
    model_exists(*options.model)
    from rime_fast.cli.bars import bars
    from rime_fast.data.retrieval import RetrievalSet
    from rime_fast.engine.checkpoint import check_writable
    from rime_fast.engine.wrappers import dual_mode_of
    from rime_fast.eval.mutual import evaluate_mutual
    from rime_fast.eval.report import write_report
    from rime_fast.recipe.int8 import trained_step

    data = RetrievalSet.from_file(
        str(options.data),
        image_root=loading.image_root,
        allow_outside=loading.allow_outside,
        images="head",
        max_pixels=loading.max_image_pixels,
    )
    if options.limit is not None:
        data = _first(data, options.limit)
    if not data.queries:
        raise UsageError(f"--data {options.data} holds no queries")
    check_writable(options.output_dir)
    phases = []
    for path in options.model:
        embedder = load_embedder(path, loading)
        with bars() as progress:
            result = evaluate_mutual(
                embedder,
                data,
                modes=split(options.modes) or None,
                top_k=options.top_k,
                n_examples=options.examples,
                dims=options.widths(),
                int8_step=trained_step(dual_mode_of(embedder.model).config) if options.int8() else None,
                progress=progress,
            )
        label = Path(path).name or path
        print(table(path, result))
        phases.append({"name": path, "label": label, "mutual": result.to_dict(), "log_history": history(path)})
        device = str(embedder.device)
        del embedder
    facts = {
        "model": ", ".join(options.model),
        "data": data.name or options.data,
        "queries": len(data.queries),
        "candidates": len(data.candidates),
        "template": loading.template,
        "device": device,
        "machine": _machine(),
    }
    title = options.title or f"Mutual retrieval on {data.name or Path(str(options.data)).name}"
    report: dict[str, Any] = {"title": title, "facts": facts, "phases": phases}
    if options.widths() or options.int8():
        report["tables"] = [widths_table(phases)]
    paths = write_report(options.output_dir, report)
    print(f"report: {paths[1]}\nnumbers: {paths[0]}")
    return 0


def table(name: str, result: MutualResult) -> str:
    """The table as text."""
    plain = result.to_dict()["cells"]
    columns = (
        ("hit@1", "hit@1", "8.3f"),
        ("mrr", "MRR", "8.3f"),
        ("ndcg@10", "nDCG@10", "9.3f"),
        ("query_tokens", "tokens/query", "14.1f"),
        ("target_tokens", "tokens/target", "15.1f"),
        ("query_seconds", "s/query", "10.4f"),
        ("target_seconds", "s/target", "10.4f"),
    )
    lines = [
        name,
        f"{'query-target':<14}" + "".join(f"{title:>{int(form.split('.')[0])}}" for _, title, form in columns),
    ]
    lines += [f"{cell:<14}" + "".join(f"{row[key]:{form}}" for key, _, form in columns) for cell, row in plain.items()]
    for width, cells in result.dims.items():
        lines += [
            f"{f'{name} @ {width}':<14}" + "".join(f"{cell[key]:{form}}" for key, _, form in columns[:3])
            for name, cell in cells.items()
        ]
    missing = sum(result.missing_gen.values())
    if missing:
        lines.append(f"{missing} generations never reached <gen_emb>; their last state stood in")
    lines += [figure.line() for figure in (result.budget, result.sensitivity) if figure is not None]
    return "\n".join(lines)


def widths_table(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collect hit@1 of each width of each model, for the report."""
    cells = list(phases[0]["mutual"]["cells"])
    rows: list[list[Any]] = []
    for phase in phases:
        whole = {name: cell["hit@1"] for name, cell in phase["mutual"]["cells"].items()}
        for width, found in phase["mutual"]["dims"].items():
            rows.append([phase["label"], str(width), *(float(found[name]["hit@1"]) for name in cells)])
        rows.append([phase["label"], "full", *(float(whole[name]) for name in cells)])
    note = "hit@1; rows are cut to so many numbers and normalised again, or rounded to int8."
    return {"title": "Width", "columns": ["model", "numbers", *cells], "rows": rows, "note": note}


def history(path: str) -> list[dict[str, Any]]:
    """The log history that a trainer left beside the model, for the report's curves; [] where there is none."""
    state = Path(path, "trainer_state.json")
    return json.loads(state.read_text(encoding="utf-8")).get("log_history", []) if state.is_file() else []


def _first(data: RetrievalSet, count: int) -> RetrievalSet:
    from dataclasses import replace

    def head(values: Sequence[Any] | None) -> Any:
        return None if values is None else values[:count]

    return replace(
        data, queries=head(data.queries), correct=head(data.correct), pools=head(data.pools), gains=head(data.gains)
    )


def _machine() -> str:
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{platform.machine()}, {where}, torch {torch.__version__}"


COMMAND = Command(
    name="eval",
    text="Embeds queries and candidates in every mode of the model and ranks all pairings: hit@1, MRR, nDCG@10, "
    "decoded tokens and seconds per item, so that accuracy and cost are one look. Writes report.json and a "
    "self-contained report.html (heat map, accuracy against tokens, the model's training curves, examples with their "
    "first candidates). With --suite: a published benchmark, resumable and shared between processes; per-group tables "
    "and a leaderboard entry.",
    examples=(
        ("one model", "rime-fast eval --model runs/sft --data test.json --output_dir runs/eval"),
        ("before and after Refine-RL, in one report", "rime-fast eval --model runs/sft runs/refine --data test.json"),
        ("Matryoshka widths, in one pass", "rime-fast eval --model runs/sft --data test.json --dims 64,256,full"),
        ("what int8 costs", "rime-fast eval --model runs/sft --data test.json --dims int8,full"),
        ("without decoding", "rime-fast eval --model runs/sft --data test.json --modes disc"),
        ("whether a benchmark's files are there", "rime-fast eval --suite mmeb-v2 --root MMEB-V2 --check"),
        ("a published benchmark", "rime-fast eval --suite mmeb-v2 --root MMEB-V2 --model runs/refine"),
        ("tasks of mteb", "rime-fast eval --mteb VidoreArxivQARetrieval --model runs/refine --modes disc --download"),
    ),
    run=run,
    groups=(
        Group("What", "rime_fast.cli.eval_options", "EvalOptions"),
        Group("Suite", "rime_fast.cli.eval_suites", "SuiteOptions"),
        Group("How", "rime_fast.cli.loading", "EmbedderOptions"),
    ),
)
