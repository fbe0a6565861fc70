"""Hard negatives for pairs: for each query the nearest targets of its data set that are not right answers.

Every different query and target is embedded once (in chunks that are kept, as the suites' are), each query is compared
with every target of its data set by exact streaming products, and candidates that are or may be right answers are left
out: known positives of equal queries, targets with an equal id, text or picture, and all that is nearly as close as the
positive (NV-Retriever's positive-relative bound). What is left of the first is written as ``negatives``.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rime_fast.data.sources import write_rows
from rime_fast.engine.fingerprint import fingerprint
from rime_fast.eval.embedder import RimeEmbedder
from rime_fast.eval.ranking import rank_candidates
from rime_fast.eval.suites.cache import CHUNK, SideCache, check_meta
from rime_fast.prepare.content import ImageDigests, digest, open_reading, output_path, refuse_other
from rime_fast.prepare.ledger import Ledger
from rime_fast.prepare.mine_items import Items, MineOptions, Progress
from rime_fast.prepare.mine_report import MineReport
from rime_fast.prepare.reranker import Reranker

_BLOCK = 4096  # queries ranked at a time
_WIDEST = 1000  # [ours] excluded candidates of one query that are looked beyond


def mine_negatives(
    data: Any,
    model: str | Path | RimeEmbedder,
    output: str | Path,
    options: MineOptions | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``data`` with mined ``negatives`` and their ``mined_scores`` to ``output``; returns the report.

    data: whatever ``open_rows`` opens, in any format. model: a directory or hub name, or an embedder. A row's own
    negatives stay, first; those that were mined before (the row has ``mined_scores``) are replaced. With a reranker the
    rows get ``scores``, its logits; without one, ``scores`` that no longer fit their negatives go. Beside the output
    come ``OUTPUT.report.json`` and ``OUTPUT.suspects.jsonl`` (candidates too near to be negatives). Interrupted, it
    goes on where it was. progress: called with stage, items done and items in all.

    Raises DataError for bad rows (unless ``on_bad_row="skip"``), ValueError for options that make no sense and for an
    output that is there and was made otherwise.
    """
    options = options or MineOptions()
    told = progress or (lambda *_: None)
    path = output_path(data, output)
    folder = Path(options.cache or f"{output}.cache")
    embedder = RimeEmbedder.from_pretrained(model) if isinstance(model, (str, os.PathLike)) else model
    reading = open_reading(
        data,
        image_root=options.image_root,
        file_format=options.file_format,
        allow_outside=options.allow_outside,
        allow_urls=options.allow_urls,
        max_pixels=embedder.collator.vision.max_decoded,
    )
    items = Items(reading)
    with Ledger(folder / "pictures", "pictures") as kept:
        digests = ImageDigests(kept)
        items.read(path, digests, options.on_bad_row, told)
    common, gen = fingerprint(embedder)
    prints = common | (gen if options.mode == "gen" else {})
    reranker = None if options.reranker is None else Reranker.load(options.reranker, folder / "reranker")
    chosen = {name: value for name, value in vars(options).items() if name not in ("cache", "overwrite", "reranker")}
    job = digest([prints, items.digest(), chosen, None if reranker is None else reranker.identity])
    refuse_other(path, job, options.overwrite)
    rows = {side: _embed(items, side, embedder, options.mode, prints, folder, told) for side in ("query", "target")}
    report = MineReport(path, job, items, options)
    with reranker or nullcontext():
        mined = Miner(items, rows["query"], rows["target"], options, reranker, report).rows(told)
        write_rows(path, report.watching(mined))
    return report.found


def _embed(
    items: Items, name: str, embedder: RimeEmbedder, mode: str, prints: dict[str, Any], folder: Path, told: Progress
) -> torch.Tensor:
    """[items, D] fp32 unit rows; finished chunks are read back."""
    keys, weights = items.keys[name], items.weights[name]
    meta = {**prints, "mode": mode, "chunk": CHUNK, "side": name, "items": digest(keys)}
    home = folder / digest(meta)[:16]
    check_meta(home, meta, None)
    cache = SideCache(home, "qry" if name == "query" else "tgt", mode, len(keys))
    order = sorted(range(len(keys)), key=lambda i: (-weights[i], keys[i]))
    for chunk in cache.chunks:
        if chunk in cache.missing():
            index = order[chunk * CHUNK : (chunk + 1) * CHUNK]
            made = embedder.encode_items([items.side(name, i) for i in index], mode)
            cache.write(chunk, index, [keys[i] for i in index], made, 0)
        told(
            "embedding queries" if name == "query" else "embedding targets",
            min((chunk + 1) * CHUNK, len(keys)),
            len(keys),
        )
    return cache.read().embedding


class Miner:
    """Chooses the negatives of every row."""

    def __init__(
        self,
        items: Items,
        queries: torch.Tensor,
        targets: torch.Tensor,
        options: MineOptions,
        reranker: Reranker | None,
        report: MineReport,
    ) -> None:
        self.items, self.options, self.reranker, self.report = items, options, reranker, report
        self.queries, self.targets = queries, targets
        self.by_feature: dict[str, list[int]] = {}
        for i, features in enumerate(items.features["target"]):
            for feature in features:
                self.by_feature.setdefault(feature, []).append(i)
        self.pools: dict[str, list[int]] = {}
        positives: dict[tuple[str, str], set[int]] = {}  # data set, a feature of the query
        for name, (_, query, right, own) in zip(items.sets, items.rows, strict=True):
            self.pools.setdefault(name, []).extend((*right, *own))
            for feature in self._asked(query):
                positives.setdefault((name, feature), set()).update(right)
        self.pools = {name: sorted(set(pool)) for name, pool in self.pools.items()}
        self.positives = positives
        self._written = lru_cache(maxsize=1 << 16)(self._side_json)

    def _asked(self, query: int) -> set[str]:
        """Equal where two queries ask the same: by id or by whole content."""
        return {one for one in self.items.features["query"][query] if one.startswith(("content ", "id "))}

    def excluded(self, name: str, query: int) -> set[int]:
        """Find the targets that are right answers of the query, or equal to one or to the query itself."""
        right = set().union(*(self.positives[name, feature] for feature in self._asked(query)))
        features = set().union(*(self.items.features["target"][i] for i in right)) | self._asked(query)
        return right.union(*(self.by_feature.get(feature, ()) for feature in features))

    def rows(self, told: Progress) -> Iterator[dict[str, Any]]:
        """Give the rows with their negatives, in the source's order."""
        nearest = self._nearest(told)
        total = len(self.items.rows)
        for place, (index, query, right, own) in enumerate(self.items.rows):
            yield self._row(place, index, query, right[0], own, *nearest[self.items.sets[place], query])
            if (place + 1) % 1000 == 0 or place + 1 == total:
                told("writing", place + 1, total)

    def _nearest(self, told: Progress) -> dict[tuple[str, int], tuple[array[int], array[float], int]]:
        """(data set, query) -> candidates by falling cosine without the excluded ones, their cosines, and how many
        targets of the pool come before the best-placed right answer."""
        found: dict[tuple[str, int], tuple[array[int], array[float], int]] = {}
        asked: dict[str, dict[int, None]] = {}
        for name, (_, query, _, _) in zip(self.items.sets, self.items.rows, strict=True):
            asked.setdefault(name, {})[query] = None
        total, wanted = sum(map(len, asked.values())), self.options.top_k + self.options.skip_top
        for name, queries in asked.items():
            pool = self.pools[name]
            column = {item: i for i, item in enumerate(pool)}
            candidates, whole = self.targets[pool], list(queries)
            for start in range(0, len(whole), _BLOCK):
                block = whole[start : start + _BLOCK]
                banned = [self.excluded(name, query) for query in block]
                right = [[column[i] for i in sorted(one) if i in column] for one in banned]
                widest = min(_WIDEST, max(map(len, right)))
                ranking = rank_candidates(self.queries[block], candidates, right, top_k=wanted + widest)
                best = ranking.best.tolist()
                tops, scores = ranking.top.tolist(), ranking.top_scores.tolist()
                for i, query in enumerate(block):
                    left = [(pool[c], s) for c, s in zip(tops[i], scores[i], strict=True) if pool[c] not in banned[i]]
                    left = sorted(left[:wanted], key=lambda one: (-one[1], one[0]))
                    kept = array("i", (c for c, _ in left)), array("f", (s for _, s in left))
                    found[name, query] = (*kept, best[i])
                told("searching", len(found), total)
        return found

    def _row(
        self, place: int, index: int, query: int, target: int, own: list[int], near: array, cosines: array, rank: int
    ) -> dict[str, Any]:
        options = self.options
        embedding = self.queries[query]
        positive = float(embedding @ self.targets[target])
        bound = options.bound(positive)
        after = list(zip(near, cosines, strict=True))[options.skip_top :]
        suspects = [(item, cosine) for item, cosine in after if cosine >= bound]
        left = [(item, cosine) for item, cosine in after if cosine < bound and item not in own]
        if options.sampling == "random":
            order = np.random.default_rng((options.seed, index)).permutation(len(left))
            left = [left[i] for i in order]
        logits: list[float] | None = None
        if self.reranker is None:
            chosen = left[: options.negatives]
        else:
            chosen, logits = self.reranker.choose(self.items, query, target, own, left, options)
        self.report.row(index, target, positive, rank, suspects, chosen, logits)
        pair, raw = self.items.reading.pair(index)
        row = self.items.reading.row(pair, raw, parquet=self.report.parquet)
        kept = row.pop("negatives", []) if own else []
        for name in ("negatives", "mined_scores"):
            row.pop(name, None)
        if chosen or own:
            row["negatives"] = kept + [self._written(item) for item, _ in chosen]
            scores = [positive, *(float(embedding @ self.targets[i]) for i in own), *(cosine for _, cosine in chosen)]
            row["mined_scores"] = [round(score, 6) for score in scores]
        if logits is not None:
            row["scores"] = logits
        elif chosen or pair.mined_scores is not None:
            self.report.drop(row.pop("scores", None))
        return row

    def _side_json(self, item: int) -> dict[str, Any]:
        """A target as it stands in its own row."""
        index, number = self.items.places["target"][item]
        pair, raw = self.items.reading.pair(index)
        row = self.items.reading.row(pair, raw, parquet=self.report.parquet)
        return [*row.get("targets", [row.get("target")]), *(row.get("negatives") or ())][number]
