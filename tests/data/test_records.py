"""Images of every kind of source, upright; hashes that tell items apart on every machine."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from rime_fast.data.records import DataError, Problem, Side, image_size, load_image, side_to_json, stable_hash
from rime_fast.data.video import Video
from tests.data.builders import picture


def encoded(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def test_every_source_gives_the_same_image(tmp_path):
    image = picture(1, 12, 7)
    file = tmp_path / "a.png"
    image.save(file)
    stored = encoded(image, format="PNG")
    for source in (image, str(file), file, np.asarray(image), {"bytes": stored, "path": None}, {"path": str(file)}):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(image))
        assert image_size(source) == (7, 12)


def test_turned_photographs_stand_upright(tmp_path):
    image = picture(1, 12, 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (loaded.height, loaded.width) == (12, 7)
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("source", [3, None, {"bytes": None, "path": None}, "", b"raw"])
def test_odd_sources_are_named(source):
    for function in (load_image, image_size):
        with pytest.raises(ValueError, match="expected a path, a PIL image, an array or bytes"):
            function(source)


def test_hash_is_the_same_everywhere_and_differs_where_items_do(tmp_path):
    assert stable_hash(Side("cat")) == 2953955424995624292
    image = picture(1)
    image.save(tmp_path / "a.png")
    sides = [
        Side("cat"),
        Side("dog"),
        Side("cat", id="1"),
        Side("cat", [image]),
        Side("cat", [picture(2)]),
        Side("cat", [image, image]),
        Side("cat", [np.zeros((2, 3, 3), dtype=np.uint8)]),
        Side("cat", [np.zeros((3, 2, 3), dtype=np.uint8)]),
        Side("cat", ["a.png"]),
        Side("cat", ["b.png"]),
        Side("cat", [{"bytes": encoded(picture(3), format="PNG")}]),
        Side("cat\0image\0a.png", id=None),
    ]
    hashes = [stable_hash(side) for side in sides]
    assert len(set(hashes)) == len(sides)
    assert all(0 <= value < 2**63 for value in hashes)
    assert stable_hash(Side("fish", id="1")) == hashes[2]
    assert stable_hash(Side("cat", rewrite="ignored")) == hashes[0]


def test_a_prompt_has_one_hash_however_it_is_given():
    video = Video(["a.png", "b.png"])
    same = [
        [Side("cat"), Side(content=[("text", "c"), ("text", ""), ("text", "at")])],
        [Side("cat", ["a.png"]), Side(content=[("image", "a.png"), ("text", "cat")])],
        [Side("", ["a.png"]), Side(content=[("text", ""), ("image", "a.png")])],
        [Side("cat", ["a.png"], video.source), Side(content=[("image", "a.png"), ("video", video), ("text", "cat")])],
        [
            Side(content=[("text", "cat"), ("image", "a.png")]),
            Side(content=[("text", "cat"), ("image", "a.png"), ("text", "")]),
        ],
        [Side(content=[("video", video), ("image", "a.png"), ("text", "cat")])],
        [Side(content=[("text", "c"), ("image", "a.png"), ("text", "at")])],
        [Side("", ["a.png", "b.png"])],
        [Side("", video=["a.png", "b.png"])],
        [Side("", ["a.png"], ["b.png"])],
        [Side(content=[("video", Video(["a.png"])), ("video", Video(["b.png"]))])],
    ]
    hashes = [{stable_hash(side) for side in sides} for sides in same]
    assert [len(own) for own in hashes] == [1] * len(same)
    assert len(set.union(*hashes)) == len(same)


def test_errors_show_their_problems_and_survive_pickling():
    error = DataError([Problem("f.json", i, "query.text", "is wrong") for i in range(1, 30)])
    text = str(error)
    assert text.splitlines()[0] == "f.json, row 1, query.text: is wrong"
    assert text.endswith("... and 9 more")
    assert pickle.loads(pickle.dumps(error)).problems == error.problems
    assert str(pickle.loads(pickle.dumps(DataError("from a worker")))) == "from a worker"
    assert str(Problem("f.json", 0, "", "is empty")) == "f.json: is empty"


def test_open_images_are_not_json():
    with pytest.raises(ValueError, match="images holds open images"):
        side_to_json(Side("a", [picture(0)]))
