"""The report on mined negatives: how far off the positives are, what was found, what is too near to be wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rime_fast.data.cache import replacing
from rime_fast.data.sources import write_rows
from rime_fast.prepare.content import report_path
from rime_fast.prepare.mine_items import Items, MineOptions

_SHOWN = 5  # suspects of a row that are listed


class MineReport:
    """Counts row by row; writes ``OUTPUT.suspects.jsonl`` and ``OUTPUT.report.json`` before the output has its name."""

    def __init__(self, output: Path, job: str, items: Items, options: MineOptions) -> None:
        self.output, self.job, self.items, self.options = output, job, items, options
        self.parquet = output.suffix == ".parquet"
        self.found: dict[str, Any] = {}
        self.suspects: list[dict[str, Any]] = []
        self.counts = dict.fromkeys(("enough", "fewer", "none", "suspected", "rows_suspected", "dropped", "refused"), 0)
        self.sums = dict.fromkeys(("positive", "rank", "negative", "negatives", "first"), 0.0)

    def row(
        self,
        index: int,
        target: int,
        positive: float,
        rank: int,
        suspects: Sequence[tuple[int, float]],
        chosen: Sequence[tuple[int, float]],
        logits: Sequence[float] | None,
    ) -> None:
        """Count a row: its positive's cosine and rank, what came too near, what was taken."""
        counts, sums = self.counts, self.sums
        full = len(chosen) >= self.options.negatives
        counts["enough" if full else "fewer" if chosen else "none"] += 1
        counts["suspected"] += len(suspects)
        counts["rows_suspected"] += bool(suspects)
        counts["refused"] += logits is not None and not chosen and len(logits) == 1
        sums["positive"] += positive
        sums["rank"] += rank
        sums["first"] += rank == 1
        sums["negative"] += sum(cosine for _, cosine in chosen)
        sums["negatives"] += len(chosen)
        rows = self.items.reading.rows
        for item, cosine in suspects[:_SHOWN]:
            at = self.items.places["target"][item][0]
            one = {"row": rows.number(index), "target_of_row": rows.number(at), "cosine": round(cosine, 6)}
            self.suspects.append({**one, "positive": round(positive, 6)})

    def drop(self, scores: Any) -> None:
        """Count a row whose ``scores`` no longer fitted."""
        self.counts["dropped"] += scores is not None

    def watching(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass the rows on; after the last one the report is written."""
        yield from rows
        items, counts, sums = self.items, self.counts, self.sums
        n = len(items.rows)
        self.found = {
            "job": self.job,
            "rows": n,
            "bad_rows": len(items.bad),
            "queries": len(items.keys["query"]),
            "targets": len(items.keys["target"]),
            "data_sets": len(set(items.sets)),
            "rows_with_enough": counts["enough"],
            "rows_with_fewer": counts["fewer"],
            "rows_with_none": counts["none"],
            "negatives": int(sums["negatives"]),
            "mean_cosine_of_negatives": round(sums["negative"] / max(sums["negatives"], 1), 6),
            "mean_cosine_of_positives": round(sums["positive"] / n, 6),
            "mean_rank_of_positives": round(sums["rank"] / n, 3),
            "positives_ranked_first": round(sums["first"] / n, 4),
            "suspected_false_negatives": counts["suspected"],
            "suspected_a_row": round(counts["suspected"] / n, 3),
            "rows_with_suspects": round(counts["rows_suspected"] / n, 4),
            "scores_dropped": counts["dropped"],
            "rows_the_reranker_doubts": counts["refused"],
        }
        write_rows(self.output.with_name(f"{self.output.name}.suspects.jsonl"), self.suspects)
        with replacing(report_path(self.output)) as stream:
            stream.write(json.dumps(self.found, indent=1) + "\n")
