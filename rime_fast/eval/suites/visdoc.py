"""MMEB-V2's visual documents: corpus, queries and judgements (qrels) in parquet, pages as pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from rime_fast.data.records import ImageSource
from rime_fast.eval.suites.disk import Row, Source, StoredImage, field, first_existing
from rime_fast.eval.suites.mmeb_image import prompt, with_image
from rime_fast.eval.suites.tasks import Collector, TaskData

QUERY = "Find a document image that matches the given query:"
PAGE = "Understand the content of the provided document image."
QUERY_ID = ("query-id", "query_id", "qid")
CORPUS_ID = ("corpus-id", "corpus_id", "docid", "did")


def judgements(rows: Sequence[Row], task: Collector) -> dict[str, dict[str, float]]:
    """Read who is relevant to whom, query -> candidate -> relevance: positive scores alone, the larger one of a pair
    that comes twice."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        score = float(row.get("score", 1))
        if score <= 0:
            task.count("judgements_of_no_relevance")
            continue
        own = found.setdefault(str(field(row, *QUERY_ID)), {})
        name = str(field(row, *CORPUS_ID))
        task.count("judgements_given_twice", int(name in own))
        own[name] = max(score, own.get(name, score))
    return found


def pages(source: Source, split: str, parser: str, folders: Sequence[Path], task: Collector) -> TaskData:
    """Read a task of pages: every query against the whole corpus. Pictures come from files where there are some, else
    from the corpus itself.

    Candidates stand in the order of first appearance over the queries' judgements, then the corpus's own.
    """
    corpus = {str(field(row, *CORPUS_ID)): row for row in source.rows("corpus", split)}
    right = judgements(source.rows("qrels", split), task)
    bare = parser == "vidore"
    ask = task.protocol.page_text(QUERY) if bare else QUERY
    show = with_image(task.protocol.page_text(PAGE) if bare else PAGE)

    def add(name: str) -> None:
        if name in corpus and name not in task.rows:
            file = page_file(name) if parser == "visrag" else f"{name}.png"
            task.candidate(name, show, images=[_picture(corpus[name], first_existing(f / file for f in folders))])

    for row in source.rows("queries", split):
        own = right.get(str(field(row, *QUERY_ID)), {})
        for name in own:
            add(name)
        task.query(prompt(ask, field(row, "query", "text")), own, gains=list(own.values()))
    for name in corpus:
        add(name)
    return task.data()


def page_file(name: str) -> str:
    """The file of a VisRAG page: long names are cut, and a digest keeps them apart."""
    base, end = os.path.splitext(name)
    return f"{base[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{end}"


def _picture(row: Row, file: Path) -> ImageSource:
    """The page as a file where there is one, else out of the table."""
    stored = row.get("image")
    if isinstance(stored, StoredImage) and not file.exists():
        return stored.renamed(str(file))
    return str(file)
