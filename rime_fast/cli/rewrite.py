"""``rime-fast rewrite``: rewrites by a teacher, for pairs that have none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rime_fast.cli.command import Command, model_exists, required
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build


@dataclass
class Source:
    """What is rewritten."""

    data: str = field(metadata={"help": "Pairs, in any format of docs/data.md."})
    model: str = field(metadata={"help": "The teacher: a directory, a hub name, or the name a server knows."})
    output: str = field(metadata={"help": "The same rows with rewrites: .jsonl, .json or .parquet."})


def run(values: dict[str, Any]) -> int:
    """Rewrite; 0 also where other shards are still at work."""
    required(values, "data", "model", "output")
    source = build(Source, values)
    if values.get("backend", "transformers") != "openai":
        model_exists(source.model)
    from rime_fast.cli.bars import bars, quiet
    from rime_fast.data.records import DataError
    from rime_fast.prepare.rewrite import rewrite_rows
    from rime_fast.prepare.rewrite_work import RewriteOptions

    options = build(RewriteOptions, values)
    quiet()
    try:
        with bars() as progress:
            report = rewrite_rows(source.data, source.model, source.output, options, progress=progress)
    except DataError:
        raise
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    if "missing" in report:
        print(f"shard {options.shard} is done; {report['missing']} of {report['unique_sides']} sides are still to do")
        return 0
    _show(report)
    print(f"written: {source.output}, {source.output}.report.json, {source.output}.rejects.jsonl")
    return 0


def _show(report: dict[str, Any]) -> None:
    print(
        f"{report['rows']} rows, {report['sides']} sides without a rewrite, {report['unique_sides']} of them different"
    )
    print(f"accepted: {report['accepted']} ({report['accepted_at_the_second_try']} at the second try)")
    for reason, count in report["rejected"].items():
        print(f"rejected: {count} {reason}")
    for side, found in report["lengths"].items():
        if found["rewrites"]:
            words = found["words"]
            print(f"{side}: {words['mean']} words, half of them below {words['p50'] + 1}, at most {words['max']}")
    if leak := report["leak"]:
        print(f"leak check over {leak['compared']} queries:")
        for name in ("with_truth", "without_truth") if leak["compared"] else ():
            row = leak[name]
            print(f"  {name}: {row['holds_the_answer']:.1%} hold the answer, hit@1 by words {row['hit@1']:.3f}")


COMMAND = Command(
    name="rewrite",
    text="Fills `rewrite` on both sides of pairs by a teacher. Equal sides are asked about once; finished answers are "
    "kept in OUTPUT.cache, so that an interrupted run goes on where it was, and several processes share the work. "
    "A text is accepted when it is finished, has the form that was asked for and could be trained on; what is rejected "
    "is asked once more and then listed with the reason.",
    examples=(
        (
            "a teacher on a server (vLLM, SGLang, or any other with /v1/chat/completions)",
            "rime-fast rewrite --data pairs.jsonl --backend openai --base_url http://gpu7:8000/v1 "
            "--model Qwen/Qwen2.5-VL-32B-Instruct --batch_size 64 --output rewritten.jsonl",
        ),
        (
            "in this process, part 1 of 8 on each GPU",
            "rime-fast rewrite --data pairs.jsonl --backend vllm --model Qwen/Qwen2.5-VL-32B-Instruct --shard 1/8 "
            "--output rewritten.jsonl",
        ),
        (
            "by a model trained here, queries alone",
            "rime-fast rewrite --data pairs.parquet --model runs/sft --sides query --output rewritten.parquet",
        ),
        (
            "shown the right answers, with the leak check in the report",
            "rime-fast rewrite --data MMEB-train/OK-VQA --task 'visual question' --with_truth --backend openai "
            "--model teacher --output okvqa.jsonl",
        ),
    ),
    run=run,
    groups=(
        Group("What", "rime_fast.cli.rewrite", "Source"),
        Group("How", "rime_fast.prepare.rewrite_work", "RewriteOptions"),
    ),
)
