"""Writes the golden rows of MMEB-V2 where the benchmark has them, with small pictures and frames."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rime_fast.eval.suites.mmeb_video import MVBENCH
from rime_fast.eval.suites.tasks import table

HERE = Path(__file__).parent
GOLDENS: dict[str, dict[str, Any]] = json.loads((HERE / "mmeb_v2_goldens.json").read_text())
ENTRIES = {entry["task"]: entry for entry in table("mmeb_v2_tasks.json")}
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
README = "---\nconfigs:\n{configs}---\n"


@cache
def png(seed: int, width: int = 32, height: int = 32) -> bytes:
    """A picture of its own for each seed: four coloured quarters, so that a tiny model sees a difference."""
    colours = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def write_picture(path: Path, seed: int, width: int = 32, height: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed, width, height))


def write_frames(folder: Path, count: int, seed: int, form: str = "frame_{:04d}.jpg") -> None:
    for i in range(1, count + 1):
        write_picture(folder / form.format(i), seed * 100 + i)


def write_table(path: Path, rows: list[dict[str, Any]], **columns: list[Any]) -> None:
    """Rows as parquet; further ``columns`` are pictures, given as bytes or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.Table.from_pylist(rows) if rows else pa.table({})
    for name, values in columns.items():
        cells = [None if value is None else {"bytes": value, "path": None} for value in values]
        made = made.append_column(name, pa.array(cells, IMAGE_TYPE))
    pq.write_table(made, path, row_group_size=2)


def write_sets(
    folder: Path, split: str, tables: dict[str, list[dict[str, Any]]], images: list[Any] | None, readme: bool
):
    """corpus, queries and qrels, named by a README or by their folders."""
    lines = []
    for config, rows in tables.items():
        place = f"stored/{config}.parquet" if readme else f"{config}/{split}-00000-of-00001.parquet"
        write_table(folder / place, rows, **({"image": images} if config == "corpus" and images else {}))
        lines.append(f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {place}\n")
    if readme:
        (folder / "README.md").write_text(README.format(configs="".join(lines)))


def write_goldens(root: Path, names: list[str] | None = None, *, image_folder: str = "image-tasks") -> Path:
    """All golden tasks, or those named, below ``root``."""
    for seed, name in enumerate(names or GOLDENS, 1):
        writer = {"image": _image, "video": _video, "visdoc": _pages}[ENTRIES[name]["modality"]]
        writer(root, ENTRIES[name], GOLDENS[name], seed, image_folder)
    return root


def _image(root: Path, entry: dict[str, Any], golden: dict[str, Any], seed: int, folder: str) -> None:
    write_table(root / folder / entry["task"] / "test-00000-of-00001.parquet", golden["rows"])
    paths = [row["qry_img_path"] for row in golden["rows"]]
    paths += [path for row in golden["rows"] for path in row["tgt_img_path"]]
    for i, path in enumerate(dict.fromkeys(path for path in paths if path)):
        width, height = [(32, 32), (20, 20), (300, 40)][i % 3]
        write_picture(root / folder / path, seed * 100 + i, width, height)


def _video(root: Path, entry: dict[str, Any], golden: dict[str, Any], seed: int, _: str) -> None:
    home = root / entry["roots"]["frame_root"]
    local, split = root / entry["local"][0], entry["hf"][2]
    if entry["task"] == "MVBench":
        row = {"video": "z.mp4", "question": "What happened?", "candidates": ["It fell.", "It rose.", "It fell."]}
        for i, subset in enumerate(MVBENCH):
            write_table(local / subset / f"{split}-00000-of-00001.parquet", [row | {"answer": "It rose."}])
            write_frames(home / subset / "z.mp4", 20, seed * 10 + i)
        return
    config = entry["hf"][1]
    write_table(local / (config or "data") / f"{split}-00000-of-00001.parquet", golden["rows"])
    folders = {path.rpartition("/")[0] for query in golden["queries"] for path in query["images"] or ()}
    folders |= {path.rpartition("/")[0] for one in golden["candidates"] for path in one.get("images") or ()}
    own = golden["config"]["frame_root"]
    for i, folder in enumerate(sorted(folders)):
        name = folder.removeprefix(own).strip("/")
        if not name:  # MomentSeeker's query picture stands beside the folders
            write_picture(home / "query_q.jpg", seed)
            continue
        count = {"SmthSmthV2": 5, "MomentSeeker": 5}.get(entry["task"], 20)
        count = {"positive": 9, "negative_0": 8}.get(Path(name).name, count)
        write_frames(home / name, count, seed * 10 + i)


def _pages(root: Path, entry: dict[str, Any], golden: dict[str, Any], seed: int, _: str) -> None:
    tables: dict[str, list[dict[str, Any]]]
    if entry["parser"] == "vidore":
        pairs = [(0, 2, 1), (0, 3, 2), (0, 2, 1), (1, 1, 1), (1, 0, 0)]
        queries, corpus = [(i, f"question {i}") for i in (0, 1)], [0, 1, 2, 3]
    else:
        long = golden["queries"][0]["cand_names"][0]
        pairs, queries, corpus = [("q0", long, 1)], [("q0", "question q0")], ["short.png", long]
    tables = {
        "corpus": [{"corpus-id": name} for name in corpus],
        "queries": [{"query-id": name, "query": text} for name, text in queries],
        "qrels": [{"query-id": q, "corpus-id": c, "score": s} for q, c, s in pairs],
    }
    images = [png(seed * 100 + i) for i in range(len(corpus))]
    write_sets(root / entry["local"][0], entry["hf"][2], tables, images, readme=entry["parser"] == "vidore")


# --- MMEB-V1, MRMR, UVRB, BEIR ---------------------------------------------------------------------------------------


def write_v1(root: Path) -> Path:
    """Two tasks of MMEB-V1: a picture to texts, a text to pictures."""
    classes = {"tgt_text": ["tench", "goldfish"], "tgt_img_path": ["", ""], "qry_img_path": "ImageNet-1K/a.jpg"}
    row = classes | {"qry_text": "<|image_1|>\nRepresent the given image for classification\n"}
    write_table(root / "ImageNet-1K" / "test-00000-of-00001.parquet", [row])
    shown = "<|image_1|>\nRepresent the given image.\n"
    row = {"qry_text": "Find me a picture: a man\n", "qry_img_path": "", "tgt_text": [shown, shown]}
    row |= {"tgt_img_path": ["MSCOCO_t2i/1.jpg", "MSCOCO_t2i/2.jpg"]}
    write_table(root / "MSCOCO_t2i" / "test-00000-of-00001.parquet", [row])
    for i, path in enumerate(["ImageNet-1K/a.jpg", "MSCOCO_t2i/1.jpg", "MSCOCO_t2i/2.jpg"]):
        write_picture(root / "images" / path, 900 + i)
    return root


def write_mrmr(root: Path) -> Path:
    """All five sets: knowledge has extra negatives, a wide merged picture and a query of text alone."""
    for name, spelled in [("knowledge", "_"), ("theorem", "_"), ("negation", "-"), ("design", "-"), ("traffic", "-")]:
        subject = {"knowledge": ["Music", "Biology"], "theorem": ["Math", "Finance"]}.get(name, ["", ""])
        ids = ["7_1", "7_2", "7_3", "7_4", "9_1", "9_2", "9_3", "9_4"] if name == "negation" else ["a", "b", "c"]
        query_ids = ["7", "9"] if name == "negation" else ["0", "1"]
        tables = {
            "corpus": [{"id": one, "modality": "text", "text": f"{name} document {one}"} for one in ids],
            "query": [
                {"id": one, "text": f"{name} question {one}", "category": field}
                for one, field in zip(query_ids, subject, strict=True)
            ],
            "qrels": [
                {f"query{spelled}id": q, f"corpus{spelled}id": c, "score": 1}
                for q, c in zip(query_ids, ["7_1", "9_1"] if name == "negation" else ["b", "a"], strict=True)
            ],
        }
        pictures: dict[str, list[bytes | None]] = {
            "corpus": [png(700, 2400, 600) if name == "knowledge" else None, *[None] * (len(ids) - 1)],
            "query": [png(710), None],
            "qrels": [],
        }
        if name in ("knowledge", "theorem"):
            tables["pin_p"] = [{"text": "an extra negative"}, {"text": f"{name} document c"}]
            pictures["pin_p"] = [None, None]  # the second is in the corpus already
        for config, rows in tables.items():
            images = {"image": pictures[config]} if pictures[config] else {}
            write_table(root / "MRMRbenchmark" / name / config / "test-00000-of-00001.parquet", rows, **images)
    return root


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_uvrb(root: Path) -> Path:
    """Two sets: text to video below UVRB's double folder, and text with a picture with lists of its own."""
    home = root / "MSRVTT" / "UVRB" / "MSRVTT"
    write_jsonl(home / "jsonl/corpus.jsonl", [{"id": f"d{i}", "video": f"v{i}.mp4"} for i in range(3)])
    write_jsonl(home / "jsonl/queries.jsonl", [{"id": f"q{i}", "text": f"a clip number {i}"} for i in range(2)])
    write_jsonl(home / "jsonl/instances.jsonl", [{"qid": f"q{i}", "pos": [f"d{i}"]} for i in range(2)])
    for i in range(3):
        write_frames(home / "videos_frames" / f"v{i}", 10, 60 + i, "{}.jpg")
    home = root / "MS-TI"
    write_jsonl(home / "jsonl/corpus.jsonl", [{"id": f"d{i}", "video": f"deep/v{i}.mp4"} for i in range(4)])
    write_jsonl(home / "jsonl/queries.jsonl", [{"id": "q0", "text": "like this", "image": "q0.jpg"}])
    write_jsonl(home / "jsonl/instances.jsonl", [{"qid": "q0", "pos": ["d2"], "neg": ["d0", "d3"]}])
    write_picture(home / "images/q0.jpg", 640)
    for i in range(4):
        write_frames(home / "videos_frames" / "deep" / f"v{i}" / "frames", 1, 65 + i)
    return root


def write_beir(root: Path) -> Path:
    """One set in JSONL with judgements in a table of tabs, graded, and one query that nobody judged."""
    home = root / "recipes"
    corpus = [{"_id": f"d{i}", "title": f"dish {i}", "text": f"stir {i} times"} for i in range(5)]
    corpus[3] = {"_id": "d3", "text": "", "image": "pictures/d3.jpg"}
    write_jsonl(home / "corpus.jsonl", corpus)
    write_jsonl(home / "queries.jsonl", [{"_id": f"q{i}", "text": f"how to cook {i}"} for i in range(3)])
    (home / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", "q0\td0\t2", "q0\td3\t1", "q1\td1\t1", "q1\td2\t0"]
    (home / "qrels/test.tsv").write_text("\n".join(lines) + "\n")
    write_picture(home / "pictures/d3.jpg", 650)
    return root
