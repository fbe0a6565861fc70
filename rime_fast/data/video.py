"""Videos: lists of frames, folders of frames, and files that are decoded (with PyAV) to a few frames.

From a file n frames are taken at the middles of n equal spans of its time; n is given, or follows from a rate up to a
limit. Only those frames are decoded to pixels, in whatever process makes the batch.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rime_fast.data.archives import MEMBER, open_file, read_member
from rime_fast.data.images import MAX_PIXELS, ImageSource, hash_image, image_size, is_url, remote_file

ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".3gp")
_FRAMES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp")
# A gap between two wanted frames that is worth a jump to the key frame before the second, in seconds.
_JUMP = 4.0

VideoSource = str | list[ImageSource]


@dataclass(frozen=True)
class FrameSampling:
    """How many frames are taken of a video file or a folder of frames. A list of frames is taken whole.

    frames: that many, evenly spread; None: ``fps`` a second, at most ``most``.
    """

    frames: int | None = None
    fps: float = 2.0
    most: int = 64

    def count(self, seconds: float) -> int:
        """How many frames are taken of a video of that length."""
        return self.frames if self.frames is not None else min(self.most, max(1, round(seconds * self.fps)))


@dataclass
class Video:
    """A video as a row gives it. source: a list of frames, or the path of a video file or of a folder of frames. fps:
    frames per second of a list or folder; for a file, the rate to sample it at. None: the sampling's own."""

    source: VideoSource
    fps: float | None = None


class Frames(NamedTuple):
    """The frames that stand for a video: length frames of size (height, width), fps of them a second. images: the
    frames, None where only planned."""

    length: int
    size: tuple[int, int]
    fps: float
    images: Sequence[ImageSource] | None = None


def is_video_file(path: str) -> bool:
    """Whether a path names a video file, by its ending."""
    return os.path.splitext(path)[1].lower() in ENDINGS


def plan_frames(video: Video, sampling: FrameSampling, *, max_pixels: int = MAX_PIXELS) -> Frames:
    """What ``load_frames`` will give, without the pixels: of a file the head and first frame are read. Raises
    ValueError naming the video."""
    if isinstance(video.source, str) and not os.path.isdir(video.source):
        with _opened(video.source) as (container, stream):
            seconds, size = _seconds(container, stream), _first_size(container, stream)
        if size[0] * size[1] > max_pixels:
            raise ValueError(f"video too large: {video.source} ({size[1]} x {size[0]} pixels a frame)")
        count = _sampling_of(video, sampling).count(seconds)
        return Frames(count, size, count / seconds)
    frames, fps = _listed(video, sampling)
    return Frames(len(frames), image_size(frames[0], max_pixels=max_pixels), fps)


def load_frames(video: Video, sampling: FrameSampling, *, max_pixels: int = MAX_PIXELS) -> Frames:
    """The frames themselves; those of a file as [H, W, 3] uint8 arrays. Raises ValueError naming the video."""
    if isinstance(video.source, str) and not os.path.isdir(video.source):
        plan = plan_frames(video, sampling, max_pixels=max_pixels)
        with _opened(video.source) as (container, stream):
            times = [(i + 0.5) / plan.fps for i in range(plan.length)]
            images = list(_frames_at(container, stream, times))
        if not images:
            raise ValueError(f"broken video: {video.source} (no frame can be decoded)")
        return plan._replace(images=images + images[-1:] * (plan.length - len(images)))
    frames, fps = _listed(video, sampling)
    return Frames(len(frames), image_size(frames[0], max_pixels=max_pixels), fps, frames)


def hash_video(video: Video, digest: Any) -> None:
    """Add to ``digest`` what tells this video from others."""
    if isinstance(video.source, str):
        digest.update(b"\0video\0" + os.fsencode(video.source))
        return
    digest.update(f"\0frames {len(video.source)}\0".encode())
    for frame in video.source:
        digest.update(b"\0image\0")
        hash_image(frame, digest)


def _listed(video: Video, sampling: FrameSampling) -> tuple[Sequence[ImageSource], float]:
    """The frames of a list, all of them, or of a folder, evenly spread; and their rate."""
    if not isinstance(video.source, str):
        return video.source, video.fps or sampling.fps
    names = sorted((n for n in os.listdir(video.source) if n.lower().endswith(_FRAMES)), key=_natural)
    if not names:
        raise ValueError(f"broken video: {video.source} (a folder without frames)")
    count = min(len(names), sampling.most if sampling.frames is None else sampling.frames)
    chosen = [os.path.join(video.source, names[int((i + 0.5) * len(names) / count)]) for i in range(count)]
    return chosen, (video.fps or sampling.fps) * count / len(names)


def _natural(name: str) -> list[tuple[int, str]]:
    """Frame 2 before frame 10, with or without leading zeros."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# --- files -----------------------------------------------------------------------------------------------------------


def _sampling_of(video: Video, sampling: FrameSampling) -> FrameSampling:
    rate = sampling.fps if video.fps is None else video.fps
    return FrameSampling(sampling.frames if video.fps is None else None, rate, sampling.most)


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream); every error becomes a ValueError with the video's name."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{path} is a video file: pip install 'rime-fast[video]'") from None
    try:
        if is_url(path):
            file: Any = remote_file(path)
        else:
            file = io.BytesIO(read_member(path)) if MEMBER in path else open_file(path)
    except FileNotFoundError:
        raise ValueError(f"missing video: {path}") from None
    except OSError as error:
        raise ValueError(f"broken video: {path} ({error})") from None
    try:
        with file, av.open(file, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, ValueError, MemoryError, ArithmeticError, AttributeError, IndexError) as error:
        raise ValueError(f"broken video: {path} ({error})") from None


def _seconds(container: Any, stream: Any) -> float:
    """The video's length: as its head says, else by its packets."""
    if stream.duration:
        return max(float(stream.duration * stream.time_base), 1e-3)
    if container.duration:
        return max(container.duration / 1e6, 1e-3)
    last, count = 0.0, 0
    for packet in container.demux(stream):
        if packet.pts is not None:
            last, count = max(last, float(packet.pts * stream.time_base)), count + 1
    container.seek(0)
    if not count:
        raise ValueError("it has no frames")
    return max(last * count / max(count - 1, 1), 1e-3)


def _first_size(container: Any, stream: Any) -> tuple[int, int]:
    for frame in container.decode(stream):
        return (frame.width, frame.height) if _turned(frame) % 2 else (frame.height, frame.width)
    raise ValueError("no frame can be decoded")


def _turned(frame: Any) -> int:
    """Quarter turns anticlockwise that set the frame upright."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _frames_at(container: Any, stream: Any, times: list[float]) -> Iterator[np.ndarray]:
    """The frame on display at each time (ascending), counted from the first frame."""
    begin = float((stream.start_time or 0) * stream.time_base)
    shown = None  # the last frame whose time has come
    decoding, after = container.decode(stream), None
    for time in times:
        at = begin + time
        known: Any = after if after is not None else shown
        if known is not None and known.time is not None and at - known.time > _JUMP:
            container.seek(int(at / stream.time_base), stream=stream, backward=True)
            decoding, after = container.decode(stream), None
        while True:
            if after is None:
                after = next(decoding, None)
            if after is None or (after.time is not None and after.time > at and shown is not None):
                break
            shown, after = after, None
        if shown is None:
            return
        pixels = shown.to_ndarray(format="rgb24")
        yield np.ascontiguousarray(np.rot90(pixels, _turned(shown)))
