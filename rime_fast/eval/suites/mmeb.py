"""MMEB-V2 (78 tasks) and MMEB-V1 (36): what is where on the disk, and how tasks make an overall score."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rime_fast.data.records import DataError
from rime_fast.eval.suites import mmeb_image, mmeb_video, visdoc
from rime_fast.eval.suites.disk import Source, table_files
from rime_fast.eval.suites.protocol import Protocol
from rime_fast.eval.suites.tasks import Collector, Suite, Task, TaskData, TaskScore, group_means, table

# Judgements of these were wrong at first (TIGER-AI-Lab/VLM2Vec#167); the repaired copies have their own names.
FIXED = {"ViDoSeek-page": "ViDoSeek-page-fixed", "MMLongBench-page": "MMLongBench-page-fixed"}
V1_PICTURES = ("", "images", "eval_images", "MMEB", "image-tasks", "image-tasks/MMEB")
Entry = dict[str, Any]


def load_v2(root: Path, protocol: Protocol, download: bool = False) -> Suite:
    """The suite of 36 image, 18 video and 24 document tasks."""
    readers = {"image": _read_image, "video": _read_video, "visdoc": _read_pages}
    tasks = {}
    for entry in table("mmeb_v2_tasks.json"):
        reader = partial(readers[entry["modality"]], entry, root, protocol, download)
        tasks[entry["task"]] = Task(
            name=entry["task"],
            modality=entry["modality"],
            group=entry["group"],
            metric=entry["metric"],
            expected_queries=entry["num_queries"],
            reader=reader,
            in_domain=entry.get("in_domain"),
            needs=", ".join(_places(entry)),
            exported=FIXED.get(entry["task"], entry["task"]),
        )
    return Suite("mmeb-v2", str(root), protocol, tasks, partial(aggregate, tasks))


def load_v1(root: Path, protocol: Protocol, download: bool = False) -> Suite:
    """MMEB's first version: the 36 image tasks with instructions inside their texts."""
    tasks = {}
    for entry in table("mmeb_v2_tasks.json"):
        if entry["modality"] == "image":
            name = entry["task"]
            tasks[name] = Task(
                name=name,
                modality="image",
                group=entry["group"],
                metric="hit@1",
                expected_queries=1000,
                reader=partial(_read_v1, name, root, protocol, download),
                in_domain=entry["in_domain"],
                needs=f"{name}/test-*.parquet, images",
                exported=name,
            )
    return Suite("mmeb-v1", str(root), protocol, tasks, partial(aggregate, tasks))


def aggregate(tasks: Mapping[str, Task], scores: Mapping[str, TaskScore]) -> dict[str, float]:
    """Average scores over tasks: each group ("image.CLS"), in- and out-of-domain images, each modality, and "all",
    flat.

    A mean is there when all its tasks have a score.
    """
    groups: dict[str, list[str]] = {}
    for name, task in tasks.items():
        domain = {True: ["image.IND"], False: ["image.OOD"], None: []}[task.in_domain]
        for group in (f"{task.modality}.{task.group}", *domain, task.modality):
            groups.setdefault(group, []).append(name)
    groups["all"] = list(tasks)
    order = sorted(groups, key=lambda name: (name == "all", "." not in name))
    plain = {name: score.score for name, score in scores.items()}
    return dict(group_means({name: groups[name] for name in order}, plain))


def _places(entry: Entry) -> list[str]:
    config = f"/{entry['local'][1]}" if entry["local"][1] else ""
    roots = [path.rstrip("/") for kind, path in entry["roots"].items() if kind != "video_root"]
    return [f"{entry['local'][0]}{config}", *(path for path in roots if not entry["local"][0].startswith(path))]


def _source(entry: Entry, root: Path, download: bool) -> Source:
    """Where a task's table may be: the official home, then the repository's names; repaired sets before the others."""
    local, repo = entry["local"][0], entry["hf"][0]
    if entry["task"] in FIXED:
        fixed = FIXED[entry["task"]]
        return Source.of(root, [f"visdoc-tasks/{fixed}", repo, fixed], repo, download=download)
    more = ["image-tasks/MMEB"] if entry["modality"] == "image" else []
    return Source.of(root, [local, *more], repo, download=download)


def _read_image(entry: Entry, root: Path, protocol: Protocol, download: bool) -> TaskData:
    task = Collector(protocol, lists=True)
    pictures = mmeb_image.Pictures(root / "image-tasks", root / "image-tasks/MMEB")
    parse = mmeb_image.PARSERS[entry["parser"]]
    if entry["task"] == "VisDial":
        parse = partial(mmeb_image.text_to_image, end="\n\n")  # as in V1
    for row in _source(entry, root, download).rows(entry["hf"][1], entry["hf"][2]):
        parse(row, task, pictures)
    return task.data()


def _read_v1(name: str, root: Path, protocol: Protocol, download: bool) -> TaskData:
    task = Collector(protocol, lists=True)
    pictures = mmeb_image.Pictures(*(root / folder for folder in V1_PICTURES))
    source = Source.of(root, ["", "MMEB-eval"], "TIGER-Lab/MMEB-eval", download=download)
    for row in source.rows(name, "test"):
        mmeb_image.version_1(row, task, pictures)
    return task.data()


def _read_video(entry: Entry, root: Path, protocol: Protocol, download: bool) -> TaskData:
    task = Collector(protocol, lists=entry["eval_type"] == "local")
    home = root / entry["roots"]["frame_root"]
    folders = [home, home / "frames", home.with_name(home.name.replace("_", "-"))]
    clips = mmeb_video.Clips(root, folders, protocol.frames, task)
    source, parser = _source(entry, root, download), entry["parser"]
    parse = mmeb_video.PARSERS[parser]
    if parser == "mvbench":
        _read_mvbench(source, clips, task)
        return task.data()
    limit = 1000 if parser == "ssv2" else None  # the official set is the first 1000 rows
    about = parser if parser in mmeb_video.RETRIEVAL else entry["dataset_name"]
    for row in source.rows(entry["hf"][1], entry["hf"][2], any_config=True)[:limit]:
        parse(row, task, clips, about)
    if parser == "video_classification":
        mmeb_video.class_list(task, entry["dataset_name"])
    return task.data()


def _read_mvbench(source: Source, clips: mmeb_video.Clips, task: Collector) -> None:
    """The subsets that are there; those that are not are noted, for a part of MVBench is no MVBench."""
    first_error: DataError | None = None
    for subset in mmeb_video.MVBENCH:
        try:
            rows = source.rows(subset, "train")
        except DataError as error:
            first_error = first_error or error
            task.missing("missing_subsets", subset)
            continue
        for row in rows:
            mmeb_video.mv_bench(row, task, clips, subset)
    if first_error is not None and not task.queries:
        raise first_error


def _read_pages(entry: Entry, root: Path, protocol: Protocol, download: bool) -> TaskData:
    task = Collector(protocol, lists=False)
    name = entry["roots"]["image_root"].partition("/")[2]
    folders = [root / "visdoc-tasks" / middle / name for middle in ("", "images", "visdoc-tasks")]
    source, split = _source(entry, root, download), entry["hf"][2]
    if entry["task"] in FIXED and not _has_corpus(source, split):
        unfixed = Source.of(root, [entry["local"][0]], "", download=False)
        if _has_corpus(unfixed, split):
            task.notes["page_set"] = f"not the repaired {entry['hf'][0]}: scores cannot be compared with new ones"
            source = unfixed
    return visdoc.pages(source, split, entry["parser"], folders, task)


def _has_corpus(source: Source, split: str) -> bool:
    return any(folder.is_dir() and table_files(folder, "corpus", split) for folder in source.places())
