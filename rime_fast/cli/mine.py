"""``rime-fast mine``: hard negatives for pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rime_fast.cli.command import Command, model_exists, required
from rime_fast.cli.loading import EmbedderOptions, load_embedder
from rime_fast.cli.options import Group, UsageError
from rime_fast.cli.values import build


@dataclass
class Source:
    """What is mined."""

    data: str = field(metadata={"help": "Pairs, in any format of docs/data.md."})
    model: str = field(metadata={"help": "The embedder: a directory or a hub name."})
    output: str = field(metadata={"help": "The same rows with negatives: .jsonl, .json or .parquet."})


def run(values: dict[str, Any]) -> int:
    """Mine."""
    required(values, "data", "model", "output")
    source, loading = build(Source, values), build(EmbedderOptions, values)
    model_exists(source.model, *([values["reranker"]] if values.get("reranker") else []))
    from rime_fast.cli.bars import bars
    from rime_fast.data.records import DataError
    from rime_fast.prepare.mine import mine_negatives
    from rime_fast.prepare.mine_items import MineOptions

    options = build(MineOptions, values)
    embedder = load_embedder(source.model, loading)
    try:
        with bars() as progress:
            report = mine_negatives(source.data, embedder, source.output, options, progress=progress)
    except DataError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"{report['rows']} rows, {report['queries']} queries, {report['targets']} targets")
    print(
        f"{report['negatives']} negatives; rows with {options.negatives}: {report['rows_with_enough']}, with fewer: "
        f"{report['rows_with_fewer']}, with none: {report['rows_with_none']}"
    )
    print(
        f"positives: mean rank {report['mean_rank_of_positives']}, cosine {report['mean_cosine_of_positives']:.3f}; "
        f"negatives: cosine {report['mean_cosine_of_negatives']:.3f}"
    )
    print(
        f"suspected false negatives: {report['suspected_false_negatives']}, left out, in "
        f"{report['rows_with_suspects']:.1%} of the rows"
    )
    print(f"written: {source.output}, {source.output}.report.json, {source.output}.suspects.jsonl")
    return 0


COMMAND = Command(
    name="mine",
    text="Writes hard negatives into pairs: the targets of the same data set that lie nearest to the query and are "
    "not right. The search is exact; known positives, equal ids, texts and pictures are left out, and whatever is "
    "nearly as close as the positive. The cosines come as `mined_scores`. Embeddings are kept in OUTPUT.cache, named "
    "by the model's weights and the data's content.",
    examples=(
        (
            "eight negatives a row",
            "rime-fast mine --data pairs.jsonl --model runs/sft --output mined.jsonl",
        ),
        (
            "four at random among the nearest 50, the first 5 left out",
            "rime-fast mine --data pairs.jsonl --model runs/sft --negatives 4 --top_k 50 --skip_top 5 "
            "--sampling random --output mined.jsonl",
        ),
        (
            "a reranker looks at them too, and its logits become the teacher's scores",
            "rime-fast mine --data pairs.jsonl --model runs/sft --reranker Qwen/Qwen3-VL-Reranker-2B "
            "--reranker_min 0.3 --output mined.jsonl",
        ),
    ),
    run=run,
    groups=(
        Group("What", "rime_fast.cli.mine", "Source"),
        Group("How", "rime_fast.prepare.mine_items", "MineOptions"),
    ),
    more=(Group("Loading the model", "rime_fast.cli.loading", "EmbedderOptions"),),
)
