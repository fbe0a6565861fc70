"""Images from outside: what is opened, how far it may lead, and which pixels come of it."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rime_fast.data.formats import parse_row
from rime_fast.data.images import FORMATS, ImageRoot, content_digest, image_size, load_image
from rime_fast.data.records import Side, stable_hash
from rime_fast.data.vision_inputs import VisionInputs
from tests.data.builders import picture, processor


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width=13_000, height=13_000):
    """A PNG of 169 megapixels in some 20 kB."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


# --- what is opened --------------------------------------------------------------------------------------------------


def test_no_pipe_device_or_folder_is_waited_for(tmp_path):
    for name in ("pipe.png", "pipe.zip", "pipe.tar"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "folder.zip").mkdir()
    members = [f"{tmp_path}/{name}::a.png" for name in ("pipe.zip", "pipe.tar", "folder.zip")]
    for path in (tmp_path / "pipe.png", "/dev/zero", "/dev/null", tmp_path, *members):
        for look in (load_image, image_size, content_digest):
            with pytest.raises(ValueError, match=r"broken image: .*(not a file|directory)"):
                look(str(path))


@pytest.mark.parametrize("look", [load_image, image_size])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, look):
    (tmp_path / "bomb.png").write_bytes(bomb())
    assert os.path.getsize(tmp_path / "bomb.png") < 30_000
    with pytest.raises(ValueError, match=r"image too large: .*bomb.png \(13000 x 13000 pixels; at most 89478485"):
        look(tmp_path / "bomb.png")
    image = picture(0, 20, 10)
    assert look(image, max_pixels=200) is not None
    with pytest.raises(ValueError, match="at most 199 are decoded"):
        look(image, max_pixels=199)


def test_only_the_formats_of_pictures_are_tried(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\nshowpage\n")
    with pytest.raises(ValueError, match="not an image of JPEG, PNG"):
        load_image(tmp_path / "a.png")
    assert not {"EPS", "DDS", "PSD", "PDF"} & set(FORMATS)


CUT = [
    (name, share) for name in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF") if name in FORMATS for share in (0.3, 0.8)
]


@pytest.mark.parametrize(("name", "share"), CUT)
def test_a_cut_or_corrupt_file_has_a_name(tmp_path, name, share):
    whole = encoded(picture(0, 64, 64), format=name)
    (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
    middle = len(whole) // 2
    (tmp_path / "odd").write_bytes(whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 40]))
    for file in ("cut", "odd"):
        with pytest.raises(ValueError, match=f"broken image: .*{file}"):
            load_image(tmp_path / file)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        Image.new("RGB", (0, 3)),
        {"bytes": "text"},
        {"bytes": b""},
        {"bytes": 3, "path": "a.png"},
        {"path": 5},
        b"raw",
    ],
    ids=lambda source: repr(getattr(source, "size", source)),  # no address: two processes must agree on the name
)
def test_odd_sources_are_bad_images_not_crashes(source):
    for look in (load_image, image_size):
        with pytest.raises(ValueError, match="image"):
            look(source)


def test_arrays_of_one_and_four_channels():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(np.asarray(load_image(grey[:, :, None])), grey)
    assert load_image(np.zeros((3, 4, 4), np.uint8)).mode == "RGBA"


# --- where it may lie ------------------------------------------------------------------------------------------------


def test_paths_stay_in_the_image_root(tmp_path):
    root = ImageRoot(str(tmp_path / "images"))
    assert root.resolve("a/b.png") == str(tmp_path / "images" / "a" / "b.png")
    assert root.resolve(str(tmp_path / "images" / "c.png")) == str(tmp_path / "images" / "c.png")
    assert root.resolve({"path": "d.png"}) == {"path": str(tmp_path / "images" / "d.png")}
    assert root.resolve({"bytes": b"x", "path": "../e.png"})["path"] == "../e.png"  # a name, not a place
    for path in ("../secret.png", "a/../../secret.png", "/etc/passwd", str(tmp_path / "images2" / "a.png")):
        for source in (path, {"path": path}, f"{path}.zip::a.png"):
            with pytest.raises(ValueError, match=r"is outside of image_root .*images; allow_outside"):
                root.resolve(source)
    outside = ImageRoot(str(tmp_path), outside=True)
    assert outside.resolve("/data/a.png") == "/data/a.png"


def test_urls_are_opened_on_request_only(tmp_path):
    picture(1).save(tmp_path / "a.png")
    url = f"file://{tmp_path}/a.png"
    with pytest.raises(ValueError, match=r"is a URL .* allow_urls"):
        ImageRoot("").resolve(url)
    assert ImageRoot("", urls=True).resolve(url) == url
    assert np.array_equal(np.asarray(load_image(url)), np.asarray(picture(1)))
    with pytest.raises(ValueError, match="missing image: file://"):
        load_image(f"file://{tmp_path}/gone.png")
    with pytest.raises(ValueError, match="broken image: nonsense://a"):
        load_image("nonsense://a")


def test_a_row_that_leads_outside_is_a_bad_row(tmp_path):
    raw = {"query": {"text": "q", "image": "../x.png"}, "target": {"text": "t", "video": ["/etc/passwd"]}}
    _, problems = parse_row(raw, root=ImageRoot(str(tmp_path)))
    assert [field for field, _ in problems] == ["query.image", "target.video[0]"]
    assert all("outside of image_root" in problem for _, problem in problems)
    assert parse_row({"query": {"image": "a\0.png"}, "target": {"text": "t"}})[1][0][0] == "query.image"


# --- which pixels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_every_source_stands_upright(tmp_path, name, orientation):
    if name not in FORMATS:
        pytest.skip("this Pillow lacks it")
    file = tmp_path / "a.img"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(1, 24, 16).save(file, format=name, exif=exif)
    with Image.open(file) as opened:
        sources = [file, {"bytes": file.read_bytes()}, opened]
        images = [load_image(source) for source in sources]
        sizes = {image_size(source) for source in sources}
    assert sizes == {(24, 16) if orientation >= 5 else (16, 24)}
    assert len({image.tobytes() for image in images}) == 1
    assert (images[0].height, images[0].width) in sizes
    assert load_image(images[0]).size == images[0].size  # not turned twice


@pytest.mark.parametrize("kind", [b"eXIf", b"iTXt"])
@pytest.mark.parametrize("packed", [b"", b"x" * 80_000])
def test_a_png_whose_orientation_stands_behind_its_pixels(kind, packed):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    late = exif.tobytes()[6:] + packed if kind == b"eXIf" else b"XML:com.adobe.xmp" + bytes(5) + xmp + packed
    whole, end = encoded(picture(1, 24, 16), format="PNG"), chunk(b"IEND", b"")
    text = chunk(b"tEXt", b"date:create\0" + b"today" * 30)
    turned = {"bytes": whole.removesuffix(end) + text + chunk(kind, late) + end}
    opened = Image.open(io.BytesIO(turned["bytes"]))
    assert image_size(opened) == image_size(turned) == (24, 16)
    images = [
        load_image(source) for source in (turned, opened, picture(1, 24, 16).transpose(Image.Transpose.ROTATE_270))
    ]
    assert len({image.tobytes() for image in images}) == 1
    plain = {"bytes": whole.removesuffix(end) + text + end}
    assert image_size(plain) == load_image(plain).size[::-1] == (16, 24)


def test_a_damaged_exif_block_does_not_end_a_run(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    file = tmp_path / "a.jpg"
    picture(1, 24, 16).save(file, exif=exif)
    whole = bytearray(file.read_bytes())
    at = whole.find(struct.pack("<H", 0x010F))
    at = at if at >= 0 else whole.find(struct.pack(">H", 0x010F))
    whole[at + 4 : at + 8] = b"\xff\xff\xff\x7f"  # absurdly long
    file.write_bytes(bytes(whole))
    assert image_size(file) == load_image(file).size[::-1] == (24, 16)
    file.write_bytes(bytes(whole).replace(b"Exif\0\0II", b"Exif\0\0ZZ").replace(b"Exif\0\0MM", b"Exif\0\0ZZ"))
    assert image_size(file) == load_image(file).size[::-1] == (16, 24)


def test_sixteen_bits_look_like_their_eight(tmp_path):
    vision = VisionInputs(processor().image_processor)
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    expected = vision.images([grey])[0]
    for factor in (257, 256):
        deep = Image.fromarray(grey.astype(np.uint16) * factor)
        for ending in ("png", "tif"):
            file = tmp_path / f"{factor}.{ending}"
            deep.save(file)
            assert (vision.images([str(file)])[0] == expected).all()
        assert (vision.images([deep])[0] == expected).all()
    floats = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    with pytest.raises(ValueError, match="pixels of mode F"):
        load_image(floats)
    for levels in (0, 255, 70_000):
        deep = Image.fromarray(np.full((4, 4), levels, np.int32))
        for source in (deep, {"bytes": encoded(deep, format="TIFF")}):
            for look in (load_image, image_size):
                with pytest.raises(ValueError, match=r"broken image: .*pixels of mode I; expected 8 or 16 bits"):
                    look(source)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (np.asarray(load_image({"bytes": encoded(deep, format="PPM")})) == grey).all()


def test_cmyk_palettes_and_animations(tmp_path):
    vision = VisionInputs(processor().image_processor)
    cmyk = picture(2, 16, 16).convert("CMYK")
    cmyk.save(tmp_path / "a.tif")
    assert (vision.images([str(tmp_path / "a.tif")])[0] == vision.images([cmyk.convert("RGB")])[0]).all()
    frames = [picture(i, 16, 16).quantize(8) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    first = vision.images([frames[0].convert("RGB")])[0]
    assert (vision.images([str(tmp_path / "a.gif")])[0] == first).all()


# --- which images are the same ---------------------------------------------------------------------------------------


def test_embedded_images_count_by_their_bytes_not_their_name():
    one, two = (encoded(picture(seed), format="PNG") for seed in (1, 2))
    hashes = [stable_hash(Side("", [{"bytes": data, "path": "page.png"}])) for data in (one, two, one)]
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2] == stable_hash(Side("", [{"bytes": one, "path": "other.png"}]))
    assert stable_hash(Side("", [{"bytes": None, "path": "a.png"}])) == stable_hash(Side("", ["a.png"]))


def test_a_palette_is_part_of_the_picture():
    image = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    other = image.copy()
    image.putpalette([255, 0, 0])
    other.putpalette([0, 0, 255])
    assert stable_hash(Side("", [image])) != stable_hash(Side("", [other]))


def test_how_an_open_image_is_turned_is_part_of_the_picture():
    hashes = set()
    for orientation in (None, 1, 6):
        exif = Image.Exif()
        if orientation is not None:
            exif[0x0112] = orientation
        with Image.open(io.BytesIO(encoded(picture(1), format="PNG", exif=exif))) as image:
            hashes.add(stable_hash(Side("", [image])))
    assert len(hashes) == 2
    assert stable_hash(Side("", [picture(1)])) in hashes


def test_content_digest_is_the_file_wherever_it_lies(tmp_path):
    picture(1).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data)
    digests = {content_digest(source) for source in (tmp_path / "a.png", str(tmp_path / "b.png"), {"bytes": data})}
    assert len(digests) == 1
    assert content_digest(picture(1)) != content_digest(picture(2))


def test_pillows_own_bound_gives_way_to_the_one_that_was_asked_for(monkeypatch):
    """Pillow refuses images of twice its bound, whatever limit of ours is higher."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    image = {"bytes": encoded(picture(0, 16, 8), format="PNG")}
    assert image_size(image, max_pixels=128) == (8, 16)
    assert load_image(image, max_pixels=128).size == (16, 8)
    with pytest.raises(ValueError, match=r"image too large: .*16 x 8 pixels; at most 127"):
        load_image(image, max_pixels=127)
