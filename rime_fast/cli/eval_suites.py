"""``rime-fast eval --suite ...`` and ``rime-fast eval suites``: published benchmarks."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rime_fast.cli.command import Command, model_exists, required
from rime_fast.cli.eval_options import EvalOptions, split
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build

if TYPE_CHECKING:
    from rime_fast.eval.suites import Suite

NAMES = ("mmeb-v2", "mmeb-v1", "mrmr", "uvrb", "beir")


@dataclass
class SuiteOptions:
    """A published benchmark instead of --data."""

    suite: str | None = field(
        default=None, metadata={"help": "'mmeb-v2', 'mmeb-v1', 'mrmr', 'uvrb', 'beir'; `rime-fast eval suites`."}
    )
    root: str | None = field(default=None, metadata={"help": "Folder of the suite's files (docs/eval.md)."})
    check: bool = field(default=False, metadata={"help": "Only look for files, rows and pictures; 1 on a gap."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Some tasks: ImageNet-1K,OK-VQA"})
    groups: list[str] = field(default_factory=list, metadata={"help": "Some groups of tasks: image.CLS,visdoc"})
    protocol: str = field(default="ume-r1", metadata={"help": "'ume-r1', 'vlm2vec' or 'plain': texts and resolutions."})
    frames: int | None = field(default=None, metadata={"help": "Frames of a video; default: the protocol's, 8."})
    ties: str = field(default="pessimistic", metadata={"help": "'pessimistic', or 'official': the list's order."})
    shard: str | None = field(default=None, metadata={"help": "i/n: this process of n; under torchrun by itself."})
    leaderboard: str | None = field(default=None, metadata={"help": "Write an MMEB leaderboard entry to this file."})
    cell: str | None = field(default=None, metadata={"help": "Its pairing of modes; default: the last, 'gen-gen'."})
    overwrite: bool = field(default=False, metadata={"help": "Make again embeddings that were made otherwise."})
    download: bool = field(default=False, metadata={"help": "Fetch missing tables from the hub; else never."})


def run_suite(values: dict[str, Any]) -> int:
    """Check or evaluate a suite."""
    required(values, "suite", "root")
    options = build(SuiteOptions, values)
    if options.suite not in NAMES:
        raise UsageError(f"--suite is {options.suite!r}; expected {', '.join(NAMES)}")
    if not Path(str(options.root)).is_dir():
        raise UsageError(f"--root {options.root}: no such directory")
    if not options.check:
        required(values, "model")
    models = values.get("model") or []
    model_exists(*models)
    try:
        suite = _suite(options)
        return _check(suite) if options.check else _evaluate(suite, options, values, models)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _suite(options: SuiteOptions) -> Suite:
    from rime_fast.eval.suites import load_suite

    suite = load_suite(
        str(options.suite), str(options.root), options.protocol, frames=options.frames, download=options.download
    )
    return suite.select(split(options.tasks), split(options.groups))


def _check(suite: Suite) -> int:
    from rime_fast.eval.suites.check import check_suite

    broken = 0
    for found in check_suite(suite):
        broken += bool(found.gaps)
        state = "GAP" if found.gaps else "ok"
        print(f"{found.name:<48}{state:<5}{found.queries:>8,} queries {found.candidates:>9,} candidates")
        for gap in found.gaps:
            print(f"    {gap}")
        for name, value in found.notes.items():
            if not name.endswith("_names"):
                print(f"    note: {name.replace('_', ' ')}: {value}")
    print(f"{len(suite.tasks) - broken} of {len(suite.tasks)} tasks are complete")
    return 1 if broken else 0


def _evaluate(suite: Suite, options: SuiteOptions, values: dict[str, Any], models: list[str]) -> int:
    from rime_fast.cli.bars import bars
    from rime_fast.cli.loading import EmbedderOptions, load_embedder
    from rime_fast.eval.report import write_report
    from rime_fast.eval.suites import evaluate_suite, suite_template
    from rime_fast.eval.suites.report import suite_report

    shared, loading = build(EvalOptions, values), build(EmbedderOptions, values)
    rank, world = _shard(options.shard)
    if loading.device is None and "LOCAL_RANK" in os.environ:
        import torch

        loading.device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    modes = split(shared.modes) or None
    if options.leaderboard and shared.limit is not None:
        raise UsageError("--leaderboard needs all queries; leave --limit out")
    loading.template = suite_template(loading.template)  # type: ignore[assignment]
    for path in models:
        label = Path(path).name or path
        home = Path(shared.output_dir) / (label if len(models) > 1 else "")
        embedder = load_embedder(path, loading)
        with bars() as progress:
            result = evaluate_suite(
                embedder,
                suite,
                modes=modes,
                output_dir=home,
                limit=shared.limit,
                shard=(rank, world),
                ties=options.ties,
                dims=shared.widths(),
                overwrite=options.overwrite,
                model_name=path,
                progress=progress,
            )
        if rank == 0 or (world > 1 and result.tasks and "RANK" not in os.environ):
            print(result.table())
            if result.tasks:
                written = write_report(home / suite.name, suite_report(result, shared.title))
                print(f"report: {written[1]}\nnumbers: {home / suite.name / 'summary.json'}")
                if options.leaderboard:
                    entry = result.leaderboard(options.cell or result.cells[-1], model_name=label)
                    Path(options.leaderboard).write_text(json.dumps(entry, indent=4), encoding="utf-8")
                    print(f"leaderboard: {options.leaderboard}")
        del embedder
    return 0


def _shard(given: str | None) -> tuple[int, int]:
    """The shard option, or torchrun's rank."""
    if given is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rank, slash, world = given.partition("/")
    if not (slash and rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise UsageError(f"--shard is {given!r}; expected i/n with 0 <= i < n, as in 0/4")
    return int(rank), int(world)


# --- eval suites -----------------------------------------------------------------------------------------------------


@dataclass
class ListOptions:
    """Which suite is listed."""

    suite: str | None = field(default=None, metadata={"help": "Its tasks one by one; default: all suites in short."})


def run_list(values: dict[str, Any]) -> int:
    """Print the suites, or one suite's tasks."""
    from rime_fast.eval.suites import PROTOCOLS, SUITES, load_suite

    options = build(ListOptions, values)
    if options.suite is None:
        for name, (_, text) in SUITES.items():
            print(f"{name:<9} {text}")
        print(f"protocols: {', '.join(PROTOCOLS)}; tasks of one: rime-fast eval suites --suite mmeb-v2")
        return 0
    if options.suite not in SUITES:
        raise UsageError(f"--suite is {options.suite!r}; expected {', '.join(SUITES)}")
    if options.suite == "beir":
        print("a folder with corpus, queries and qrels (parquet, JSONL, or qrels as .tsv), or a folder of such folders")
        return 0
    suite = load_suite(options.suite, ".")
    total = 0
    for task in suite.tasks.values():
        total += task.expected_queries or 0
        count = "" if task.expected_queries is None else f"{task.expected_queries:,}"
        print(f"{task.name:<48}{task.modality}.{task.group:<12}{task.metric:<15}{count:>7}  {task.needs}")
    print(f"{len(suite.tasks)} tasks, {total:,} queries")
    return 0


LIST = Command(
    name="eval suites",
    text="The benchmark suites that `rime-fast eval --suite` knows: their tasks and groups, metrics, numbers of "
    "queries and what each needs below --root.",
    examples=(
        ("all suites", "rime-fast eval suites"),
        ("the 78 tasks of MMEB-V2", "rime-fast eval suites --suite mmeb-v2"),
    ),
    run=run_list,
    groups=(Group("What", "rime_fast.cli.eval_suites", "ListOptions"),),
)
