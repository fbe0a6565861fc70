"""Any folder in BEIR's form, MRMR and UVRB: sets with a corpus, queries and judgements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rime_fast.data.records import DataError, ImageSource
from rime_fast.eval.suites.disk import Row, Source, StoredImage, field, frames, table_files
from rime_fast.eval.suites.mmeb_image import prompt, with_image, with_video
from rime_fast.eval.suites.protocol import Protocol
from rime_fast.eval.suites.tasks import Collector, Suite, Task, TaskData, TaskScore, mean, table
from rime_fast.eval.suites.visdoc import CORPUS_ID, QUERY_ID, judgements

SPLITS = ("test", "train", "dev", "validation", "val")


def load_beir(root: Path, protocol: Protocol, download: bool = False) -> Suite:
    """Read each folder with corpus, queries and qrels as a task: the root itself, or the folders in it.

    Raises ValueError where there is none.
    """
    folders = [root] if _is_set(root) else [one for one in sorted(root.glob("*")) if one.is_dir() and _is_set(one)]
    if not folders:
        raise ValueError(f"root is {root}; expected a folder with corpus, queries and qrels, or a folder of such")
    tasks = {}
    for folder in folders:
        name = folder.resolve().name
        reader = partial(_read, folder, protocol)
        tasks[name] = Task(name, "retrieval", "BEIR", "ndcg@10", None, reader, needs="corpus, queries, qrels")
    return Suite("beir", str(root), protocol, tasks, _aggregate)


def _aggregate(scores: Mapping[str, TaskScore]) -> dict[str, float]:
    return {"all": mean(one.score for one in scores.values())} if scores else {}


def _is_set(folder: Path) -> bool:
    return _split(folder) is not None


def _split(folder: Path) -> str | None:
    """The split of the judgements: the test split where there is one."""
    return next((s for s in SPLITS if table_files(folder, "qrels", s) and _config(folder, s, "corpus")), None)


def _config(folder: Path, split: str, *names: str) -> str | None:
    return next((name for name in names if any(table_files(folder, name, one) for one in (split, name))), None)


def _read(folder: Path, protocol: Protocol) -> TaskData:
    split = _split(folder)
    if split is None:
        raise DataError(f"{folder} has no corpus, queries and qrels")
    source, task = Source(folder, ("",)), Collector(protocol, lists=False)

    def rows(*names: str) -> list[Row]:
        config = _config(folder, split, *names) or names[0]
        return source.rows(config, split if table_files(folder, config, split) else config)

    right = judgements(rows("qrels"), task)
    for row in rows("corpus"):
        text = " ".join(part for part in (row.get("title"), row.get("text") or row.get("body")) if part)
        add_candidate(task, str(field(row, "_id", "id", *CORPUS_ID)), text, pictures_of(row, folder))
    for row in rows("queries", "query"):
        own = right.get(str(field(row, "_id", "id", *QUERY_ID)))
        if own is None:  # trec_eval's means are over the judged queries
            task.count("queries_without_judgement")
            continue
        text = prompt(row.get("instruction") or "", row.get("text") or row.get("query") or "").strip()
        add_query(task, text, pictures_of(row, folder), own)
    return task.data()


def add_candidate(task: Collector, name: str, text: str, images: Sequence[ImageSource] = ()) -> int:
    """A candidate of text, pictures or both, behind the vision token where it has pictures."""
    return task.candidate(name, with_image(text) if images else text, images=images)


def add_query(
    task: Collector,
    text: str,
    images: Sequence[ImageSource],
    own: Mapping[str, float],
    *,
    video: Sequence[ImageSource] | None = None,
    **more: Any,
) -> None:
    """A query with its judgements, behind the vision token where it has pictures or a video."""
    line = with_video(text) if video is not None else with_image(text) if images else text
    task.query(line, own, gains=list(own.values()), images=images, video=video, **more)


def pictures_of(row: Row, root: Path) -> list[ImageSource]:
    """The pictures in the columns image and images: stored ones, or paths below the root."""
    given = row.get("images") if row.get("image") is None else row["image"]
    found: list[ImageSource] = []
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, str) and one:
            found.append(str(root / one))
        elif isinstance(one, StoredImage) or (isinstance(one, dict) and one.get("bytes")):
            found.append(one)
        elif one:
            raise DataError(f"an image is {type(one).__name__}; expected a path or a stored picture")
    return found


# --- UVRB ------------------------------------------------------------------------------------------------------------

FRAME_PIXELS = 200 * 28 * 28  # the benchmark's limit: 200 visual tokens a frame
UVRB_GROUPS = {"FG": ("S", "T", "PR"), "TXT": ("CG", "FG", "LC"), "AVG-A": ("TXT", "CMP", "VIS", "CG", "FG", "LC")}


def load_uvrb(root: Path, protocol: Protocol, download: bool = False) -> Suite:
    """UVRB's 16 sets. The official setting limits a frame to 200 visual tokens; the protocol gets that limit."""
    low = protocol.video_min_pixels and min(protocol.video_min_pixels, FRAME_PIXELS)
    protocol = replace(protocol, video_min_pixels=low, video_max_pixels=FRAME_PIXELS)
    tasks = {}
    for entry in table("uvrb.json")["datasets"]:
        name, (kind, k) = entry["name"], entry["metric"].split("@")
        tasks[name] = Task(
            name=name,
            modality="video",
            group=entry["leaf"],
            metric=f"precision@{k}" if kind == "P" else f"hit@{k}",  # its R@k is a hit: any right one counts
            expected_queries=entry["queries"],
            reader=partial(_read_uvrb, name, entry["prompt"], root, protocol),
            needs=f"{name}/jsonl, {name}/videos_frames",
            exported=name,
        )
    return Suite("uvrb", str(root), protocol, tasks, partial(uvrb_aggregate, tasks))


def uvrb_aggregate(tasks: Mapping[str, Task], scores: Mapping[str, TaskScore]) -> dict[str, float]:
    """Average UVRB's scores: leaves, the abilities made of them, and both averages: AVG-D over sets, AVG-A over
    abilities."""
    found: dict[str, float] = {}
    for leaf in dict.fromkeys(task.group for task in tasks.values()):
        members = [name for name, task in tasks.items() if task.group == leaf]
        if all(name in scores for name in members):
            found[leaf] = mean(scores[name].score for name in members)
    for group, parts in UVRB_GROUPS.items():
        if all(part in found for part in parts):
            found[group] = mean(found[part] for part in parts)
    if all(name in scores for name in tasks):
        found["AVG-D"] = mean(scores[name].score for name in tasks)
    return found


def _read_uvrb(name: str, instruction: str, root: Path, protocol: Protocol) -> TaskData:
    folders = [root / name / "UVRB" / name, root / name, root / "UVRB" / name]
    home = next((one for one in folders if (one / "jsonl").is_dir()), None)
    if home is None:
        raise DataError(f"no folder jsonl of {name}; looked in {', '.join(map(str, folders))}")
    source = Source(home, ("jsonl",))
    instances = source.rows("instances", "test")
    own_lists = any(row.get("neg") for row in instances)
    task = Collector(protocol, lists=own_lists)
    for row in source.rows("corpus", "test"):
        text = row.get("text") or ""
        task.candidate(str(row["id"]), with_video(text) if text else "", video=_clip(row["video"], home, task))
    asked = {str(row["id"]): row for row in source.rows("queries", "test")}
    for row in instances:
        query = asked.get(str(row["qid"]))
        if query is None:
            raise DataError(f"{home / 'jsonl' / 'instances.jsonl'}: no query {row['qid']!r} in queries.jsonl")
        own = {str(one): 1.0 for one in row["pos"]}
        listed = [*own, *(str(one) for one in row.get("neg") or ())]
        pool = [task.rows[one] for one in listed if one in task.rows] if own_lists else None
        images = [str(home / "images" / query["image"])] if query.get("image") else []
        video = _clip(query["video"], home, task) if query.get("video") else None
        add_query(task, prompt(instruction, query.get("text") or ""), images, own, video=video, pool=pool)
    return task.data()


def _clip(path: str, home: Path, task: Collector) -> list[str]:
    """Frames of a video: the folder of its name without extension, or the one folder inside that."""
    folder = home / "videos_frames" / Path(path).with_suffix("")
    found = frames(folder, task.protocol.frames)
    if not found and folder.is_dir():
        found = next((f for one in sorted(folder.iterdir()) if (f := frames(one, task.protocol.frames))), [])
    if not found:
        task.missing("missing_frames", str(folder))
    return found
