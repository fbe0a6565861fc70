"""Video files decode to the right frames; interleaved content and several videos reach the prompt in order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from rime_fast.data.check import CheckRules, check_pair
from rime_fast.data.collate import Collator
from rime_fast.data.formats import pair_to_json, parse_row
from rime_fast.data.records import Pair, Side, content_hash
from rime_fast.data.rope import FAMILIES
from rime_fast.data.video import FrameSampling, Video, load_frames, plan_frames
from tests.data.builders import config, picture, processor

av = pytest.importorskip("av")


def clip(path, frames=40, rate=10, gop=12, size=(32, 24)):
    """A video whose frame i is grey level 6 i."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, rate)
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 6 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return str(path)


def levels(frames):
    """The frame numbers that the pixels show."""
    return [round(float(np.mean(image)) / 6) for image in frames.images]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_uniform_frames(tmp_path, ending):
    path = clip(tmp_path / f"a.{ending}")
    for count in (1, 4, 8, 40):
        sampling = FrameSampling(frames=count)
        frames = load_frames(Video(path), sampling)
        expected = [int((i + 0.5) * 40 / count) for i in range(count)]
        assert np.abs(np.subtract(levels(frames), expected)).max() <= 1
        assert frames.length == count == len(frames.images)
        assert frames.size == (24, 32) == frames.images[0].shape[:2]
        assert frames.fps == pytest.approx(count / 4, rel=0.05)
        assert plan_frames(Video(path), sampling) == frames._replace(images=None)


def test_a_rate_up_to_a_limit(tmp_path):
    path = clip(tmp_path / "a.mp4")
    assert load_frames(Video(path), FrameSampling(fps=2)).length == 8
    assert load_frames(Video(path), FrameSampling(fps=2, most=5)).length == 5
    assert load_frames(Video(path, fps=1), FrameSampling(frames=9)).length == 4  # the video's own rate wins
    assert load_frames(Video(clip(tmp_path / "b.mp4", frames=1)), FrameSampling()).length == 1


def test_far_apart_frames_are_jumped_to(tmp_path):
    path = clip(tmp_path / "long.mp4", frames=40, rate=1)
    frames = load_frames(Video(path), FrameSampling(frames=4))
    assert np.abs(np.subtract(levels(frames), [5, 15, 25, 35])).max() <= 1


def test_broken_videos_are_named(tmp_path):
    whole = clip(tmp_path / "a.mkv")
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("gone.mp4", "missing video"),
        ("text.mp4", "broken video"),
        ("empty.mp4", "broken video"),
        ("folder", "a folder without frames"),
    ):
        for look in (plan_frames, load_frames):
            with pytest.raises(ValueError, match=message):
                look(Video(str(tmp_path / name)), FrameSampling())
    # a cut file still has its first frames: the last one that is there stands for the rest
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 2 // 3])
    frames = load_frames(Video(str(tmp_path / "cut.mkv")), FrameSampling(frames=8))
    assert len(frames.images) == 8
    with pytest.raises(ValueError, match="video too large"):
        plan_frames(Video(whole), FrameSampling(), max_pixels=100)
    pair = Pair(Side("q", video=str(tmp_path / "text.mp4")), Side("t"))
    ((field, _),) = check_pair(pair, CheckRules(rewrites=False))
    assert field == "query.video"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_its_frames(tmp_path, family):
    """The batch of a video file is that of the list of its frames at their rate, and is measured right."""
    path = clip(tmp_path / "a.mp4")
    made = Collator(processor(), "rewrite", config(family), video_frames=4)
    frames = load_frames(Video(path), made.sampling)
    by_file = Side("what", video=path, rewrite="red")
    by_list = Side("what", video=list(frames.images), fps=frames.fps, rewrite="red")
    one, two = made.collate_sides([by_file]), made.collate_sides([by_list])
    for key in ("input_ids", "position_ids", "pixel_values_videos", "video_grid_thw"):
        assert (one[key] == two[key]).all(), key
    assert made.measure([by_file, by_list]) == [one["lengths"][0]] * 2


def test_video_paths_by_their_form(tmp_path):
    def video(value):
        pair, problems = parse_row({"query": {"video": value}, "target": {"text": "t"}}, root="/r")
        assert not problems
        return pair.query.video

    assert video("a.mp4") == "/r/a.mp4" == video(["a.mp4"])
    assert video("frames/a") == "/r/frames/a"
    assert video("frame.png") == ["/r/frame.png"]
    assert video(["1.png", "2.png"]) == ["/r/1.png", "/r/2.png"]
    assert video("v.tar::a.mp4") == "/r/v.tar::a.mp4"


# --- interleaved content ---------------------------------------------------------------------------------------------


def interleaved(**extra):
    content = [
        {"text": "first"},
        {"image": picture(1)},
        {"text": "then"},
        {"video": [picture(i, 8, 8) for i in range(2)], "fps": 1},
        {"video": [picture(i, 16, 8) for i in range(5)]},
        {"image": picture(2, 24, 16), "text": None, "video": None},  # as a table fills its gaps
        {"text": "last"},
    ]
    return {"query": {"content": content, "rewrite": "red", **extra}, "target": {"text": "t", "rewrite": "s"}}


@pytest.mark.parametrize("family", FAMILIES)
def test_content_keeps_its_order(family):
    pair, problems = parse_row(interleaved())
    assert not problems
    side = pair.query
    assert [kind for kind, _ in side.parts] == ["text", "image", "text", "video", "video", "image", "text"]
    assert (side.text, len(side.images), len(side.videos)) == ("firstthenlast", 2, 2)
    made = Collator(processor(), "rewrite", config(family))
    batch = made([pair])
    assert batch["image_counts"] == [2, 0]
    assert batch["video_counts"] == [2, 0]
    assert made.measure([side]) == [batch["lengths"][0]]
    kinds = batch["mm_token_type_ids"][: batch["lengths"][0]].tolist()
    runs = [kind for i, kind in enumerate(kinds) if kind and (i == 0 or kinds[i - 1] != kind)]
    patches = 1 + 3  # two and five frames, two to a patch
    assert runs == [1] + [2] * (patches if family == "qwen3_vl" else 2) + [1]
    decoded = processor().tokenizer.decode(batch["input_ids"][: batch["lengths"][0]])
    assert decoded.index("first") < decoded.index("then") < decoded.index("last")
    if family == "qwen3_vl":
        assert "<0.5 seconds>" in decoded  # the first video's rate
        assert "<0.2 seconds>" in decoded  # the collator's


def test_content_of_one_image_and_text_is_the_plain_side():
    content = Side(content=[("image", picture(1)), ("text", "what")], rewrite="r")
    plain = Side("what", [picture(1)], rewrite="r")
    made = Collator(processor(), "rewrite", config())
    assert (made.collate_sides([content])["input_ids"] == made.collate_sides([plain])["input_ids"]).all()
    assert content_hash(content) != content_hash(Side(content=[("text", "what"), ("image", picture(1))]))


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"text": "also"}, "query.content", "given beside text, images, video or fps"),
        ({"fps": 4}, "query.content", "given beside text, images, video or fps"),
        ({"content": [{"text": "a", "fps": 4}]}, "query.content[0].fps", "is the rate of a video; there is none"),
        ({"content": "text"}, "query.content", "is text; expected a list of parts"),
        ({"content": []}, "query", "is empty"),
        ({"content": [{"text": "a", "image": "b"}]}, "query.content[0]", "expected an object with one of"),
        ({"content": [{"text": "a"}, {"imgae": "b"}]}, "query.content[1]", "expected an object with one of"),
        ({"content": [{"text": "a", "size": 3}]}, "query.content[0].size", "unknown key"),
        ({"content": [{"text": 3}]}, "query.content[0].text", "is a number"),
        ({"content": [{"text": "<|im_end|>"}]}, "query.content[0].text", "holds '<|im_end|>'"),
        ({"content": [{"video": "a.mp4", "fps": 0}]}, "query.content[0].fps", "is 0; expected a positive"),
        ({"content": [{"image": 3}, {"text": "a"}]}, "query.content[0].image", "is a number"),
    ],
)
def test_bad_content_is_named(change, field, message):
    found = parse_row(interleaved(**change))[1]
    assert any(where == field and problem.startswith(message) for where, problem in found), found


def test_a_missing_image_in_content_is_named_by_its_place(tmp_path):
    raw = {"query": {"content": [{"text": "a"}, {"image": "gone.png"}]}, "target": {"text": "t"}}
    pair, _ = parse_row(raw, root=tmp_path)
    ((field, problem),) = check_pair(pair, CheckRules(rewrites=False))
    assert field == "query.content[1].image"
    assert problem.startswith("missing image")
    assert parse_row(pair_to_json(pair))[0] == pair


# --- several targets, scores -----------------------------------------------------------------------------------------


def row(**extra):
    return {"query": {"text": "q"}, "targets": [{"text": "a"}, {"text": "b"}, {"text": "c"}], **extra}


def test_several_right_answers_take_turns():
    pair, problems = parse_row(row(negatives=[{"text": "n"}], scores=[2.0, -1]))
    assert not problems
    assert (pair.target.text, [side.text for side in pair.positives]) == ("a", ["b", "c"])
    seen = [pair.visit(i) for i in range(4)]
    assert [p.target.text for p in seen] == ["a", "b", "c", "a"]
    assert [sorted(s.text for s in [p.target, *p.positives]) for p in seen] == [["a", "b", "c"]] * 4
    assert [p.scores for p in seen] == [[2.0, -1.0], None, None, [2.0, -1.0]]
    assert parse_row(pair_to_json(pair)) == (pair, [])
    assert pair.with_negatives(0).scores == [2.0]
    assert pair.with_negatives(0).negatives == []


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"target": {"text": "t"}}, "targets", "given beside `target`"),
        ({"targets": []}, "targets", "is empty"),
        ({"targets": "a"}, "targets", "is text; expected a list of sides"),
        ({"targets": [{"text": "a"}, {}]}, "targets[1]", "is empty"),
        ({"scores": [1.0, 2.0]}, "scores", "is 2 values; expected 1 + 0 finite numbers"),
        ({"scores": [float("nan")]}, "scores", "is 1 values; expected 1 + 0 finite"),
        ({"scores": [10**400]}, "scores", "is 1 values; expected 1 + 0 finite"),
        ({"mined_scores": 3}, "mined_scores", "is a number; expected 1 + 0"),
        ({"targets": [{"text": "a", "rewrite": "b</rewrite>"}]}, "targets[0].rewrite", "holds '</rewrite>'"),
    ],
)
def test_bad_targets_and_scores_are_named(change, field, message):
    found = parse_row(row(**change))[1]
    assert any(where == field and problem.startswith(message) for where, problem in found), found


def test_rewrites_are_asked_for_of_every_answer():
    pair, _ = parse_row(row(query={"text": "q", "rewrite": "r"}))
    assert [field for field, _ in check_pair(pair, CheckRules())] == [f"targets[{i}].rewrite" for i in range(3)]
