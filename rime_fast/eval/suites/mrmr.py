"""MRMR: reasoning-intensive multimodal retrieval, five sets, a mean of eleven scores (arXiv 2510.09510)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rime_fast.data.records import DataError, ImageSource
from rime_fast.eval.suites.beir import add_candidate, add_query
from rime_fast.eval.suites.disk import Row, Source, StoredImage
from rime_fast.eval.suites.mmeb_image import prompt
from rime_fast.eval.suites.protocol import Protocol
from rime_fast.eval.suites.tasks import Collector, Suite, Task, TaskData, TaskScore, mean, table
from rime_fast.eval.suites.visdoc import judgements

SPLIT = "test"
QUERIES = {"knowledge": 555, "theorem": None, "negation": 200, "design": 88, "traffic": 80}  # theorem: 512 or 579


def load_mrmr(root: Path, protocol: Protocol, download: bool = False) -> Suite:
    """The five sets; knowledge and theorem report a score for each of their subjects."""
    facts = table("mrmr.json")
    tasks = {}
    for name, about in facts["subsets"].items():
        local = [f"{owner}/{name}" for owner in facts["org"]] + [name]
        options = {"revision": about["revision"], "download": download}
        source = Source.of(root, local, f"{facts['org'][0]}/{name}", **options)
        tasks[name] = Task(
            name=name,
            modality="multimodal",
            group="MRMR",
            metric="hit@1" if name == "negation" else "ndcg@10",
            expected_queries=QUERIES[name],
            reader=partial(_read, name, about, source, protocol),
            needs=f"{name}: {', '.join(about['configs'])}",
            exported=name,
        )
    return Suite("mrmr", str(root), protocol, tasks, partial(_aggregate, facts["subsets"]))


def _aggregate(subsets: Mapping[str, Any], scores: Mapping[str, TaskScore]) -> dict[str, float]:
    """Subjects of knowledge and theorem, the three other sets, and the mean of these eleven."""
    found: dict[str, float] = {}
    wanted = 0
    for name, about in subsets.items():
        subjects = list(about.get("groups", ()))
        wanted += len(subjects) or 1
        if name not in scores:
            continue
        if subjects:
            found |= {s: scores[name].categories[s] for s in subjects if s in scores[name].categories}
        else:
            found[name] = scores[name].score
    return found | ({"all": mean(found.values())} if len(found) == wanted else {})


def _read(name: str, about: dict[str, Any], source: Source, protocol: Protocol) -> TaskData:
    task = Collector(protocol, lists=name == "negation")
    limit = about.get("max_side", 0)
    pins = _optional(source, "pin_p") if "pin_p" in about["configs"] else []
    known = {_key(row): False for row in pins}
    texts = {text for text, _ in known}
    for row in source.rows("corpus", SPLIT):
        _document(task, f"corpus-{SPLIT}-{row['id']}", row, limit)
        if (row.get("text") or "") in texts:
            known[_key(row)] = True  # later releases hold the extra negatives in the corpus already
    for i, row in enumerate(pins):
        if not known[_key(row)]:
            _document(task, f"redo-{SPLIT}-{i}", row, limit)
    right = judgements(source.rows("qrels", SPLIT), task)
    groups = {field: group for group, fields in about.get("groups", {}).items() for field in fields}
    for row in source.rows("query", SPLIT):
        key = str(row["id"])
        own = right.get(key) or right.get(f"query-{SPLIT}-{key}")
        if not own:
            task.count("queries_without_judgement")
            continue
        named = {one if one in task.rows else f"corpus-{SPLIT}-{one}": gain for one, gain in own.items()}
        pool = None
        if name == "negation":  # each query against the four texts of its own
            mine = (f"corpus-{SPLIT}-{key}_{i}" for i in range(1, 5))
            pool = [task.rows[one] for one in mine if one in task.rows]
        field = row.get("category") or row.get("domain") or ""
        if groups and field not in groups:
            task.count("queries_of_unknown_category")
        text = prompt(about["prompt"].strip(), row.get("text") or "")
        add_query(task, text, _picture(row, limit), named, pool=pool, category=groups.get(field, field))
    return task.data()


def _document(task: Collector, name: str, row: Row, limit: int) -> None:
    add_candidate(task, name, row.get("text") or "", _picture(row, limit))


def _picture(row: Row, limit: int) -> list[ImageSource]:
    """The one merged picture of a row; longer sides than ``limit`` are shrunk to it (0: none)."""
    image = row.get("image")
    if image is None or image == "":
        return []
    return [image.renamed(image["path"], limit)] if isinstance(image, StoredImage) else [image]


def _key(row: Row) -> tuple[str, bytes]:
    """What makes two documents one: the text and the picture's bytes."""
    image = row.get("image")
    return row.get("text") or "", (image["bytes"] or b"") if isinstance(image, StoredImage) else repr(image).encode()


def _optional(source: Source, config: str) -> list[Row]:
    try:
        return source.rows(config, SPLIT)
    except DataError:
        return []
