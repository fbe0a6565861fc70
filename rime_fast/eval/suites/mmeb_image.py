"""MMEB's image tasks (V2 and V1): rows with a query and a list of targets, the first of which is right.

The strings are those of VLM2Vec's loaders, checked against golden cases (tests/eval/suites).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rime_fast.eval.suites.disk import Row, first_existing
from rime_fast.eval.suites.protocol import IMAGE_TOKEN, VIDEO_TOKEN
from rime_fast.eval.suites.tasks import Collector

PLACEHOLDER = "<|image_1|>"


def prompt(instruction: str, text: str = "", token: str = "") -> str:
    """Instruction and text in one line, behind a vision token where there is one."""
    line = f"{instruction} {text}" if text else instruction
    return f"{token} {line}" if token else line


def with_image(instruction: str, text: str = "") -> str:
    return prompt(instruction, text, IMAGE_TOKEN)


def with_video(instruction: str, text: str = "") -> str:
    return prompt(instruction, text, VIDEO_TOKEN)


def _cleaned(text: str) -> str:
    return text.replace(" \n", "\n")


class Pictures:
    """Paths of a task's pictures below the folders that an archive may have been unpacked to."""

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        self._known: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        if path not in self._known:
            self._known[path] = str(first_existing(folder / path for folder in self.folders))
        return self._known[path]


def image_to_text(row: Row, task: Collector, pictures: Pictures) -> None:
    """Read a task of image_cls or image_i2t: a picture, and texts to choose from."""
    _answer_texts(row, task, pictures, row["qry_inst"].replace(PLACEHOLDER, ""))


def image_qa(row: Row, task: Collector, pictures: Pictures) -> None:
    """Read a task of image_qa: a picture and a question, and answers to choose from."""
    _answer_texts(row, task, pictures, "\n" + row["qry_inst"].replace(PLACEHOLDER, "").strip())


def _answer_texts(row: Row, task: Collector, pictures: Pictures, instruction: str) -> None:
    texts = list(row["tgt_text"])
    pool = [task.candidate(text, text) for text in texts]
    query = _cleaned(with_image(instruction, row["qry_text"])) + "\n"
    task.query(query, texts[:1], pool=pool, images=[pictures(row["qry_img_path"])])


def text_to_image(row: Row, task: Collector, pictures: Pictures, *, end: str = "\n") -> None:
    """Read a task of image_t2i: a text, and pictures (some with captions) to choose from."""
    paths, captions = list(row["tgt_img_path"]), list(row["tgt_text"])
    texts = _picture_texts(row["tgt_inst"], captions, end="\n")
    pool = [task.candidate(path, text, images=[pictures(path)]) for path, text in zip(paths, texts, strict=True)]
    instruction = row["qry_inst"].replace(PLACEHOLDER, IMAGE_TOKEN)
    task.query(f"{instruction} {row['qry_text']}{end}", paths[:1], pool=pool)


def image_to_image(row: Row, task: Collector, pictures: Pictures) -> None:
    """Read a task of image_i2i_vg: a picture and a text, and pictures (some with captions) to choose from."""
    paths, captions = list(row["tgt_img_path"]), list(row["tgt_text"])
    texts = _picture_texts(row["tgt_inst"], captions, end="")
    names = [f"{path}:" + caption.strip('"') for path, caption in zip(paths, captions, strict=True)]
    parts = zip(names, texts, paths, strict=True)
    pool = [task.candidate(name, text, images=[pictures(path)]) for name, text, path in parts]
    instruction = "\n" + row["qry_inst"].replace(PLACEHOLDER, "").strip()
    query = _cleaned(with_image(instruction, row["qry_text"])) + "\n"
    task.query(query, names[:1], pool=pool, images=[pictures(row["qry_img_path"])])


def _picture_texts(instruction: str, captions: list[str], end: str) -> list[str]:
    """Texts of target pictures: the first caption decides whether captions are written, and then ends a line."""
    instruction = instruction.replace(PLACEHOLDER, "")
    if captions and captions[0].strip():
        return [_cleaned(with_image(f"{instruction} {caption}")) + "\n" for caption in captions]
    return [_cleaned(with_image(instruction)) + end] * len(captions)


def version_1(row: Row, task: Collector, pictures: Pictures) -> None:
    """Read a task of MMEB-V1: instructions stand in the texts, either side may have a picture, the first target is
    right."""
    names, pool = [], []
    for text, path in zip(row["tgt_text"], row["tgt_img_path"], strict=True):
        names.append(f"{path}:{text}" if path else text)
        pool.append(task.candidate(names[-1], _placed(text, path), images=[pictures(path)] if path else []))
    path = row["qry_img_path"]
    task.query(_placed(row["qry_text"], path), names[:1], pool=pool, images=[pictures(path)] if path else [])


def _placed(text: str, path: str) -> str:
    """The text with the vision token where V1 has its placeholder, or in front where a picture has none."""
    text = text.replace(PLACEHOLDER, IMAGE_TOKEN if path else "")
    return f"{IMAGE_TOKEN}\n{text}" if path and IMAGE_TOKEN not in text else text


PARSERS: dict[str, Callable[[Row, Collector, Pictures], None]] = {
    "image_cls": image_to_text,
    "image_i2t": image_to_text,
    "image_qa": image_qa,
    "image_t2i": text_to_image,
    "image_i2i_vg": image_to_image,
    "version_1": version_1,
}
