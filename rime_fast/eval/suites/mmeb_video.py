"""MMEB-V2's video tasks: classification, questions, retrieval, moments. Videos are folders of frames.

Each parser takes one row, and adds its query and candidates; the strings are those of VLM2Vec's loaders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rime_fast.data.records import DataError
from rime_fast.eval.suites.disk import Row, first_existing, frames, natural
from rime_fast.eval.suites.mmeb_image import prompt, with_image, with_video
from rime_fast.eval.suites.tasks import Collector, table

VIDEO = "Understand the content of the provided video."
CLIP = "Understand the content of the provided video clip."
MOMENT = "Find the clip that corresponds to the described scene in the given video:"
QUESTION = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)
# parser -> column of the video's name, column of the caption, instruction
RETRIEVAL = {
    "msrvtt": ("video_id", "caption", "Find a video that contains the following visual content:"),
    "msvd": ("video_id", "caption", "Find the video snippet that corresponds to the given summary:"),
    "didemo": ("video", "caption", "Find a video that includes the following described scenes:"),
    "youcook2": ("id", "sentence", "Find a video that demonstrates the following action while making a recipe:"),
    "vatex": ("videoID", "enCap", "Select a video that fits the description provided:"),
}
MVBENCH = (  # in the official order
    *("episodic_reasoning", "action_sequence", "action_prediction", "action_antonym", "fine_grained_action"),
    *("unexpected_action", "object_existence", "object_interaction", "object_shuffle", "moving_direction"),
    *("action_localization", "scene_transition", "action_count", "moving_count", "moving_attribute", "state_change"),
    *("fine_grained_pose", "character_order", "egocentric_navigation", "counterfactual_inference"),
)


@dataclass
class Clips:
    """A task's frames: one folder a video below the first of ``folders`` that has it."""

    root: Path
    folders: Sequence[Path]
    count: int
    task: Collector

    def folder(self, name: str) -> Path:
        return first_existing(folder / name for folder in self.folders)

    def sampled(self, folder: Path, count: int | None) -> list[str]:
        """Pick the frames of a video as paths; a folder without any is noted."""
        found = frames(folder, count)
        if not found:
            self.task.missing("missing_frames", self.name(folder))
        return found

    def video(self, name: str) -> list[str]:
        return self.sampled(self.folder(name), self.count)

    def name(self, folder: Path) -> str:
        """Name a folder by the benchmark's key: relative to the suite's root."""
        return Path(os.path.relpath(folder, self.root)).as_posix()


def classification(row: Row, task: Collector, clips: Clips, dataset: str) -> None:
    """Read a task of video_classification: all labels of the rows, then the class list, are the candidates (see
    ``class_list``)."""
    task.candidate(row["pos_text"], row["pos_text"])
    _classify(row, task, clips, dataset, None)


def choice_of_labels(row: Row, task: Collector, clips: Clips, dataset: str) -> None:
    """Read ssv2: the row's own list of labels, the right one among them."""
    _classify(row, task, clips, dataset, [task.candidate(text, text) for text in row["neg_text"]])


def _classify(row: Row, task: Collector, clips: Clips, dataset: str, pool: list[int] | None) -> None:
    instruction = _labels()["instruction"][dataset]
    task.query(with_video(instruction), [row["pos_text"]], pool=pool, video=clips.video(str(row["video_id"])))


def class_list(task: Collector, dataset: str) -> None:
    """Add the published classes as candidates, behind those of the rows."""
    for label in _labels()["labels"][dataset]:
        task.candidate(label, label)


def _labels() -> dict[str, dict]:
    return table("videocls_labels.json")


def retrieval(row: Row, task: Collector, clips: Clips, parser: str) -> None:
    """Read a task of retrieval: a caption, and every video of the set."""
    key, column, instruction = RETRIEVAL[parser]
    name = str(row[key])
    if parser == "didemo":
        name = PurePosixPath(name).stem
    caption = row[column]
    text = caption if isinstance(caption, str) else caption[0]
    if name not in task.rows:
        task.candidate(name, with_video(VIDEO), video=clips.video(name))
    task.query(prompt(instruction, text), [name])


def moments(row: Row, task: Collector, clips: Clips, _: str) -> None:
    """Read a task of moment_retrieval: a video with a sentence, and clips of it; the folders named
    positive* are right."""
    folder = clips.folder(PurePosixPath(row["video_path"]).stem)
    listed = [one.name for one in os.scandir(folder) if one.is_dir()] if folder.is_dir() else []
    pool, right = [], []
    for clip in sorted((name for name in listed if name != "query"), key=natural):
        name = clips.name(folder / clip)
        if name not in task.rows:
            task.candidate(name, with_video(VIDEO), video=clips.sampled(folder / clip, clips.count))
        pool.append(task.rows[name])
        right += [name] if clip.startswith("positive") else []
    video = clips.sampled(folder / "query", clips.count)
    task.query(with_video(MOMENT, row["query"]), right, pool=pool, video=video)


def moment_seeker(row: Row, task: Collector, clips: Clips, _: str) -> None:
    """Read momentseeker: a text, with a video or a picture or neither, and clips; all saved frames are used."""
    pool = []
    names: dict[str, list[str]] = {"positive_frames": [], "negative_frames": []}
    for column, found in names.items():
        for clip in row[column] or ():
            folder = clips.folder(_flat(clip["output_path"]))
            found.append(clips.name(folder))
            if found[-1] not in task.rows:
                task.candidate(found[-1], with_video(CLIP), video=clips.sampled(folder, None))
            pool.append(task.rows[found[-1]])
    given, text = row["input_frames"] or "", row["query"]
    if given.endswith(".mp4"):
        line = with_video("Find the clip that corresponds to the given sentence and video segment:", text)
        video = clips.sampled(clips.folder(_flat(given)), None)
        task.query(line, names["positive_frames"], pool=pool, video=video)
    elif given.endswith(".jpg"):
        line = with_image("Select the video clip that aligns with the given text and image:", text)
        image = clips.folder(f"query_{given}")
        task.query(line, names["positive_frames"], pool=pool, images=[str(image)])
    else:
        line = prompt("Find the clip that corresponds to the given text:", text)
        task.query(line, names["positive_frames"], pool=pool)


def _flat(path: str) -> str:
    """A clip's path as the name of its folder of frames."""
    return "video_frames/" + path.replace("/", "_").removesuffix(".mp4")


def _ask(task: Collector, question: str, answers: Sequence[tuple[str, str]], right: str, video: list[str]) -> None:
    """A question about a video; answers: (name, text)."""
    pool = [task.candidate(name, text) for name, text in answers]
    task.query(with_video(QUESTION, question), [right], pool=pool, video=video)


def _lettered(options: Sequence[str]) -> list[tuple[str, str]]:
    """Options written "A. text": the whole is the name, the text alone the candidate."""
    return [(option, option[option.find(". ") :].strip(". ")) for option in options]


def _listed(options: Sequence[str]) -> list[str]:
    return [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options)]


def video_mme(row: Row, task: Collector, clips: Clips, _: str) -> None:
    options = list(row["options"])
    right = options["ABCDEFGH".index(row["answer"])]
    question = row["question"] + "\n" + "\n".join(options)
    _ask(task, question, _lettered(options), right, clips.video(str(row["videoID"])))


def next_qa(row: Row, task: Collector, clips: Clips, _: str) -> None:
    options = [row[f"a{i}"] for i in range(5)]
    question = row["question"] + "\nOptions:\n" + "\n".join(_listed(options))
    answers = [(option, option) for option in options]
    _ask(task, question, answers, options[int(row["answer"])], clips.video(str(row["video"])))


def ego_schema(row: Row, task: Collector, clips: Clips, _: str) -> None:
    options = list(row["option"])
    question = row["question"] + " ".join(options)
    _ask(task, question, _lettered(options), options[int(row["answer"])], clips.video(str(row["video_idx"])))


def mv_bench(row: Row, task: Collector, clips: Clips, subset: str) -> None:
    listed = _listed(row["candidates"])
    if row["answer"] not in row["candidates"]:
        raise DataError(f"MVBench, {subset}: answer {row['answer']!r} is not among {list(row['candidates'])}")
    right = listed[list(row["candidates"]).index(row["answer"])]
    question = row["question"] + "\nOptions:\n" + "\n".join(listed)
    _ask(task, question, [(one, one) for one in listed], right, clips.video(f"{subset}/{row['video']}"))


def activitynet_qa(row: Row, task: Collector, clips: Clips, _: str) -> None:
    question = row["question"] + "? (A) yes; (B) no."
    video = clips.video(f"v_{row['video_name']}")
    _ask(task, question, [("yes", "yes"), ("no", "no")], row["answer"], video)


PARSERS: dict[str, Callable[[Row, Collector, Clips, str], None]] = {
    "video_classification": classification,
    "ssv2": choice_of_labels,
    **dict.fromkeys(RETRIEVAL, retrieval),
    "moment_retrieval": moments,
    "momentseeker": moment_seeker,
    "videomme": video_mme,
    "nextqa": next_qa,
    "egoschema": ego_schema,
    "mvbench": mv_bench,
    "activitynetqa": activitynet_qa,
}
